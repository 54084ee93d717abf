"""Memory of the KV cache: keys, values and means, in 8 bits or in CPU memory.

With keys and values in CPU memory the device holds the layer in use and the next one, which is copied meanwhile.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...kernels.layer_memory import LayerMemory
from ..attention.blocks import FrameBlocks
from ..attention.options import Pools
from ..attention.policies import RollingSink
from ..attention.quantised import STORED, KVDtype, quantise_blocks
from ..attention.selection import sub_block_layout
from ..families import SinkRope
from ..pinned import CpuMemory, bytes_of

# (first slot, first frame of the source, number of frames) of frames that are neighbours in both.
Runs = Sequence[tuple[int, int, int]]
KEY_MEANS = Pools(keys=True)


@dataclass(frozen=True)
class KVOptions:
    """How keys and values are kept. Raises ValueError for an unknown dtype.

    dtype: "same" as the model computes in, "int8" or "fp8" (half the memory, one scale per block and head).
    host: in pinned CPU memory, one layer copied ahead; the device holds two layers instead of all.
    key_mean: in 8 bits keep keys less their mean over the first chunk; runs that version 0.2 saved do not.
    """

    dtype: KVDtype = "same"
    host: bool = False
    key_mean: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("same", *STORED):
            raise ValueError(f"KV cache dtype {self.dtype!r} is not known; use one of same, {', '.join(STORED)}")

    def __str__(self) -> str:
        """A short description for reports: "8-bit KV cache (int8) in CPU memory"."""
        kind = "KV cache" if self.dtype == "same" else f"8-bit KV cache ({self.dtype})"
        return f"{kind} in CPU memory" if self.host else kind


@dataclass(frozen=True)
class CacheShape:
    """The sizes of a run's KV cache.

    slots: latent frames that a chunk can see, sinks and itself included. grid: rows and columns of tokens in a frame.
    sink_rope: see `Family`.
    rolling: brings first frames back, its number of anchors fitted.
    anchors: first frames that a `JointCache` reads.
    pool: further slots, behind the others, for blocks that have left the window, see `block_pool`.
    pools: the means to keep; a run that never selects blocks needs none.
    dtype: the model's, in which means are kept.
    """

    layers: int
    batch: int
    slots: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    block_k: int = 64
    sink_frames: int = 0
    sink_rope: SinkRope = "fixed"
    rolling: RollingSink | None = None
    anchors: int = 0
    pool: int = 0
    pools: Pools = KEY_MEANS
    dtype: torch.dtype = torch.float32

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def all_slots(self) -> int:
        """Slots in memory."""
        return self.slots + self.pool

    @property
    def originals(self) -> int:
        """First frames whose keys, and values if they come back or change, are also kept as first stored."""
        following = 0 if self.sink_rope == "fixed" else self.sink_frames
        return self.rolling.anchors if self.rolling else self.anchors or following

    @property
    def history(self) -> int:
        """Last frames whose keys and values are kept for single tokens of them."""
        return self.slots if self.rolling and self.rolling.memory else 0

    @property
    def averages(self) -> bool:
        """Whether frames that leave the window change the sinks."""
        return self.sink_rope.startswith("average")

    @property
    def first_frames(self) -> int:
        """Frames at the start of the video that later chunks may see however long it is."""
        return max(self.sink_frames, self.originals)

    @property
    def layout(self) -> FrameBlocks:
        return FrameBlocks(self.tokens_per_frame, self.block_k)

    @property
    def memory_layout(self) -> FrameBlocks:
        """The layout of stored keys and values."""
        return replace(self.layout, padded=self.pools.padded)

    def rows(self, per_slot: int) -> tuple[int, int, int, int]:
        """The shape of a tensor with `per_slot` head vectors per slot."""
        return self.batch, self.all_slots * per_slot, self.heads, self.head_dim


def copy_frames(target: Tensor, source: Tensor, runs: Runs, rows: int, rows_per_slot: int | None = None) -> None:
    """Copy frames of `rows` rows each from `source` into slots of `target`, which may have more rows."""
    slots = target.unflatten(1, (-1, rows_per_slot or rows))
    for slot, frame, many in runs:
        part = source[:, frame * rows : (frame + many) * rows].unflatten(1, (many, rows))
        slots[:, slot : slot + many, :rows].copy_(part)


def write_tokens(
    target: Tensor, scales: Tensor | None, x: Tensor, runs: Runs, layout: FrameBlocks, mean: Tensor | None = None
) -> None:
    """Copy the frames of x [B, frames · tokens, H, D] into slots of keys or values, in 8 bits if these have scales.

    target: [B, slots · tokens, H, D]; scales: [B, slots · blocks, H]; mean: subtracted from x, float32 [B, H, D].
    """
    if scales is not None:
        x = x if mean is None else x - mean[:, None]
        x, new_scales = quantise_blocks(x, layout, target.dtype)
        copy_frames(scales, new_scales, runs, layout.per_frame)
    copy_frames(target, x, runs, layout.tokens_per_frame, layout.rows_per_frame)


class KVStorage:
    """The tensors of all layers, allocated at construction.

    visible: the number of slots, from the first on, that are in use; only these are copied.
    originals: of each layer first frames' keys and, if they come back or change, values: [frames, B, tokens, H, D];
        behind them the history's, frame n at n modulo their number.
        Copies into CPU memory run before those of `written`, for which `free` waits.
    layout, dtype: of keys and values. keeps_mean: keys are kept less a mean.
    """

    def __init__(self, shape: CacheShape, options: KVOptions, device: torch.device | str | None) -> None:
        self.visible = 0
        self.layout = layout = shape.memory_layout
        self.dtype = STORED.get(options.dtype, shape.dtype)
        sizes: list[tuple[tuple[int, ...], torch.dtype]] = [(shape.rows(layout.rows_per_frame), self.dtype)] * 2
        if self.dtype is not shape.dtype:
            sizes += [(shape.rows(layout.per_frame)[:3], torch.float32)] * 2

        kept = shape.originals + shape.history, shape.batch, shape.tokens_per_frame, shape.heads, shape.head_dim
        kind = torch.promote_types(shape.dtype, torch.float32) if shape.sink_rope == "average_float32" else shape.dtype
        has_values = shape.rolling or shape.anchors or shape.averages
        originals = [(kept, kind)] * (2 if has_values else 1) if shape.originals else []
        empty = torch.zeros if shape.pools.padded else torch.empty  # nothing writes to the padding

        def on_device() -> LayerMemory:
            return LayerMemory(*(empty(size, dtype=dtype, device=device) for size, dtype in sizes))

        self._host: CpuMemory | None = None
        self._stage: list[LayerMemory] = []
        if not options.host:
            layers = [on_device() for _ in range(shape.layers)]
            take: Callable[..., Tensor] = partial(torch.empty, device=device)
        else:
            self._stage = [on_device() for _ in range(min(2, shape.layers))]
            self._device = self._stage[0].keys.device
            self._copier = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            nbytes = shape.layers * bytes_of([*sizes, *originals])
            if self._copier is not None:
                self._host = CpuMemory(nbytes, gpu=self._device, wait=self._copier.synchronize)
            else:
                self._host = CpuMemory(nbytes, device=self._device)
            take = self._host.take
            layers = [LayerMemory(*(take(size, dtype=dtype) for size, dtype in sizes)) for _ in range(shape.layers)]
            if shape.pools.padded:
                for layer in layers:
                    layer.keys.zero_(), layer.values.zero_()
            self._held: list[int | None] = [None] * len(self._stage)  # the layer that each staging buffer holds
            self._ready: list[torch.cuda.Event | None] = [None] * len(self._stage)
        self.originals = [[take(size, dtype=dtype) for size, dtype in originals] for _ in layers]
        self._layers = _with_means(layers, shape, device)
        self.keeps_mean = options.key_mean and layers[0].scales is not None
        if self.keeps_mean:
            size = shape.layers, shape.batch, shape.heads, shape.head_dim
            means = torch.zeros(size, dtype=torch.float32, device=device)
            self._layers = [one._replace(key_mean=mean) for one, mean in zip(self._layers, means, strict=True)]

    @property
    def device_bytes(self) -> int:
        """Bytes on the computing device, without the counters of a fused kernel."""
        means = sum(_bytes(layer.means) for layer in self._layers)
        stored = sum(_bytes(layer.stored) for layer in self._stage or self._layers)
        return means + stored + (0 if self._stage else sum(map(_bytes, self.originals)))

    @property
    def host_bytes(self) -> int:
        if not self._stage:
            return 0
        return sum(map(_bytes, (*self.originals, *(layer.stored for layer in self._layers))))

    def at(self, layer: int) -> LayerMemory:
        """All slots of one layer, on the device, to read and to write.

        Keys and values in CPU memory stay valid until this is called for the layer after the next.
        """
        memory = self._layers[layer % len(self._layers)]  # all layers share those of a `JointCache`
        if not self._stage:
            return memory
        buffer = layer % len(self._stage)
        if self._held[buffer] != layer:
            self._bring(layer)
        if ready := self._ready[buffer]:
            torch.cuda.current_stream(self._device).wait_event(ready)
        following = (layer + 1) % len(self._layers)
        if self._held[following % len(self._stage)] != following and following % len(self._stage) != buffer:
            self._bring(following)
        keys, values, key_scales, value_scales, *_ = self._stage[buffer]
        return memory._replace(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)

    def written(self, layer: int, slots: Sequence[tuple[int, int]]) -> None:
        """Copy written (first slot, how many) of `layer` to CPU memory, if kept there."""
        if not self._stage:
            return
        source, target = self._stage[layer % len(self._stage)], self._layers[layer]
        with self._copying():
            for first, many in slots:
                self._copy(source, target, first, many)
        if self._copier is not None and len(self._layers) <= len(self._stage):
            # A layer that is still in its buffer is written again without another copy.
            self._ready[layer % len(self._stage)] = self._copier.record_event()

    def free(self) -> None:
        self._layers.clear()
        self.originals.clear()
        if self._host is not None:
            if self._copier is not None:
                self._copier.synchronize()  # unfinished copies use memory that is about to be freed
            self._host.free()
        self._stage.clear()

    def _bring(self, layer: int) -> None:
        """Copy the visible slots of `layer` into its buffer while the device computes."""
        buffer = layer % len(self._stage)
        with self._copying():
            self._copy(self._layers[layer], self._stage[buffer], 0, self.visible)
        if self._copier is not None:
            self._ready[buffer] = self._copier.record_event()
        self._held[buffer] = layer

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Run copies on the copying stream, after all work queued on the device so far."""
        if self._copier is None:
            yield
            return
        self._copier.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copier):
            yield

    def _copy(self, source: LayerMemory, target: LayerMemory, first: int, many: int) -> None:
        """Copy slots sample by sample, because contiguous pieces are copied directly."""
        tokens, blocks = self.layout.rows_per_frame, self.layout.per_frame
        for a, b in zip(source.stored, target.stored, strict=True):
            rows = tokens if a.ndim == 4 else blocks
            part = slice(first * rows, (first + many) * rows)
            for from_sample, to_sample in zip(a, b, strict=True):
                to_sample[part].copy_(from_sample[part], non_blocking=True)


def _with_means(layers: list[LayerMemory], shape: CacheShape, device: torch.device | str | None) -> list[LayerMemory]:
    """The same layers with memory for the means that `shape` asks for."""
    if not shape.pools.keys:
        return layers

    def means(per_slot: int) -> Tensor:  # zeros, because a kernel may multiply those of unused slots by zero
        return torch.zeros(shape.rows(per_slot), dtype=shape.dtype, device=device)

    # One counter serves all layers, because their launches follow one another.
    arrivals = torch.zeros(shape.rows(1)[:3], dtype=torch.int32, device=device)
    return [
        layer._replace(
            key_means=means(shape.layout.per_frame),
            frame_means=means(1),
            arrivals=arrivals,
            value_means=means(shape.layout.per_frame) if shape.pools.values else None,
            sub_means=means(sub_block_layout(shape.layout).per_frame) if shape.pools.parts else None,
        )
        for layer in layers
    ]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
