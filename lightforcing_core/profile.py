"""The profile of this machine: what was measured here, in one sqlite3 file that all later processes read.

A row is about one candidate of one choice, on one card or CPU with one driver, torch, Triton and version of the pack.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = "machine.sqlite3"
TRYING, VERIFIED, ENABLED, QUARANTINED = "trying", "verified", "enabled", "quarantined"
SCHEMA = """CREATE TABLE IF NOT EXISTS proofs
    (machine, choice, candidate, state, because, gain, PRIMARY KEY (machine, choice, candidate))"""


class ProfileError(OSError):
    """The profile cannot be read or written; the message says why and what to do."""


class Row(NamedTuple):
    """What is known about a candidate.

    gain: the incumbent's time divided by its own, 0 if it was not timed. Of a candidate that is being tried the time
    at which that began, and because is "again" if the process that tried it before did not come to an end.
    """

    state: str
    because: str = ""
    gain: float = 0.0


def rows(device: torch.device, choice: str | None = None) -> dict[str, dict[str, Row]]:
    """What is known about each candidate of one choice, or of all: {choice: {candidate: row}}."""
    query = (
        "SELECT choice, candidate, state, because, gain FROM proofs WHERE machine = ? AND choice = coalesce(?, choice)"
    )
    found: dict[str, dict[str, Row]] = {}
    with _transaction() as database:
        for title, candidate, *row in database.execute(query, (machine_of(device)[0], choice)):
            found.setdefault(title, {})[candidate] = Row(*row)
    return found


def keep(device: torch.device, choice: str, candidate: str, row: Row | None) -> None:
    """Replace what is known about a candidate; with None it is unknown again. It is on disk when this returns."""
    place = machine_of(device)[0], choice, candidate
    with _transaction() as database:
        database.execute("DELETE FROM proofs WHERE machine = ? AND choice = ? AND candidate = ?", place)
        if row is not None:
            database.execute(
                "INSERT INTO proofs (machine, choice, candidate, state, because, gain) VALUES (?, ?, ?, ?, ?, ?)",
                (*place, *row),
            )


def folder() -> Path:
    """$LIGHTFORCING_CACHE_DIR or the platform's cache folder."""
    if chosen := os.environ.get("LIGHTFORCING_CACHE_DIR"):
        return Path(chosen)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightforcing"


@contextmanager
def _transaction() -> Iterator[sqlite3.Connection]:
    """The open file; what is done in it is kept if nothing raises."""
    path = folder() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A write takes its lock at once, because sqlite gives up a read that becomes a write while another waits.
        connection = sqlite3.connect(path, timeout=10.0, isolation_level="IMMEDIATE")
        with closing(connection) as database, database:
            database.execute(SCHEMA)
            yield database
    except (OSError, sqlite3.Error) as error:
        remedy = "end the process that holds it" if "locked" in str(error) else "delete it or make it writable"
        raise ProfileError(f"{path} cannot be used ({error}); {remedy}") from error


@functools.cache
def machine_of(device: torch.device) -> tuple[str, dict[str, Any]]:
    """What every measurement depends on, as a short text and as facts."""
    facts: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        driver = torch.version.hip or _nvidia_driver()
        facts |= {"name": chip.name, "capability": [chip.major, chip.minor], "driver": driver}
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        facts |= {"name": kind, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["triton"] = None
    with suppress(ImportError, OSError, RuntimeError):  # its distribution has other names too
        facts["triton"] = getattr(importlib.import_module("triton"), "__version__", None)
    for package in ("flash-attn", "flash-attn-4", "flashinfer-python", "sageattention", "xformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    code = hashlib.sha256()  # of the pack
    for source in (Path(__file__).parent, Path(__file__).parents[1] / "kernels"):
        for path in sorted(source.rglob("*.py")):
            code.update(path.read_bytes())
    facts["code"] = code.hexdigest()[:16]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16], facts


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, or the newest CUDA that it can run where its tool is missing."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {newest()}" if newest else None
