"""Time several arms interleaved in one process, so that a busy machine slows all of them equally."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Samples:
    """The seconds of one arm, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles and every sample, in JSON types."""
        return {"median": self.median, "quartiles": quartiles(self.seconds), "seconds": list(self.seconds)}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and third quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.75))]


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over rounds of every entry."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def ratio(slow: Samples, fast: Samples) -> dict[str, Any]:
    """The speed of the second arm relative to the first: median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"median": statistics.median(ratios), "quartiles": quartiles(ratios)}


def take_turns(arms: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device) -> dict[str, Samples]:
    """Time every arm `repeats` times by `warm_up_rule`. ValueError without repeats."""
    if repeats < 1:
        raise ValueError(f"repeats {repeats} is not positive; use 5 or more for meaningful quartiles")
    for arm in arms.values():
        for _ in range(WARM_UP):
            arm()
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            clock = StageClock(device)
            with clock.stage(name):
                arms[name]()
            seconds[name].append(clock.seconds()[name])
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


class StageClock:
    """Sum the time of named stages, by events on a GPU, which do not wait, and by the wall clock elsewhere.

    The time of a stage within another one counts for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._open = False
        if self._on_gpu:
            torch.cuda.synchronize(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of this block to `name`."""
        if self._open:
            yield
            return
        self._open = True
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((name, start, self._now()))
            self._open = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` as a stage."""

        def run(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **options)

        return run

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            spent = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            totals[name] = totals.get(name, 0.0) + spent
        return totals

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
