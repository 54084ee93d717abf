"""Time several arms interleaved, so that a busy machine slows all equally."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WARM_UP = 2


def warm_up_rule(repeats: int) -> str:
    """The rule of `take_turns`, as a sentence for the record."""
    return (
        f"every arm runs {WARM_UP} times untimed (compilation happens there), then {repeats} rounds in which each arm "
        f"runs once, the first arm of a round rotating; medians with quartiles; a ratio is the median of the rounds' "
        f"own ratios"
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "quartiles": list(map(float, np.quantile(values, (0.25, 0.75))))}


def samples_of(arms: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {name: spread(seconds) | {"seconds": seconds} for name, seconds in arms.items()}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """The speed of the second arm relative to the first, from the rounds' ratios."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def take_turns(
    arms: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """The seconds of every arm in each of `repeats` rounds, by `warm_up_rule`."""
    for arm in arms.values():
        for _ in range(WARM_UP):
            arm()
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clock = StageClock(device)
            with clock.stage(name):
                arms[name]()
            seconds[name].append(clock.seconds()[name])
    return seconds


class StageClock:
    """The time of named stages, by events on a GPU and by the wall clock elsewhere.

    The time of a stage within another one counts for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._spans: list[tuple[str, Any, Any]] = []
        self._open = False
        self.seconds()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this block, or of each call of a decorated function, to `name`."""
        if self._open:
            yield
            return
        self._open = True
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((name, start, self._now()))
            self._open = False

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far; waits for the device."""
        if self._gpu:
            torch.cuda.synchronize(self._gpu)
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            spent = start.elapsed_time(end) / 1e3 if self._gpu else end - start
            totals[name] = totals.get(name, 0.0) + spent
        return totals

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event
