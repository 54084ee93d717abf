"""Where the KV cache's keys and values lie: in the model's dtype or in eight bits, on the device or in host memory.

In host memory only two layers are on the device at a time: the one that is read, and the next one, which is copied
beside the computation on a stream of its own. Host memory is pinned, so copies run at the bus's full speed.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.blocks import FrameBlocks
from ..attention.quantised import STORED, KVDtype, quantise_blocks
from ..pinned import HostMemory, bytes_of


@dataclass(frozen=True)
class KVOptions:
    """How keys and values are kept. Raises ValueError for an unknown dtype.

    dtype: "same" as the model computes in, "int8" or "fp8" (half the memory, one scale per block and head).
    host: in pinned host memory, one layer copied ahead; the device holds two layers instead of all.
    """

    dtype: KVDtype = "same"
    host: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("same", *STORED):
            raise ValueError(f"KV cache dtype {self.dtype!r} is not known; use one of same, {', '.join(STORED)}")

    def __str__(self) -> str:
        """What an artist reads: "8-bit KV cache (int8) in host memory"."""
        kind = "KV cache" if self.dtype == "same" else f"8-bit KV cache ({self.dtype})"
        return f"{kind} in host memory" if self.host else kind


class KeysValues(NamedTuple):
    """One layer's keys and values [B, L, H, D], and for 8-bit ones the scales of both, float32 [B, blocks, H]."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def first(self, slots: int, layout: FrameBlocks) -> "KeysValues":
        """A view of the first `slots` frames."""
        tokens, blocks = slots * layout.tokens_per_frame, slots * layout.per_frame
        scales = None if self.scales is None else (self.scales[0][:, :blocks], self.scales[1][:, :blocks])
        return KeysValues(self.k[:, :tokens], self.v[:, :tokens], scales)

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [self.k, self.v, *(self.scales or ())]

    def write(self, runs: Sequence[tuple[int, int, int]], k: Tensor, v: Tensor, layout: FrameBlocks) -> None:
        """Copy frames into slots; runs are (slot, frame of k and v, how many), k and v [B, frames · tokens, H, D]."""
        self.write_keys(runs, k, layout)
        _write(self.v, v, self.scales and self.scales[1], runs, layout)

    def write_keys(self, runs: Sequence[tuple[int, int, int]], k: Tensor, layout: FrameBlocks) -> None:
        """Like `write`, for keys whose values stay."""
        _write(self.k, k, self.scales and self.scales[0], runs, layout)


def _keys_values(tensors: list[Tensor]) -> KeysValues:
    """From keys, values and, in eight bits, the scales of both."""
    k, v, *scales = tensors
    return KeysValues(k, v, (scales[0], scales[1]) if scales else None)


def _write(target: Tensor, x: Tensor, scales: Tensor | None, runs: Sequence[tuple[int, int, int]], layout: FrameBlocks):
    if scales is not None:
        x, new_scales = quantise_blocks(x, layout, target.dtype)
        copy_frames(scales, new_scales, runs, layout.per_frame)
    copy_frames(target, x, runs, layout.tokens_per_frame)


def copy_frames(target: Tensor, source: Tensor, runs: Sequence[tuple[int, int, int]], rows: int) -> None:
    """Copy frames of `rows` rows into slots of the same; runs are (slot, frame, how many)."""
    for slot, frame, many in runs:
        target[:, slot * rows : (slot + many) * rows].copy_(source[:, frame * rows : (frame + many) * rows])


class KVStorage:
    """Keys and values of all layers, every slot of them allocated at construction.

    Sizes as in `KVCache`. `visible` is how many slots, from the first on, hold anything: the rest is not copied.
    """

    def __init__(
        self,
        options: KVOptions,
        layout: FrameBlocks,
        *,
        layers: int,
        batch: int,
        slots: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.layout, self.visible = layout, 0
        stored = STORED.get(options.dtype, dtype)
        shapes: list[tuple[tuple[int, ...], torch.dtype]]
        shapes = [((batch, slots * layout.tokens_per_frame, heads, head_dim), stored)] * 2
        if stored is not dtype:
            shapes += [((batch, slots * layout.per_frame, heads), torch.float32)] * 2

        def allocate() -> KeysValues:
            return _keys_values([torch.empty(shape, dtype=kind, device=device) for shape, kind in shapes])

        self._host: HostMemory | None = None
        if not options.host:
            self._layers, self._stage = [allocate() for _ in range(layers)], []
            return
        self._stage = [allocate() for _ in range(min(2, layers))]
        self._device = self._stage[0].k.device
        cuda = self._device.type == "cuda"
        self._copier = torch.cuda.Stream(self._device) if cuda else None
        nbytes = layers * bytes_of(shapes)
        if self._copier is not None:
            self._host = HostMemory(nbytes, gpu=self._device, wait=self._copier.synchronize)
        else:
            self._host = HostMemory(nbytes, device=self._device)
        self._layers = [_keys_values([self._host.take(*shape) for shape in shapes]) for _ in range(layers)]
        self._held: list[int | None] = [None] * len(self._stage)  # the layer that each staging buffer holds
        self._ready: list[torch.cuda.Event | None] = [None] * len(self._stage)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device that computes."""
        return sum(tensor.nbytes for layer in self._stage or self._layers for tensor in layer.tensors())

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer.tensors()) if self._stage else 0

    def at(self, layer: int) -> KeysValues:
        """All slots of one layer, on the device, to read and to write; valid until the next but one layer is asked."""
        if not self._stage:
            return self._layers[layer]
        buffer = layer % len(self._stage)
        if self._held[buffer] != layer:
            self._bring(layer)
        if ready := self._ready[buffer]:
            torch.cuda.current_stream(self._device).wait_event(ready)
        following = (layer + 1) % len(self._layers)
        if self._held[following % len(self._stage)] != following and following % len(self._stage) != buffer:
            self._bring(following)
        return self._stage[buffer]

    def written(self, layer: int, slots: Sequence[tuple[int, int]]) -> None:
        """These (first slot, how many) of `layer` have been written: in host memory they are copied back."""
        if not self._stage:
            return
        source, target = self._stage[layer % len(self._stage)], self._layers[layer]
        with self._copying():
            for first, many in slots:
                self._copy(source, target, first, many)
        if self._copier is not None and len(self._layers) <= len(self._stage):
            # A layer that never leaves its buffer is written again without being brought again.
            self._ready[layer % len(self._stage)] = self._copier.record_event()

    def free(self) -> None:
        """Let go of all memory."""
        self._layers.clear()
        if self._host is not None:
            if self._copier is not None:
                self._copier.synchronize()  # copies under way, pinned or not, use memory that is given away
            self._host.free()
        self._stage.clear()

    def _bring(self, layer: int) -> None:
        """Copy the visible slots of `layer` into its staging buffer, beside whatever the device does."""
        buffer = layer % len(self._stage)
        with self._copying():
            self._copy(self._layers[layer], self._stage[buffer], 0, self.visible)
        if self._copier is not None:
            self._ready[buffer] = self._copier.record_event()
        self._held[buffer] = layer

    @contextlib.contextmanager
    def _copying(self):
        """Copies inside run on the copying stream, behind all that the device was told so far."""
        if self._copier is None:
            yield
            return
        self._copier.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copier):
            yield

    def _copy(self, source: KeysValues, target: KeysValues, first: int, many: int) -> None:
        """Copy slots, sample by sample: only pieces that are contiguous on both sides are copied without a detour."""
        tokens, blocks = self.layout.tokens_per_frame, self.layout.per_frame
        for a, b in zip(source.tensors(), target.tensors(), strict=True):
            rows = tokens if a.ndim == 4 else blocks
            part = slice(first * rows, (first + many) * rows)
            for from_sample, to_sample in zip(a, b, strict=True):
                to_sample[part].copy_(from_sample[part], non_blocking=True)
