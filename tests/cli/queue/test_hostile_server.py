"""A server that answers anything but what ComfyUI does: every run ends, cleanly, and what can succeed does."""

import json
import os
import re
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache

import pytest

from lightforcing.cli.queue import run, server
from lightforcing.cli.queue.batch import Batch
from lightforcing.cli.queue.display import Display
from lightforcing.cli.queue.jobs import make_jobs
from lightforcing.cli.queue.prompt import UsageError, read_override
from lightforcing.cli.queue.server import ComfyServer, QueueError

from ...support.queue_samples import GRAPH
from .hostile_server import MODES, hostile_server

SECRET = "secret-of-this-host"
DEADLINE = 60.0  # seconds for a run that waits for a few silent answers of at most 3 s each
MOST_MEMORY = 200_000  # kB
COMMAND = """
import atexit
from lightforcing.cli.main import main

atexit.register(lambda: print(open("/proc/self/status").read()))
main()
"""


def hangs(mode):
    return mode.endswith(("drip", "drip 500", "head", "heads", "silence", "ws endless"))


def play(url, out, mode):
    """How a batch of one prompt ends: done, failed or left, and its messages; any other error is raised."""
    patience = 3.0 if hangs(mode) else 10.0 if MODES[mode][1] == "done" else 1.0
    messages, ends = [], []
    display = Display(messages.append, single=False, json=False)

    def emit(kind, **fields):
        display(kind, **fields)
        if kind == "summary":
            ends.append(next(name for name in ("done", "failed", "left") if fields[name]))

    try:
        with closing(ComfyServer(f"{url}/{list(MODES).index(mode)}", patience=patience)) as comfy:
            info = comfy.object_info(node["class_type"] for node in GRAPH.values())
            jobs = make_jobs(GRAPH, info, lines=[{"text": "x"}], overrides=[read_override("3.mode=growth")])
            Batch(jobs, comfy, emit, out / mode, timeout=4 * patience).run()
    except (QueueError, UsageError) as error:
        messages.append(str(error))
    return *(ends or ["refused"]), messages


def test_every_run_ends_in_time_with_clear_messages_and_inside_its_folder(monkeypatch, tmp_path):
    """All modes side by side, with short deadlines and small limits."""
    for module, name, value in (
        (server, "TICK_SECONDS", 0.05),
        (server, "RETRY_SECONDS", 0.05),
        (server, "MOST_JSON", 1 << 20),
        (server, "MOST_QUEUE", 1 << 23),
        (server, "MOST_FILE", 1 << 23),
        (run, "ASK_SECONDS", 0.1),
        (ssl, "create_default_context", cache(ssl.create_default_context)),  # it takes long
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("LIGHTFORCING_HEADERS", f"Authorization: Bearer {SECRET}\nX-Key: {SECRET}")
    out, wrong = tmp_path / "out", {}
    with hostile_server() as (url, strayed), ThreadPoolExecutor(24) as pool:
        futures = {mode: pool.submit(play, url, out, mode) for mode in sorted(MODES, key=hangs, reverse=True)}
        for mode, future in futures.items():
            end, messages = future.result(DEADLINE)
            wanted = MODES[mode][1]
            is_clear = end == "done" or (messages and max(map(len, messages)) < 5000)
            if not is_clear or (end != wanted if wanted else end == "done"):
                wrong[mode] = (end, messages)
    assert wrong == {}
    assert strayed == []
    assert os.listdir(tmp_path) == ["out"]
    written = {path.name for mode in os.listdir(out) for path in (out / mode / "0001").rglob("*") if path.is_file()}
    assert written == {"clip.txt", "a__.txt", "evil", "x_", "unnamed", "['x']"}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures as Linux does")
@pytest.mark.parametrize("mode", ["history items", "history wide", "ws large previews"])
def test_memory_is_bounded(tmp_path, mode):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    with hostile_server() as (url, _):
        address = f"{url}/{list(MODES).index(mode)}"
        given = ["queue", tmp_path / "graph.json", "--server", address, "--out", tmp_path / "out", "--patience", 2]
        given += ["--timeout", 3]
        command = [sys.executable, "-c", COMMAND, *map(str, given)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in found.stderr
    assert int(re.search(r"VmHWM:\s*(\d+) kB", found.stdout)[1]) < MOST_MEMORY
