"""Passes of one shape through a decoder's layers as a CUDA graph, recorded once in a clip.

A recording reads its input, the weights and the layers' past frames by address: the layers replace the past in place.
"""

import itertools
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fast_path import FastPath, one_line, recording
from ..pinned import why_not_resident

_log = logging.getLogger(__name__)


def places_of(tree: nn.Module, device: torch.device) -> Hashable | None:
    """The addresses of a module tree's weights, or None if they may move."""
    if why_not_resident(tree, device) is not None:
        return None
    return tuple(tensor.data_ptr() for tensor in itertools.chain(tree.parameters(), tree.buffers()))


class PassGraph:
    """Runs a decoder's passes, as a graph from the second one of a shape on.

    recorder: with `record` of `CudaRecorder`.
    signature: equal as long as the weights lie where they lay; None if they may move, and nothing is recorded then.
    """

    def __init__(self, recorder: Any, signature: Callable[[], Hashable]) -> None:
        self._recorder, self._signature = recorder, signature
        self._of: tuple[Hashable, ...] | None = None
        self._recorded: tuple[Any, Tensor, Tensor] | None = None  # recording, input, output
        self.why_off: str | None = None

    def __call__(self, run: Callable[[Tensor], Tensor], z: Tensor, past: Mapping[Any, Tensor]) -> Tensor:
        """run(z) → pixels, which the next call overwrites. past: what `run` replaces in place."""
        weights = self._signature()
        if self.why_off or weights is None or self._of != (z.shape, z.dtype, weights):
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
        """Record the pass and launch it, then run it normally: the result, to which the launch is compared."""
        path, launched = FastPath("decode graph", z.device, z.dtype, detail=z.shape), None
        before: list[Tensor] = []

        def record() -> Tensor:
            before.extend(frames.clone() for frames in past.values())
            held = z.clone()
            with recording():
                graph, out = self._recorder.record(lambda: run(held))
            self._recorded = graph, held, out
            return self._launch(self._recorded, z).clone()

        try:
            launched = path.attempt(record, "decoding without it")
        except torch.OutOfMemoryError as error:  # a recording keeps the memory of a pass, which may still run
            self.why_off = one_line(error)
        for frames, kept in zip(past.values(), before, strict=False):
            frames.copy_(kept)
        out = run(z)
        # At most rounding may differ; the comparison is false for NaN.
        if launched is None or not (launched - out).float().norm() <= 0.02 * out.float().norm():
            self.free()
            self.why_off = self.why_off or path.failure or "a recorded pass gave another result than a normal one"
            _log.warning("[Light Forcing] decode is no longer recorded: %s", self.why_off)
        return out
