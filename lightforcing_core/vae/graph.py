"""Passes of one shape through a decoder's layers as a CUDA graph, if that was measured to be faster.

A recording reads its input, the weights and the layers' past frames by address: the layers replace the past in place.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..fast_path import FastPath, one_line, recording
from ..machine import choose
from ..pinned import Weights

WORK = "decode of {} in {}, keeping {} layers' {} values"
USUAL = "pass by pass"
TOLERANCE = 0.02  # largest difference between a launch and a normal pass: rounding, not another result
_log = logging.getLogger(__name__)


class PassGraph:
    """Runs a decoder's passes; of those of one shape and with the same weights, the second may be recorded.

    recorder: with `record` of `CudaRecorder`.
    weights: the decoder's, held by the caller.
    measuring: a context in which `machine` may measure; None records without a proof.
    """

    def __init__(
        self, recorder: Any, weights: Weights, measuring: Callable[[], AbstractContextManager[None]] | None
    ) -> None:
        self._recorder, self._weights, self._measuring = recorder, weights, measuring
        self._of: tuple[Hashable, ...] | None = None
        self._recorded: tuple[Any, Tensor, Tensor] | None = None  # recording, input, output
        self._is_off = False

    def __call__(self, run: Callable[[Tensor], Tensor], z: Tensor, past: Mapping[Any, Tensor]) -> Tensor:
        """run(z) → pixels, which the next call overwrites. past: what `run` replaces in place."""
        weights = None if self._is_off or not self._weights.are_ready() else self._weights.signature()
        if weights is None or self._of != (z.shape, z.dtype, weights):
            self.free()
            self._of = z.shape, z.dtype, weights
            return run(z)
        return self._first(run, z, past) if self._recorded is None else self._launch(self._recorded, z)

    def free(self) -> None:
        if self._recorded is not None:
            self._recorded[0].free()
        self._recorded = self._of = None

    @staticmethod
    def _launch(recorded: tuple[Any, Tensor, Tensor], z: Tensor) -> Tensor:
        graph, held, out = recorded
        held.copy_(z)
        graph.launch()
        return out

    def _first(self, run: Callable[[Tensor], Tensor], z: Tensor, past: Mapping[Any, Tensor]) -> Tensor:
        """Record the pass and launch it; run it normally if that fails or is not faster."""
        before: list[Tensor] = []

        def by(name: str) -> Tensor:
            for frames, kept in zip(past.values(), before, strict=False):
                frames.copy_(kept)
            if name == USUAL:
                return run(z)
            if self._recorded is None:
                held = z.clone()
                with recording():
                    graph, out = self._recorder.record(lambda: run(held))
                self._recorded = graph, held, out
            return self._launch(self._recorded, z).clone()

        out, name = None, "graph"
        try:
            before.extend(frames.clone() for frames in past.values())
            if self._measuring is not None:
                facts = "×".join(map(str, z.shape)), str(z.dtype), len(before), sum(map(Tensor.numel, before))
                with self._measuring():
                    name = choose(WORK, facts, z.device, (USUAL, name), by, incumbent=USUAL, tolerance=TOLERANCE)
            if name != USUAL:
                path = FastPath("decode graph", z.device, z.dtype, detail=z.shape)
                out = path.attempt(lambda: by(name), "decoding without it")
        except torch.OutOfMemoryError as error:  # a recording keeps the memory of a pass, which may still run
            _log.warning("[Light Forcing] decode is not recorded: %s", one_line(error))
        if out is None:
            self._is_off = True
            self.free()
            gc.collect()  # what the failed recording left in cycles may be all the memory that is missing
            out = by(USUAL)
        return out
