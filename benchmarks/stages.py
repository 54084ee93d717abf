"""A record made in stages, each in a process of its own with a time limit; this process never touches the device.

A stage sends its rows as they come. If it crashes or hangs, its rest is lost and the record says so, but
after a crash within a check of a kernel, the checks after it run in a new process.
"""

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..lightforcing_core.fast_path import one_line
from .console import Put, Record, add
from .settings import Say

Run = Callable[[Record, Put], str | None]
FINE = ("done", "skipped")


class NotHere(Exception):
    """A stage makes no sense on this machine, for the reason in the message."""


class Stage(NamedTuple):
    """run: a function that a new process can import; it reads the record so far, puts rows and may return a remark.

    seconds: its time limit.
    """

    name: str
    run: Run
    seconds: float


def run_stages(stages: Iterable[Stage], put: Put, say: Say) -> None:
    """Run the stages in order and put all that they put; `ok`, and `advice` for what is wrong."""
    record: Record = {"facts": {}, "kernels": {}, "stages": {}}

    def put_both(*sent: Any) -> None:
        add(record, *sent)
        put(*sent)

    put_both("", "schema", 1)
    put_both("", "ok", False)
    for stage in stages:
        say(stage.name)
        started = time.perf_counter()
        ends: list[dict[str, Any]] = []
        while not ends or ends[-1]["state"] in ("crashed", "failed"):
            unfinished = _unfinished(record)
            ends.append(_run(stage, record, put_both))
            if _unfinished(record) == unfinished:
                break
        rest = {"rest": ends[-1]["state"]} if len(ends) > 1 else {}
        seconds = round(time.perf_counter() - started, 1)
        put_both("stages", stage.name, ends[0] | rest | {"seconds": seconds})
    wrong = {kind: "is wrong here" for kind, row in record["kernels"].items() if not row.get("verified", True)}
    wrong |= {f"stage {name}": row["state"] for name, row in record["stages"].items() if row["state"] not in FINE}
    for name, fault in wrong.items():
        put("advice", name, f"{fault}: please open an issue with this report")
    put("", "ok", not wrong and not record["facts"].get("outdated"))


def _unfinished(record: Record) -> int:
    return sum(row.get("verified", True) is None for row in record["kernels"].values())


def _run(stage: Stage, record: Record, put: Put) -> dict[str, Any]:
    """Run one stage and put what it sends; returns how it ended."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch"])  # so that it is imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(stage.run, record, theirs), daemon=True)
    process.start()
    theirs.close()
    end = time.monotonic() + stage.seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            sent = ours.recv()
            if isinstance(sent, dict):
                return sent
            put(*sent)
        return {"state": "hung", "remark": f"it did not end within {stage.seconds:g} s"}
    except EOFError:
        process.join()
        return {"state": "crashed", "remark": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join(5)  # a hung driver call cannot be killed


def _child(run: Run, record: Record, pipe: Connection) -> None:
    """Run a stage in its own process; the last message says how it ended and repeats the log's warnings."""
    warnings.simplefilter("ignore")  # of torch and Triton
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    state = "done"
    try:
        remark = run(record, lambda *sent: pipe.send(sent))
    except NotHere as found:
        state, remark = "skipped", str(found)
    except BaseException as error:
        state, remark = "failed", one_line(error)
    pipe.send({"state": state, "remark": remark or "", "warnings": said})
