"""A report made in stages, each in a process of its own with a time limit; this process never touches the device.

A stage sends its rows as they come. If it crashes or hangs, its rest is lost and the report says so, but
after a crash within a check of a kernel, the checks after it run in a new process.
"""

import logging
import multiprocessing
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ..lightforcing_core.fast_path import one_line
from .settings import Say

Report = dict[str, Any]
Put = Callable[[str, Any], object]  # adds a row, facts or a sentence to a section of the report
Run = Callable[[Report, Put], str | None]
SCHEMA = 1
FINE = ("done", "skipped")
# The report's sections; all but FACTS hold rows or sentences.
FACTS = ("facts", "ceilings", "forward", "decode", "clip", "faults", "choices")
SECTIONS = (*FACTS, "kernels", "attention", "stages", "advice")
# The folders of a path that begins at a root or a drive.
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\s\\/:;'\"]+)*[\\/]+(?=[^\s\\/])")


class NotHere(Exception):
    """A stage makes no sense on this machine, for the reason in the message."""


class Stage(NamedTuple):
    """run: a function that a new process can import; it reads the report so far, adds to it and may return a remark.

    seconds: its time limit.
    """

    name: str
    run: Run
    seconds: float


def run_stages(stages: Iterable[Stage], say: Say) -> Report:
    """Run the stages in order; returns the whole report, whose texts name no path, user or machine."""
    report: Report = {"schema": SCHEMA, "key": "", "ok": True}
    report |= {name: {} if name in FACTS else [] for name in SECTIONS}
    for stage in stages:
        say(stage.name)
        started = time.perf_counter()
        outcome = {"stage": stage.name} | _run(stage, report)
        _add(report, "stages", outcome | {"seconds": round(time.perf_counter() - started, 1)})
    wrong = [f"{row['kind']} is wrong here" for row in report["kernels"] if not row.get("verified", True)]
    wrong += [f"stage {row['stage']} {row['state']}" for row in report["stages"] if row["state"] not in FINE]
    report["advice"] += [f"{one}: please open an issue with this report" for one in wrong]
    report["ok"] &= not wrong
    return report


def _run(stage: Stage, report: Report) -> dict[str, Any]:
    """Run one stage, and its rest as long as each crash leaves one more check of a kernel unfinished."""
    unfinished = _unfinished(report)
    outcome = _outcome(stage, report)
    if outcome["state"] in ("crashed", "failed") and _unfinished(report) > unfinished:
        rest = _run(stage, report)
        outcome["rest"] = rest.get("rest", rest["state"])
    return outcome


def _unfinished(report: Report) -> int:
    return sum(row.get("verified", True) is None for row in report["kernels"])


def _outcome(stage: Stage, report: Report) -> dict[str, Any]:
    """Run one stage and merge what it sends; returns how it ended."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch"])  # so that it is imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(stage.run, report, theirs), daemon=True)
    process.start()
    theirs.close()
    end = time.monotonic() + stage.seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            section, value = ours.recv()
            if not section:
                return value
            _add(report, section, value)
        return {"state": "hung", "reason": f"it did not end within {stage.seconds:g} s"}
    except EOFError:
        process.join()
        return {"state": "crashed", "reason": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join(5)  # a hung driver call cannot be killed


def _child(run: Run, report: Report, pipe: Connection) -> None:
    """Run a stage in its own process; the last message says how it ended and repeats the log's warnings."""
    warnings.simplefilter("ignore")  # of torch and Triton
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    state = "done"
    try:
        reason = run(report, lambda section, value: pipe.send((section, value)))
    except NotHere as found:
        state, reason = "skipped", str(found)
    except BaseException as error:
        state, reason = "failed", one_line(error)
    pipe.send(("", {"state": state, "reason": reason or "", "warnings": said}))


def _add(report: Report, section: str, value: Any) -> None:
    """Merge a row into the one of its kind, facts into theirs; a sentence is added once."""
    value, held = _anonymous(value), report[section]
    if isinstance(held, dict):
        held |= value
    elif isinstance(value, dict) and (same := [row for row in held if row.get("kind", row) == value.get("kind")]):
        same[0] |= value
    elif isinstance(held, list) and value not in held:
        held.append(value)
    elif not isinstance(held, list):
        report[section] = value


def _anonymous(value: Any) -> Any:
    """The value with files instead of paths, and without the names of the user and of the machine."""
    if isinstance(value, dict):
        return {key: _anonymous(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_anonymous(one) for one in value]
    if not isinstance(value, str):
        return value
    text = _FOLDERS.sub("", value.replace(str(Path.home()), ""))
    for name in filter(None, (Path.home().name, platform.node())):
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text
