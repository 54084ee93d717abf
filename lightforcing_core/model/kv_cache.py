"""The rollout's key/value memory: a ring of latent-frame slots with sinks.

Evicting a frame is renaming its slot: nothing is shifted, cloned or concatenated, and all bookkeeping is Python
ints, so nothing waits on the device. Keys are stored roped at their global frame index. Only sinks that follow the
window, and frames and tokens that come back, are rotated, always from their original, so rounding errors do not
accumulate.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...kernels.layer_memory import LayerMemory
from ..attention.policies.echo import OFFSETS, token_scores, turned_to
from ..attention.quantised import dequantise_blocks
from ..attention.selection import best, sub_block_layout
from ..parallel.shares import WHOLE
from ..pinned import to_device
from .block_pool import keep_best
from .kv_storage import CacheShape, KVOptions, KVStorage, Runs, copy_frames, write_tokens
from .rope import RopeTable, axis_dims

KEPT = 0.999  # of a sink, when a chunk that leaves the window is averaged into it


class KVCache:
    """Keys, values and pooled keys of all layers for frames that a chunk may see.

    All memory is allocated here. A chunk is opened, stored once per layer in each pass (later passes overwrite) and
    committed by its clean pass; opening the next one evicts the oldest frames that are not sinks. Means are always
    in the model's dtype and on the device; `options` concerns keys and values only.
    """

    def __init__(
        self, shape: CacheShape, options: KVOptions | None = None, device: torch.device | str | None = None
    ) -> None:
        self.shape, self.layout = shape, shape.layout
        self.storage = KVStorage(shape, options or KVOptions(), device)
        self._slot_index = torch.zeros(shape.slots, dtype=torch.int32, device=device)
        self.slot_frames: list[int] = []  # global latent-frame index held by each used slot, in memory order
        self._current: list[int] = []  # slots of the open or last chunk, in time order
        self._committed = True
        self._next_frame = 0
        self._jumps: list[tuple[int, int]] = []  # (frame, how far it and later ones were moved ahead)
        self._pinned = range(0)  # frames that stay visible
        self._first_original = 0  # the frame of the first original
        self.pooled = 0  # slots in use of the pool
        self.importance: Sequence[Tensor] = ()  # of each layer's blocks, see `importance`; () if all are equal
        self.queries: Sequence[Tensor] = ()  # of each layer's last clean pass, see `query_sums`; () if not known
        self._first_queries: Sequence[Tensor] = ()  # the same of all chunks that fit the first window
        self._views: dict[int, tuple[LayerMemory, LayerMemory]] = {}  # by layer, all of its memory and what is visible
        self.wrote_runs = False  # whether `store` has written to slots that are Python numbers

    @property
    def nbytes(self) -> int:
        """Bytes on the computing device, with pooled keys and originals."""
        return self.storage.device_bytes

    @property
    def current_frames(self) -> list[int]:
        return [self.slot_frames[slot] for slot in self._current]

    @property
    def positions(self) -> list[int]:
        """The positions in time of the open or last chunk's frames."""
        return [self._position_of(frame) for frame in self.current_frames]

    def _position_of(self, frame: int) -> int:
        return frame + sum(far for first, far in self._jumps if first <= frame)

    def jump(self, frames: int) -> None:
        """Move the next frame and all later ones `frames` latent frames ahead in time.

        The past stays visible, farther away than a model was trained for: so a scene ends. Sources: the cut of
        Infinity-RoPE, arXiv 2511.20649, with 42, and of LongLive 2.0 with 8.
        """
        self._require_committed()
        self._jumps.append((self._next_frame, frames))

    def pin(self, frames: int) -> None:
        """Keep the last chunk's first `frames` frames visible, instead of those pinned before."""
        self._require_committed()
        start = self.current_frames[0]
        self._pinned = range(start, start + min(frames, len(self._current)))

    def open(self, frames: int) -> None:
        """Prepare slots for the next `frames` frames, evicting the oldest except sinks and pinned ones.

        These and the chunk must fit into the window, which a `Recipe` checks. RuntimeError when the last chunk is not
        committed.
        """
        self._require_committed()
        free = list(range(len(self.slot_frames), min(len(self.slot_frames) + frames, self.shape.slots)))
        gone = self._movable_slots()[: frames - len(free)]
        if self.shape.averages and len(gone) == self.shape.sink_frames:
            self._average(gone)
        if self.shape.pool and gone:
            self._keep_blocks(gone)
        self._current = sorted(gone + free)
        self.slot_frames += [-1] * len(free)
        for slot in self._current:
            self.slot_frames[slot] = self._next_frame
            self._next_frame += 1
        self._committed = False
        self._show_slots()
        self._send_slots()
        if self.shape.sink_rope != "fixed":
            self._put_back(self._sink_moves())

    def reopen(self) -> None:
        """Reopen all visible frames, so that one pass can recompute them; once one was evicted, those that move."""
        self._require_committed()
        # As LongLive does: sinks keep their values only if the frames that follow them are gone.
        is_whole = self._next_frame == len(self.slot_frames)
        self._current = list(range(self._next_frame)) if is_whole else self._movable_slots()
        self._committed = not self._current
        self.pooled = 0  # as the anchors below
        if self.shape.rolling and self._current:
            # Frames of the old text would bring its scene back, so the recomputed ones are the anchors from now on.
            self._first_original = self.current_frames[0]
        self._send_slots()

    def skip(self, frames: int) -> None:
        """Skip `frames` latent frames, and forget all earlier ones except sinks and originals."""
        self._require_committed()
        sinks, kept = self.shape.sink_frames, self.shape.first_frames
        if self._next_frame < kept:
            raise ValueError(f"frame {self._next_frame} is one of the first {kept} and cannot be passed over")
        self._next_frame += frames
        del self.slot_frames[sinks:]  # sinks were written first, so they hold the first slots
        self._show_slots()

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the open chunk's roped keys and values of a layer, [B, L, H, D], and pool."""
        self._require_open()
        self.wrote_runs, runs, memory = True, self._runs, self.storage.at(layer)
        if self.takes_mean:
            self.take_mean(memory, k)
        for frame, original in self._kept:
            tokens = slice(frame * self.layout.tokens_per_frame, (frame + 1) * self.layout.tokens_per_frame)
            for kept, x in zip(self.storage.originals[layer], (k, v), strict=False):
                kept[original].copy_(x[:, tokens], non_blocking=True)
        self._write(memory, runs, k, v)
        self.written(layer)

    @property
    def takes_mean(self) -> bool:
        """Whether an 8-bit cache holds the open chunk alone, whose stores then decide the mean that keys are kept less.

        So each pass of a first chunk takes it anew, and a continued run that is replayed whole takes the same.
        """
        return self.storage.keeps_mean and len(self._current) == len(self.slot_frames)

    def take_mean(self, memory: LayerMemory, keys: Tensor) -> None:
        """Subtract the mean of `keys` [B, L, H, D] from all that are stored from now on.

        Three quarters of the temporal dims are left out, those that turn by more than a radian in 1000 frames: a mean
        of the first frames, turned, would make outliers of later frames larger.
        """
        assert memory.key_mean is not None
        memory.key_mean.copy_(keys.mean(1, dtype=torch.float32))
        memory.key_mean[..., : axis_dims(self.shape.head_dim)[0] * 3 // 4].zero_()

    def visible(self, layer: int) -> LayerMemory:
        """The visible part of one layer's memory, in slot order: views."""
        memory = self.storage.at(layer)
        if layer not in self._views or self._views[layer][0] is not memory:
            self._views[layer] = memory, memory.first(len(self.slot_frames), of=self.shape.all_slots)
        return self._views[layer][1]

    def with_pool(self, layer: int) -> LayerMemory:
        """The same with the pool behind it."""
        slots = len(self.slot_frames) + self.pooled  # the window is full once there is a pool
        return self.storage.at(layer).first(slots, of=self.shape.all_slots) if self.pooled else self.visible(layer)

    def keys_in_time(self, layer: int) -> Tensor:
        """The first video's visible keys of a layer, oldest frame first: [L, H, D]."""
        memory, slots = self.visible(layer), sorted(range(len(self.slot_frames)), key=self.slot_frames.__getitem__)
        return torch.cat([self._stored(memory, slot, slice(1))[0][0] for slot in slots])

    def self_similarity(self, layer: int) -> Tensor:
        """That of the visible blocks of keys less their common mean, float32 [B, H, blocks] by slot."""
        memory = self.visible(layer)
        assert memory.frame_means is not None  # a policy that asks for it keeps means
        mean = memory.frame_means.float().mean(1, keepdim=True)
        frames = (self._stored(memory, slot)[0].float() - mean for slot in range(len(self.slot_frames)))
        return torch.cat([self.layout.self_similarity(frame) for frame in frames], dim=-1)

    def _stored(self, memory: LayerMemory, slot: int, videos: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values of the frame in a slot, [B, tokens, H, D] each; of an 8-bit cache dequantised."""
        layout = self.storage.layout
        start, blocks = slot * layout.rows_per_frame, slice(slot * layout.per_frame, (slot + 1) * layout.per_frame)
        k, v = (x[videos, start : start + layout.tokens_per_frame] for x in (memory.keys, memory.values))
        if memory.scales is not None:
            k, v = (
                dequantise_blocks(x, scales[videos, blocks], self.layout, torch.float32)
                for x, scales in zip((k, v), memory.scales, strict=True)
            )
        return k if memory.key_mean is None else k + memory.key_mean[videos, None], v

    @property
    def keeps_originals(self) -> bool:
        """Whether the open chunk holds frames that are also kept as first stored.

        If not, a kernel may write to `current_slots` of `storage.at(layer)` itself; then call `written`.
        """
        return bool(self._kept)

    def current_slots(self) -> Tensor:
        """The open chunk's slots on the device, in time order: int32 [frames]."""
        self._require_open()
        return self._sent_slots

    def written(self, layer: int) -> None:
        """Note that the open chunk's slots of `layer` have been written."""
        self._require_open()
        self.storage.written(layer, [(slot, many) for slot, _, many in self._runs])

    def commit(self, all_heads: Callable[[Tensor], Tensor] = WHOLE.all_heads) -> None:
        """Keep the open chunk's last stored keys and values, its clean ones, as history. all_heads: see `Shares`."""
        self._committed = True
        if (rule := self.shape.rolling) and self._current:
            held, committed = self.slot_frames, self.current_frames
            self._put_back(moves := rule.moves(held, committed, self.shape.slots, self._first_original))
            if self.shape.history and self.queries:
                self._remember(all_heads, compress=bool(moves))

    def free(self) -> None:
        self.storage.free()
        self._views.clear()

    def _require_open(self) -> None:
        if self._committed:
            raise RuntimeError("no chunk is open; call open() before storing keys and values")

    def _require_committed(self) -> None:
        if not self._committed:
            raise RuntimeError(f"the chunk of frames {self.current_frames} is not committed yet; run its clean pass")

    def _movable_slots(self) -> list[int]:
        """The used slots that hold no sink and nothing pinned, oldest frame first."""
        kept = [*range(self.shape.sink_frames), *self._pinned]
        movable = [slot for slot, frame in enumerate(self.slot_frames) if frame not in kept]
        return sorted(movable, key=self.slot_frames.__getitem__)

    def _show_slots(self) -> None:
        """Let all used slots be seen."""
        self.storage.visible = len(self.slot_frames) + self.pooled
        self._views.clear()

    def _send_slots(self) -> None:
        """Join the open chunk's slots to runs, and copy them to where `current_slots` reads them, without waiting."""
        self._runs: list[tuple[int, int, int]] = []
        for frame, slot in enumerate(self._current):
            if self._runs and slot == self._runs[-1][0] + self._runs[-1][2]:
                first, start, many = self._runs.pop()
                self._runs.append((first, start, many + 1))
            else:
                self._runs.append((slot, frame, 1))
        # The open chunk's frames that are also kept as first stored, by their index in it and in the originals.
        originals = ((i, frame - self._first_original) for i, frame in enumerate(self.current_frames))
        self._kept = [(i, original) for i, original in originals if 0 <= original < self.shape.originals]
        index = torch.tensor(self._current, dtype=torch.int32)
        if self._slot_index.is_cuda:
            index = index.pin_memory()
        self._sent_slots = self._slot_index[: len(index)]
        self._sent_slots.copy_(index, non_blocking=True)

    def _write(self, memory: LayerMemory, runs: Runs, k: Tensor, v: Tensor | None = None) -> None:
        """Write keys, and values if given, of whole frames [B, L, H, D] into the slots of `runs`, and pool."""
        write_tokens(memory.keys, memory.key_scales, k, runs, self.storage.layout, memory.key_mean)
        if v is not None:
            write_tokens(memory.values, memory.value_scales, v, runs, self.storage.layout)
            if memory.value_means is not None:
                copy_frames(memory.value_means, self.layout.block_means(v), runs, self.layout.per_frame)
        if memory.key_means is not None and memory.frame_means is not None:
            block_means = self.layout.block_means(k)
            copy_frames(memory.key_means, block_means, runs, self.layout.per_frame)
            copy_frames(memory.frame_means, self.layout.frame_means(block_means), runs, 1)
        if memory.sub_means is not None:
            sub_layout = sub_block_layout(self.layout)
            copy_frames(memory.sub_means, sub_layout.block_means(k), runs, sub_layout.per_frame)

    def _sink_moves(self) -> list[tuple[int, int, int]]:
        """Moves of sinks that follow to the place directly before the window, see `_put_back`."""
        movable, sinks = self._movable_slots(), self.shape.sink_frames
        shift = self._position_of(self.slot_frames[movable[0]]) - sinks if movable else 0
        return [(slot, slot, slot + shift) for slot in range(sinks)] if shift else []

    def _average(self, slots: Sequence[int]) -> None:
        """Average the frames in `slots`, which are about to leave, into the originals of the sinks, one into one."""
        head_dim, device = self.shape.head_dim, self._slot_index.device
        wide = torch.promote_types(self.shape.dtype, torch.float32)
        moves = [sink - self._position_of(self.slot_frames[slot]) for sink, slot in enumerate(slots)]
        tables = [RopeTable([far], 1, 1, head_dim, dtype=wide, device=device) for far in moves]
        for layer, originals in enumerate(self.storage.originals):
            memory = self.storage.at(layer)
            for sink, (slot, table) in enumerate(zip(slots, tables, strict=True)):
                k, v = self._stored(memory, slot)
                for kept, x in zip(originals, (table.rotate(k), v), strict=True):
                    old = kept[sink].to(device, non_blocking=True)
                    kept[sink].copy_(KEPT * old + (1 - KEPT) * x.to(old.dtype), non_blocking=True)

    def _keep_blocks(self, slots: Sequence[int]) -> None:
        """Keep the best blocks of the pool and of the frames in `slots`, which are about to leave, in the pool."""
        shape, first = self.shape, self.shape.slots
        sources = [*range(first, first + self.pooled), *slots]
        self.pooled = min(shape.pool, len(sources))
        size = shape.batch, shape.heads, shape.all_slots * self.layout.per_frame
        importance = self.importance or [torch.zeros(size, device=self._slot_index.device)] * shape.layers
        for layer, one in enumerate(importance):
            keep_best(self.storage.at(layer), self.storage.layout, sources, first, self.pooled, one)
            self.storage.written(layer, [(first, self.pooled)])

    def _remember(self, all_heads: Callable[[Tensor], Tensor], *, compress: bool) -> None:
        """Keep the last chunk in the history; if `compress`, the best of older tokens take the chunk before's place."""
        shape, device, length = self.shape, self._slot_index.device, len(self._current)
        start, size, tokens = self.current_frames[0], shape.history, self.layout.tokens_per_frame
        done = start / (start + length)
        if start + length <= size:
            first = self._first_queries or self.queries
            self._first_queries = [torch.lerp(new, old, done) for old, new in zip(first, self.queries, strict=True)]
        past, before = range(max(0, start + length - size), start), range(start - length, start)
        rows = [shape.originals + frame % size for frame in past]
        wide = torch.promote_types(shape.dtype, torch.float32)
        turned = partial(RopeTable, head_dim=shape.head_dim, dtype=wide, device=device)
        if compress:
            place, own = turned(before, *shape.grid), turned(past, *shape.grid)
            row_of, slots = to_device(torch.tensor(rows), device), [*map(self.slot_frames.index, before)]
            ahead = [turned([start + length - frame + far for far in OFFSETS], 1, 1) for frame in past]
        for layer, originals in enumerate(self.storage.originals):
            memory = self.storage.at(layer)
            for slot, frame in zip(self._current, self.current_frames, strict=True):
                for kept, x in zip(originals, self._stored(memory, slot), strict=True):
                    kept[shape.originals + frame % size].copy_(x, non_blocking=True)
            if not compress:
                continue
            direction, weights = turned_to(self._first_queries[layer], self.queries[layer])
            scores = []
            for i, row in enumerate(rows):
                aimed = ahead[i].rotate(direction[:, None].expand(-1, len(OFFSETS), -1, -1)).mean(1)
                k = originals[0][row].to(device, wide, non_blocking=True)
                keys = own.back(slice(i * tokens, (i + 1) * tokens)).rotate(k)
                scores.append(token_scores(keys, aimed, weights))
            chosen = best(all_heads(torch.cat(scores, -1)).mean(1), length * tokens)  # [B, tokens]
            from_row, token = (one.to(originals[0].device) for one in (row_of[chosen // tokens], chosen % tokens))
            video = torch.arange(shape.batch, device=token.device)[:, None]
            k, v = (kept[from_row, video, token].to(device) for kept in originals)
            k = place.rotate(own.back(chosen).rotate(k.to(wide))).to(shape.dtype)
            self._write(memory, [(slot, i, 1) for i, slot in enumerate(slots)], k, v)
            self.storage.written(layer, [(slot, 1) for slot in slots])

    def _put_back(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Write originals to slots, rotated in time: (slot, original, frame at which it then stands)."""
        if not moves:
            return
        head_dim, device = self.shape.head_dim, self._slot_index.device
        wide = torch.promote_types(self.shape.dtype, torch.float32)
        shifts = [frame - self._first_original - original for _, original, frame in moves]
        # Row and column 0 rotate by nothing.
        tables = [RopeTable([shift], 1, 1, head_dim, dtype=wide, device=device) for shift in shifts]
        for layer, originals in enumerate(self.storage.originals):
            memory = self.storage.at(layer)
            for (slot, original, _), table in zip(moves, tables, strict=True):
                k, *v = (kept[original].to(device, non_blocking=True) for kept in originals)
                self._write(memory, [(slot, 0, 1)], table.rotate(k), *v)
            self.storage.written(layer, [(slot, 1) for slot, _, _ in moves])
