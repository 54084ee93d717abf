"""The rollout's key/value memory: a ring of latent-frame slots with sinks, and the pooled keys that belong to them.

Evicting a frame is renaming its slot: nothing is shifted, cloned or concatenated, and all bookkeeping is Python
ints, so nothing waits on the device. Keys are stored roped at their global frame index; attention depends only on
differences, so the moving window is never roped again. Only sinks that follow the window are rotated, once per
chunk and always from their first value, so no rounding piles up.
"""

import torch
from torch import Tensor

from .families import SinkRope
from .geometry import FrameBlocks
from .rope import RopeTable


def kv_bytes(
    layers: int, batch: int, frames: int, tokens_per_frame: int, heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of keys and values of `frames` latent frames over all layers, pooled keys not counted."""
    return 2 * layers * batch * frames * tokens_per_frame * heads * head_dim * dtype.itemsize


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
    `pooled`: keep block and frame means; a run that never selects blocks needs none.
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
        pooled: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= sink_frames < slots:
            raise ValueError(f"sink_frames {sink_frames} must be 0 or more and fewer than the window of {slots} frames")
        self.layout = FrameBlocks(tokens_per_frame, block_k)
        self.slots, self.sink_frames, self.sink_rope = slots, sink_frames, sink_rope
        self.head_dim = head_dim
        self.pooled = pooled

        def allocate(rows: int) -> list[Tensor]:
            return [torch.empty(batch, rows, heads, head_dim, dtype=dtype, device=device) for _ in range(layers)]

        self._keys = allocate(slots * tokens_per_frame)
        self._values = allocate(slots * tokens_per_frame)
        self._block_means = allocate(slots * self.layout.per_frame) if pooled else []
        self._frame_means = allocate(slots) if pooled else []
        self._sink_keys: list[Tensor] = []
        if sink_rope == "follow" and sink_frames:
            self._sink_keys = allocate(sink_frames * tokens_per_frame)
        self.slot_frames: list[int] = []  # global latent-frame index held by each used slot, in memory order
        self._current: list[int] = []  # slots of the open or last chunk, in time order
        self._committed = True
        self._next_frame = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, pooled keys and sink originals included."""
        tensors = [*self._keys, *self._values, *self._block_means, *self._frame_means, *self._sink_keys]
        return sum(tensor.nbytes for tensor in tensors)

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
        self._move_sinks()

    def reopen(self) -> None:
        """Open every visible frame that is no sink once more, so that one pass can recompute them all."""
        self._require_committed()
        self._current = self._movable_slots()
        self._committed = not self._current

    def skip(self, frames: int) -> None:
        """Pass over `frames` latent frames without storing them, and forget all that came before but the sinks."""
        self._require_committed()
        if self._next_frame < self.sink_frames:
            raise ValueError(f"frame {self._next_frame} is one of {self.sink_frames} sinks and cannot be passed over")
        self._next_frame += frames
        del self.slot_frames[self.sink_frames :]  # sinks were written first, so they hold the first slots

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the open chunk's keys (roped) and values of one layer, [B, L, H, D], and pool the keys."""
        if self._committed:
            raise RuntimeError("no chunk is open; call open() before store()")
        self._write(self._keys[layer], k)
        self._write(self._values[layer], v)
        if self.pooled:
            block_means = self.layout.block_means(k)
            self._write(self._block_means[layer], block_means)
            self._write(self._frame_means[layer], self.layout.frame_means(block_means))

    def commit(self) -> None:
        """The open chunk's last stored keys and values are its clean ones: keep them as history."""
        self._committed = True
        if self._sink_keys:
            for slot in self._current:
                frame = self.slot_frames[slot]
                if frame < self.sink_frames:
                    for original, keys in zip(self._sink_keys, self._keys, strict=True):
                        self._frame(original, frame).copy_(self._frame(keys, slot))

    def free(self) -> None:
        """Let go of all memory; the cache is of no use afterwards."""
        for tensors in (self._keys, self._values, self._block_means, self._frame_means, self._sink_keys):
            tensors.clear()

    def keys(self, layer: int) -> Tensor:
        """Visible keys in memory order: [B, visible frames · tokens_per_frame, H, D], a view."""
        return self._keys[layer][:, : len(self.slot_frames) * self.layout.tokens_per_frame]

    def values(self, layer: int) -> Tensor:
        """Visible values in memory order, like `keys`."""
        return self._values[layer][:, : len(self.slot_frames) * self.layout.tokens_per_frame]

    def block_means(self, layer: int) -> Tensor:
        """Means of the visible key blocks: [B, visible frames · blocks per frame, H, D], a view."""
        return self._block_means[layer][:, : len(self.slot_frames) * self.layout.per_frame]

    def frame_means(self, layer: int) -> Tensor:
        """Means of the visible frames' keys: [B, visible frames, H, D], a view."""
        return self._frame_means[layer][:, : len(self.slot_frames)]

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

    def _frame(self, tensor: Tensor, slot: int) -> Tensor:
        """The rows of one slot."""
        tokens = self.layout.tokens_per_frame
        return tensor[:, slot * tokens : (slot + 1) * tokens]

    def _write(self, target: Tensor, source: Tensor) -> None:
        """Copy the chunk's rows into its slots, one copy per run of neighbouring slots."""
        rows = source.shape[1] // len(self._current)
        start = 0
        while start < len(self._current):
            stop = start + 1
            while stop < len(self._current) and self._current[stop] == self._current[stop - 1] + 1:
                stop += 1
            first = self._current[start] * rows
            target[:, first : first + (stop - start) * rows].copy_(source[:, start * rows : stop * rows])
            start = stop

    def _move_sinks(self) -> None:
        """Put sinks that follow directly before the window, from their original keys."""
        shift = self.sink_shift()
        if not shift:
            return
        like = self._keys[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        table = RopeTable.of_time_shift(shift, self.head_dim, dtype=wide, device=like.device)
        for layer, original in enumerate(self._sink_keys):
            for slot, frame in enumerate(self.slot_frames):
                if frame < self.sink_frames:
                    moved = table.rotate(self._frame(original, frame))
                    self._frame(self._keys[layer], slot).copy_(moved)
                    if self.pooled:
                        block_means = self.layout.block_means(moved)
                        blocks = slice(slot * self.layout.per_frame, (slot + 1) * self.layout.per_frame)
                        self._block_means[layer][:, blocks].copy_(block_means)
                        self._frame_means[layer][:, slot].copy_(self.layout.frame_means(block_means)[:, 0])
