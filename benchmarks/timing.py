"""Time several arms interleaved, so that a busy machine slows all equally."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
            seconds[name].append(_seconds(arms[name], device))
    return seconds


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of one call, by events on a GPU and by the wall clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun.record()
        run()
        ended.record()
        ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3
