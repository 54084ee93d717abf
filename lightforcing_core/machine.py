"""Choices by measurement: which of several ways to compute one thing is right and fastest on this machine.

A candidate is unknown until it is tried while `measuring`. It is *verified* if its result equals the incumbent's
within a tolerance, *enabled* if it is clearly faster too, and *quarantined* if it is wrong, fails, or ends the process
twice. `profile` keeps that for later processes, each of which compares an enabled candidate once more before it is
used. Without a proof the incumbent runs.
"""

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import profile
from .fast_path import DeviceLost, is_recording, kept_for_a_run, note, one_line, raise_if_fatal, say_once
from .profile import ENABLED, QUARANTINED, TRYING, VERIFIED, Row
from .refusal import is_finite

TOLERANCE = (1e-2, 1e-3)  # of attention in 16 bits, and in float32, in which a GPU may multiply in TF32
GAIN = 1.05  # how much faster a candidate must be
ROUNDS = (5, 30)  # timed runs of each, at least and at most
ENOUGH = 0.2  # seconds after which a candidate and the incumbent have been timed enough
SECONDS = 8.0  # of a look
SHARE = 1 / 16  # of a look's time that one run of the incumbent may take; slower work is not measured
CRASHED = "ended or froze the process that tried it, twice"
LEASE = 600.0  # seconds for which another process may still be trying a candidate

Thunk = Callable[[], Tensor]
By = Callable[[str], Tensor]  # runs the candidate of a name

settled: dict[Hashable, Any] = kept_for_a_run()  # winners of this run
_open: dict[Hashable, Any] = kept_for_a_run()  # of these the choices for which something is still to be tried
_unusable: dict[Hashable, Any] = kept_for_a_run()  # holds "profile" once that failed in this run
_checked: set[tuple["Choice", str]] = set()  # candidates that were right in this process
_skipped: set[tuple["Choice", str]] = set()  # candidates that this process does not try
_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Work with a place in braces for each fact of its very shape, and the candidate that runs without proof."""

    work: str
    facts: tuple[Hashable, ...]
    device: torch.device
    incumbent: str

    @property
    def title(self) -> str:
        return self.work.format(*self.facts)

    @property
    def text(self) -> str:
        """The same in every process, and another for each choice."""
        return f"{self.title} | {self.facts} | {self.incumbent}"


@dataclass(eq=False)
class _Look:
    """A time in which candidates may be tried, see `measuring`. is_busy: one is running."""

    say: Callable[[str], object] = lambda text: None
    should_stop: Callable[[], bool] = lambda: False
    seconds: float = 0.0
    end: float = 0.0
    is_busy: bool = False


class _Thread(threading.local):
    def __init__(self) -> None:
        self.look, self.is_safe = _Look(), False


_thread = _Thread()


def choose(
    work: str,
    facts: tuple[Hashable, ...],
    device: torch.device,
    names: Collection[str],
    run: By | None,
    *,
    incumbent: str,
    tolerance: float,
) -> str:
    """The candidate to run: the fastest one that is proved on this machine, else the incumbent.

    work: "FP8 product {}×{}×{} in {}", …: with `facts` in its braces the name that the report shows.
    facts: those of the very shape, such as sizes and dtypes; they print the same text in every process.
    names: the candidates, the incumbent included.
    run: computes the same from the same inputs into a new tensor, by the candidate of a name. None if nothing can run
        now; then only what was right in this process is returned.
    tolerance: how far a result may be from the incumbent's, as a share of its largest value.

    Candidates are tried only inside `measuring`, never while another one runs or a graph is recorded. Choices inside
    the incumbent's first run come first. Raises `DeviceLost` if a candidate makes the device unusable.
    """
    if len(names) < 2 or _thread.is_safe:
        return incumbent
    choice, look = Choice(work, facts, device, incumbent), _thread.look
    if (found := settled.get(choice)) in names:
        return str(found)
    if is_off() or _unusable or is_recording() or device.type == "meta" or is_trying():
        return incumbent
    rows, winner = dict[str, Row](), incumbent
    try:
        rows = _rows(choice)
        tried = {name for name, row in rows.items() if row.state != TRYING} | {incumbent}
        unknown = [name for name in names if name not in tried and (choice, name) not in _skipped]
        if run and unknown and has_time():
            look.say(f"measuring this machine, once, about {look.seconds:.0f} s")
            _measure(look, choice, unknown, run, tolerance)
            rows = _rows(choice)
        winner = _winner(choice, names, rows, run, tolerance)
    except DeviceLost:
        raise
    except profile.ProfileError as error:
        say_once(logging.WARNING, f"[Light Forcing] nothing is measured: {error}", about="profile")
        look.end, _unusable["profile"] = 0.0, True
    except Exception as error:  # the incumbent's, which its caller will meet, or no memory for two results at once
        _skipped.update((choice, name) for name in names)
        _log.info("[Light Forcing] not measured: %s (%s)", choice.title, one_line(error))
    finally:
        look.is_busy = False
    for name, row in rows.items():
        if name == winner or row.state == QUARANTINED:
            note(f"measured {choice.title}", f"{name} {'is' if name == winner else 'is not used, it'} {row.because}")
    if run:
        settled[choice] = winner
        if any(name not in rows or rows[name].state == TRYING for name in names if name != incumbent):
            _open[choice] = True
    return winner


def is_off() -> bool:
    """Whether only incumbents run: with LIGHTFORCING_PROFILE=off, and inside `safe`."""
    return _thread.is_safe or os.environ.get("LIGHTFORCING_PROFILE", "").lower() == "off"


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """Make every choice in this thread its incumbent; nothing is measured."""
    before, _thread.is_safe = _thread.is_safe, True
    try:
        yield
    finally:
        _thread.is_safe = before


@contextlib.contextmanager
def measuring(
    say: Callable[[str], object] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    seconds: float = SECONDS,
) -> Iterator[None]:
    """Let `choose` try, in this thread, the candidates that are not known yet.

    say: shows a line to the user, once something is tried. should_stop: whether to try no more of them.
    seconds: after which none is tried any more; one that runs is not interrupted.
    """
    for choice in list(settled):  # but not decided ones, which a graph that is recorded later finds here
        if choice in _open or not isinstance(choice, Choice):
            settled.pop(choice, None)
    _open.clear()
    say = cache(say)  # shows each line once
    before, _thread.look = _thread.look, _Look(say, should_stop, seconds, time.monotonic() + seconds)
    try:
        yield
    finally:
        _thread.look = before


def has_time() -> bool:
    """Whether something may still be tried."""
    return time.monotonic() < _thread.look.end and not _thread.look.should_stop()


def is_trying() -> bool:
    """Whether this is the run of a candidate, in which nothing else is settled."""
    return _thread.look.is_busy


def _rows(choice: Choice) -> dict[str, Row]:
    return profile.rows(choice.device, choice.text).get(choice.text, {})


def _measure(look: _Look, choice: Choice, unknown: list[str], run: By, tolerance: float) -> None:
    """Verify and time the unknown candidates, and keep a row for each."""
    usual = partial(run, choice.incumbent)
    expected = usual()
    look.is_busy = True
    if not is_finite(expected):
        return  # nothing equals NaN
    if seconds_of(usual, choice.device) > look.seconds * SHARE:
        _skipped.update((choice, name) for name in unknown)
        return
    known = _rows(choice)
    for name in unknown:
        if not has_time():
            return
        former, row = known.get(name), None
        if former and time.time() - former.gain < LEASE:
            continue
        if former and former.because:
            profile.keep(choice.device, choice.text, name, Row(QUARANTINED, CRASHED))
            continue
        # This row is still there if the candidate ends the process. Once may be a power cut, twice is not.
        profile.keep(choice.device, choice.text, name, Row(TRYING, "again" if former else "", time.time()))
        try:
            row = _row(partial(run, name), usual, choice, expected, tolerance)
            _wait(choice.device)
        except torch.OutOfMemoryError:  # says nothing about the candidate
            _skipped.add((choice, name))
        except BaseException as error:
            is_lost = isinstance(error, DeviceLost)
            row = Row(QUARANTINED, f"made the GPU unusable ({one_line(error)})") if is_lost else None
            with contextlib.suppress(profile.ProfileError):
                profile.keep(choice.device, choice.text, name, row)
            raise
        profile.keep(choice.device, choice.text, name, row)
        if row is not None:
            _log.info("[Light Forcing] measured %s: %s is %s, %s", choice.title, name, *row[:2])
            _checked.add((choice, name))


def _row(run: Thunk, usual: Thunk, choice: Choice, expected: Tensor, tolerance: float) -> Row:
    """Verify a candidate; if it is right, time it by turns with the incumbent."""
    if fault := _fault(run, expected, tolerance):
        return Row(QUARANTINED, fault)
    ours: list[float] = []
    theirs: list[float] = []
    turns = [(ours, run), (theirs, usual)]
    try:
        while len(ours) < ROUNDS[0] or (len(ours) < ROUNDS[1] and sum(ours + theirs) < ENOUGH):
            for times, arm in turns:
                times.append(seconds_of(arm, choice.device))
            turns.reverse()
            if ours[0] > 2 * theirs[0]:
                break
    except Exception as error:
        raise_if_fatal(error)
        return Row(QUARANTINED, f"does not run each time ({one_line(error)})")
    # Each time twice, since quartiles need two.
    (_, middle, high), (usual_low, usual_middle, _) = (
        quantiles(2 * x, n=4, method="inclusive") for x in (ours, theirs)
    )
    gain = usual_middle / max(middle, 1e-9)
    text = f"{gain:.2f} times as fast as {choice.incumbent} ({1e3 * middle:.3g} ms, not {1e3 * usual_middle:.3g})"
    return Row(ENABLED if gain >= GAIN and high < usual_low else VERIFIED, text, round(gain, 3))


def _winner(choice: Choice, names: Collection[str], rows: dict[str, Row], run: By | None, tolerance: float) -> str:
    """The enabled candidate of the largest gain that is right in this process too."""
    enabled = [name for name in names if name in rows and rows[name].state == ENABLED]
    for name in sorted(enabled, key=lambda name: -rows[name].gain):
        # A choice between pictures follows its row, or free memory would decide which picture a seed gives.
        if (choice, name) in _checked or math.isinf(tolerance):
            return name
        if run is None:
            continue
        expected = run(choice.incumbent)
        if not is_finite(expected):
            break  # nothing equals NaN
        fault = _fault(partial(run, name), expected, tolerance, runs=1)
        if fault is None:
            _checked.add((choice, name))
            return name
        rows[name] = Row(QUARANTINED, f"{fault}, {time.strftime('%Y-%m-%d')}")
        _log.warning("[Light Forcing] %s: %s is not used any more, it %s", choice.title, name, rows[name].because)
        profile.keep(choice.device, choice.text, name, rows[name])
    return choice.incumbent


def _fault(run: Thunk, expected: Tensor, tolerance: float, runs: int = 2) -> str | None:
    """Why `run` does not give the expected result, or not the same each time; None if it does."""
    try:
        first = run()
        if (first.shape, first.dtype) != (expected.shape, expected.dtype):
            return "gives another shape or dtype"
        wide = torch.promote_types(first.dtype, torch.float32)
        largest, apart = (x.abs().max().item() for x in (expected.to(wide), first.to(wide) - expected.to(wide)))
        if not apart <= tolerance * largest:  # as NaN is not
            return f"is wrong by {apart / max(largest, 1e-30):.1%} of the largest value, over {tolerance:.1%}"
        if not all(torch.equal(first, run()) for _ in range(runs - 1)):
            return "gives another result each time"
        return None
    except Exception as error:  # errors of compilers and drivers have no common type
        raise_if_fatal(error)
        return f"does not run ({one_line(error)})"


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The time of one call on the device, on a GPU with cold caches."""
    if device.type != "cuda":
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - begun
    with torch.cuda.device(device):
        torch.empty(1 << 28, dtype=torch.uint8, device=device).zero_()  # larger than any L2 cache
        torch.cuda._sleep(2_000_000)  # about a millisecond, so that launches do not wait for the CPU
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
