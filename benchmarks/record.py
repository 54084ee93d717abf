"""The facts of every record: machine, versions, commit and arguments."""

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


def facts(device: torch.device, settings: Any = None) -> dict[str, Any]:
    """Machine, versions, commit and arguments of a run, in JSON types. settings: a dataclass, which is flattened."""
    gpu, amx = None, " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        gpu = {"name": chip.name, "memory_bytes": chip.total_memory, "cuda": torch.version.cuda}
        gpu |= {"capability": f"sm_{chip.major}{chip.minor}", "multiprocessors": chip.multi_processor_count}
        gpu |= {"shared_bytes": chip.shared_memory_per_multiprocessor, "l2_bytes": chip.L2_cache_size}
        gpu |= {"free_bytes": torch.cuda.mem_get_info(device)[0], "allocator": torch.cuda.get_allocator_backend()}
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}{amx}",
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "commit": commit(),
        "arguments": (_flat(asdict(settings)) if settings else {}) | {"device": str(device)},
    }


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def commit() -> str:
    """The checked-out commit, with "+" after it if tracked files differ from it; "unknown" outside a checkout."""
    command = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON; the file is complete or absent. OutputError if it cannot be written."""
    prepare_folder(path.parent)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
