"""The rollout's key/value memory: a ring of latent-frame slots with sinks, and the pooled keys that belong to them.

Evicting a frame is renaming its slot: nothing is shifted, cloned or concatenated, and all bookkeeping is Python
ints, so nothing waits on the device. Keys are stored roped at their global frame index; attention depends only on
differences, so the moving window is never roped again. Only sinks that follow the window are rotated, once per
chunk and always from their first value, so no rounding piles up.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..attention.blocks import FrameBlocks
from ..attention.quantised import STORED, KVDtype
from ..attention.selection import sub_block_layout
from ..families import SinkRope
from .kv_storage import KeysValues, KVOptions, KVStorage, copy_frames
from .rope import RopeTable


def kv_bytes(
    layers: int,
    batch: int,
    frames: int,
    tokens_per_frame: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    kv_dtype: KVDtype = "same",
    block_k: int = 64,
) -> int:
    """Bytes of keys and values of `frames` latent frames over all layers, pooled keys not counted.

    2 · layers · batch · frames · heads · (tokens · head_dim · bytes per element), and in eight bits 4 bytes of scale
    per block and head besides.
    """
    per_head = tokens_per_frame * head_dim * STORED.get(kv_dtype, dtype).itemsize
    if kv_dtype != "same":
        per_head += FrameBlocks(tokens_per_frame, block_k).per_frame * torch.float32.itemsize
    return 2 * layers * batch * frames * heads * per_head


def slots_and_sinks(
    frames: int, window: int | None, sink_frames: int, sink_rope: SinkRope
) -> tuple[int, int, SinkRope]:
    """Slots, sink frames and sink rope of the cache that a video of `frames` latent frames needs.

    A window that holds the whole video (None: always) never moves, so its sinks have nothing to follow.
    """
    slots = frames if window is None else min(window, frames)
    return slots, min(sink_frames, slots - 1), sink_rope if slots < frames else "fixed"


class KVCache:
    """Keys, values and pooled keys of every layer for the frames that the current chunk may see.

    `slots` counts latent frames, sinks and the current chunk included: the window, or the whole clip. Memory is
    allocated here, all of it. A chunk is opened, stored once per layer in each pass (later passes overwrite) and
    committed after its clean pass; opening the next one evicts the oldest frames that are not sinks.

    `sink_rope`: "fixed" leaves sink keys at their first positions, "follow" keeps them directly before the window.
    `options`: how keys and values are kept; pooled keys are always in `dtype`, on the device.
    `pooled`: keep block and frame means; a run that never selects blocks needs none. `value_means`: block means of
    the values too, for a pooled tail. `sub_blocks`: means of a block's parts, for the estimator "lse".
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        slots: int,
        tokens_per_frame: int,
        heads: int,
        head_dim: int,
        block_k: int = 64,
        sink_frames: int = 0,
        sink_rope: SinkRope = "fixed",
        options: KVOptions | None = None,
        pooled: bool = True,
        value_means: bool = False,
        sub_blocks: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= sink_frames < slots:
            raise ValueError(f"sink_frames {sink_frames} must be 0 or more and fewer than the window of {slots} frames")
        self.layout = FrameBlocks(tokens_per_frame, block_k)
        self.slots, self.sink_frames, self.sink_rope = slots, sink_frames, sink_rope
        self.layers, self.head_dim = layers, head_dim
        self._dtype, self._device = dtype, device
        self.storage = KVStorage(
            options or KVOptions(),
            self.layout,
            layers=layers,
            batch=batch,
            slots=slots,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )

        def allocate(rows: int) -> list[Tensor]:
            return [torch.empty(batch, rows, heads, head_dim, dtype=dtype, device=device) for _ in range(layers)]

        self._sub_layout = sub_block_layout(self.layout) if sub_blocks else self.layout
        wanted = {"blocks": pooled, "frames": pooled, "values": pooled and value_means, "subs": pooled and sub_blocks}
        self._rows = {
            "blocks": self.layout.per_frame,
            "frames": 1,
            "values": self.layout.per_frame,
            "subs": self._sub_layout.per_frame,
        }
        self._means = {name: allocate(slots * self._rows[name]) for name, kept in wanted.items() if kept}
        # How many blocks of each frame and head a fused store has pooled: 0 before and after every launch.
        self._arrivals = torch.zeros(batch, slots, heads, dtype=torch.int32, device=device) if pooled else None
        self._slot_index = torch.zeros(slots, dtype=torch.int32, device=device)
        self._sink_keys: list[Tensor] = []
        if sink_rope == "follow" and sink_frames:
            self._sink_keys = allocate(sink_frames * tokens_per_frame)
        self.slot_frames: list[int] = []  # global latent-frame index held by each used slot, in memory order
        self._current: list[int] = []  # slots of the open or last chunk, in time order
        self._committed = True
        self._next_frame = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the computing device, pooled keys and sink originals included, bookkeeping not."""
        tensors = [*self._sink_keys, *(tensor for tensors in self._means.values() for tensor in tensors)]
        return self.storage.device_bytes + sum(tensor.nbytes for tensor in tensors)

    @property
    def current_frames(self) -> list[int]:
        """Global indices of the current chunk's frames."""
        return [self.slot_frames[slot] for slot in self._current]

    def open(self, frames: int) -> None:
        """Make room for the next `frames` latent frames, evicting the oldest that are not sinks.

        ValueError when sinks and chunk do not fit together; RuntimeError when the last chunk is not committed.
        """
        self._require_committed()
        sinks = min(self.sink_frames, self._next_frame)
        if sinks + frames > self.slots:
            raise ValueError(
                f"{sinks} sink frames and a chunk of {frames} do not fit into a window of {self.slots} latent frames; "
                f"use a window of at least {sinks + frames}"
            )
        free = list(range(len(self.slot_frames), min(len(self.slot_frames) + frames, self.slots)))
        self._current = sorted(self._movable_slots()[: frames - len(free)] + free)
        self.slot_frames += [-1] * len(free)
        for slot in self._current:
            self.slot_frames[slot] = self._next_frame
            self._next_frame += 1
        self._committed = False
        self.storage.visible = len(self.slot_frames)
        self._tell_slots()
        self._move_sinks()

    def reopen(self) -> None:
        """Open every visible frame that is no sink once more, so that one pass can recompute them all."""
        self._require_committed()
        self._current = self._movable_slots()
        self._committed = not self._current
        self._tell_slots()

    def skip(self, frames: int) -> None:
        """Pass over `frames` latent frames without storing them, and forget all that came before but the sinks."""
        self._require_committed()
        if self._next_frame < self.sink_frames:
            raise ValueError(f"frame {self._next_frame} is one of {self.sink_frames} sinks and cannot be passed over")
        self._next_frame += frames
        del self.slot_frames[self.sink_frames :]  # sinks were written first, so they hold the first slots
        self.storage.visible = len(self.slot_frames)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the open chunk's keys (roped) and values of one layer, [B, L, H, D], and pool them."""
        runs = self.runs()
        self.storage.at(layer).write(runs, k, v, self.layout)
        self.written(layer)
        self._pool(layer, runs, k, v)
        if self._sink_keys:
            self._copy_sinks(layer, k)

    def ring(self, layer: int) -> dict[str, Tensor | None] | None:
        """One layer's whole tensors by their names in `kernels.store.Ring`, for a kernel that stores by itself.

        None where `store` must be called, because the open chunk holds sinks whose original keys are kept. The kernel
        writes to `current_slots`; call `written` behind it.
        """
        if self._committed:
            raise RuntimeError("no chunk is open; call open() before ring()")
        if self._sink_keys and any(frame < self.sink_frames for frame in self.current_frames):
            return None
        k, v, scales = self.storage.at(layer)
        means = {name: tensors[layer] for name, tensors in self._means.items()}
        return {
            "keys": k,
            "values": v,
            "key_scales": scales[0] if scales else None,
            "value_scales": scales[1] if scales else None,
            "key_means": means.get("blocks"),
            "frame_means": means.get("frames"),
            "arrivals": self._arrivals,
            "value_means": means.get("values"),
            "sub_means": means.get("subs"),
        }

    def current_slots(self) -> Tensor:
        """The slots of the open chunk's frames on the device, in time order: int32 [frames]."""
        return self._slot_index[: len(self._current)]

    def written(self, layer: int) -> None:
        """The open chunk's slots of `layer` have been written by a kernel."""
        self.storage.written(layer, [(slot, many) for slot, _, many in self.runs()])

    def commit(self) -> None:
        """The open chunk's last stored keys and values are its clean ones: keep them as history."""
        self._committed = True

    def free(self) -> None:
        """Let go of all memory; the cache is of no use afterwards."""
        self.storage.free()
        self._means.clear()
        self._sink_keys.clear()
        self._arrivals = None

    def kv(self, layer: int) -> KeysValues:
        """Visible keys and values in memory order, views of [B, visible frames · tokens_per_frame, H, D]."""
        return self.storage.at(layer).first(len(self.slot_frames), self.layout)

    def block_means(self, layer: int) -> Tensor:
        """Means of the visible key blocks: [B, visible frames · blocks per frame, H, D], a view."""
        return self._visible("blocks", layer)

    def frame_means(self, layer: int) -> Tensor:
        """Means of the visible frames' keys: [B, visible frames, H, D], a view."""
        return self._visible("frames", layer)

    def value_means(self, layer: int) -> Tensor:
        """Means of the visible value blocks, like `block_means`."""
        return self._visible("values", layer)

    def sub_means(self, layer: int) -> Tensor:
        """Means of the parts of the visible key blocks: [B, visible frames · parts per frame, H, D], a view."""
        return self._visible("subs", layer)

    def runs(self) -> list[tuple[int, int, int]]:
        """The open chunk's slots as (first slot, first frame of the chunk, how many) runs of neighbours in time order.

        RuntimeError when no chunk is open.
        """
        if self._committed:
            raise RuntimeError("no chunk is open; call open() before store()")
        runs: list[tuple[int, int, int]] = []
        for frame, slot in enumerate(self._current):
            if runs and slot == runs[-1][0] + runs[-1][2]:
                first, start, many = runs.pop()
                runs.append((first, start, many + 1))
            else:
                runs.append((slot, frame, 1))
        return runs

    def sink_shift(self) -> int:
        """Latent frames by which sinks that follow stand later than where they were made."""
        movable = self._movable_slots()
        return self.slot_frames[movable[0]] - self.sink_frames if self._sink_keys and movable else 0

    def _require_committed(self) -> None:
        if not self._committed:
            raise RuntimeError(f"the chunk of frames {self.current_frames} is not committed yet; run its clean pass")

    def _movable_slots(self) -> list[int]:
        """The used slots that hold no sink, oldest frame first."""
        movable = [slot for slot, frame in enumerate(self.slot_frames) if frame >= self.sink_frames]
        return sorted(movable, key=self.slot_frames.__getitem__)

    def _tell_slots(self) -> None:
        """Put the open chunk's slots where `current_slots` reads them, without waiting for the device."""
        index = torch.tensor(self._current, dtype=torch.int32)
        if self._slot_index.is_cuda:
            index = index.pin_memory()
        self._slot_index[: len(index)].copy_(index, non_blocking=True)

    def _visible(self, name: str, layer: int) -> Tensor:
        return self._means[name][layer][:, : len(self.slot_frames) * self._rows[name]]

    def _pool(self, layer: int, runs: list[tuple[int, int, int]], k: Tensor, v: Tensor | None) -> None:
        """Pool frames and write their means into the slots of `runs`; without v the value means stay."""
        for name, means in self._means_of(k, v):
            copy_frames(self._means[name][layer], means, runs, self._rows[name])

    def _means_of(self, k: Tensor, v: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        if "blocks" in self._means:
            block_means = self.layout.block_means(k)
            yield "blocks", block_means
            yield "frames", self.layout.frame_means(block_means)
        if "subs" in self._means:
            yield "subs", self._sub_layout.block_means(k)
        if "values" in self._means and v is not None:
            yield "values", self.layout.block_means(v)

    def _copy_sinks(self, layer: int, k: Tensor) -> None:
        """Keep the original keys of the open chunk's sinks; k [B, L, H, D] as in `store`."""
        sinks = [(frame, i, 1) for i, frame in enumerate(self.current_frames) if frame < self.sink_frames]
        copy_frames(self._sink_keys[layer], k, sinks, self.layout.tokens_per_frame)

    def _move_sinks(self) -> None:
        """Put sinks that follow directly before the window, from their original keys."""
        shift = self.sink_shift()
        if not shift:
            return
        wide = torch.promote_types(self._dtype, torch.float32)
        table = RopeTable.of_time_shift(shift, self.head_dim, dtype=wide, device=self._sink_keys[0].device)
        runs = [(slot, frame, 1) for slot, frame in enumerate(self.slot_frames) if frame < self.sink_frames]
        for layer, original in enumerate(self._sink_keys):
            moved = table.rotate(original)
            self.storage.at(layer).write_keys(runs, moved, self.layout)
            self.storage.written(layer, [(slot, 1) for slot, _, _ in runs])
            self._pool(layer, runs, moved, None)
