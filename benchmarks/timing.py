"""The facts of the machine, and the time of several arms that take turns, so that a busy machine slows all equally."""

import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..lightforcing_core import machine, profile
from ..lightforcing_core.fast_path import one_line
from .console import Put

WARM_UP = 3  # runs; the last of them record graphs


def describe(put: Put, device: torch.device, bench: str, settings: Any) -> None:
    """Put the facts of the machine, and the settings of a measurement."""
    for name, fact in facts(device).items():
        put("facts", name, fact)
    put("arguments", bench, asdict(settings))


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, in JSON types."""
    found = profile.machine_of(device)[1] | {"system": platform.system(), "python": platform.python_version()}
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        sizes = "total_memory", "multi_processor_count", "shared_memory_per_multiprocessor", "L2_cache_size"
        found |= {name: getattr(chip, name) for name in sizes}
        found |= {"cuda": torch.version.cuda, "free_memory": torch.cuda.mem_get_info(device)[0]}
        found["allocator"] = torch.cuda.get_allocator_backend()
    return found | {"commit": _commit()}


def _commit() -> str:
    """The checked-out commit, with "+" after it if tracked files differ from it; "unknown" outside a checkout."""
    folder = str(Path(__file__).parent)
    command = ("git", "-C", folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def take_turns(
    arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, put: Put, *, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """The milliseconds of every arm that runs here, in each of `repeats` rounds; puts why others do not run.

    Every arm runs `warm_up` times untimed, then once in each round, the first arm of a round rotating.
    """
    taken: dict[str, list[float]] = {}
    for name, arm in arms.items():
        try:
            for _ in range(warm_up):
                machine.seconds_of(arm, device)
            taken[name] = []
        except (ImportError, RuntimeError) as error:
            put("not here", name, one_line(error))
    names = list(taken)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(1e3 * machine.seconds_of(arms[name], device))
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.quantile(values, (0.25, 0.5, 0.75)).tolist(), strict=True))


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast the second arm is as the first, from the rounds' ratios."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
