"""Runs the scripts of this folder in processes of their own, where kernels are compiled and not interpreted."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def in_a_process(script, *arguments, cache, timeout=600):
    """The rows of JSON that a script prints; `cache` is Triton's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Line numbers change no code, and without them it is made faster.
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{script}", *arguments],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_all(arguments, cache):
    """One row per argument of `ahead_of_time`; two processes share the work."""
    with ThreadPoolExecutor(2) as pool:
        shares = [share for share in (arguments[::2], arguments[1::2]) if share]
        rows = pool.map(lambda share: in_a_process("ahead_of_time", *share, cache=cache), shares)
        return [row for share in rows for row in share]
