"""What every result carries: the machine, versions, commit and arguments, written as JSON beside the printed table."""

import functools
import importlib.util
import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..lightforcing_core.files.output import prepare_folder, whole_file

ROOT = Path(__file__).resolve().parent.parent
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def facts(device: torch.device, settings: Any) -> dict[str, Any]:
    """Machine, versions, commit and arguments of a run, in JSON types. settings: a dataclass, nested ones flattened."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "machine": machine_class(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "commit": commit(),
        "arguments": _flat(asdict(settings)) | {"device": str(device)},
    }


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: str(value) if isinstance(value, Path) else value}
    return flat


def machine_class() -> str:
    """Cores, architecture and what matters to bfloat16, for instance "2-core x86_64 with AMX"."""
    flags = _cpu_flags()
    best = next((feature for feature in _FEATURES if feature in flags), None)
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return f"{os.cpu_count()}-core {platform.machine()}" + (f" with {names[best]}" if best else "")


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def commit() -> str:
    """The checked-out commit, with "+" behind it when files differ from it; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON; the file is whole or absent. OutputError when the place takes no files."""
    prepare_folder(path.parent)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
