"""The command `lightforcing render` as a process, and the processes that it starts."""

import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen, run

CAPTION = "on a plain background a red circle moves right slowly"
COMMAND = [sys.executable, "-c", "from lightforcing.cli.main import main; main()", "render"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(command):
    """The command's process, and its events as they come."""
    process = Popen([*COMMAND, *map(str, command), "--json"], env=ENVIRONMENT, stdout=PIPE, text=True)
    try:
        yield process, (json.loads(line) for line in process.stdout)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def finished(command):
    done = run([*COMMAND, *map(str, command), "--json"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def prompts(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def processes_of(parent, name):
    """The processes below `parent` with `name` in their command, the oldest first."""
    found, parents = [], {}
    for path in filter(lambda path: path.name.isdigit(), Path("/proc").iterdir()):
        with suppress(OSError):
            stat = (path / "stat").read_text()
            parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
            if name.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))

    def is_below(number):
        return number == parent or (number in parents and is_below(parents[number]))

    return sorted(number for number in found if number != parent and is_below(number))
