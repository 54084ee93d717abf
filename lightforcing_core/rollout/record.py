"""The record of one run: the frames and blocks that each chunk read, seconds per stage, reasons for dense attention.

Nothing waits on the device before `finish`: until then small tensors of the record stay there.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import fast_path
from ..attention.blocks import FrameBlocks
from ..attention.dispatch import BackendChoice
from ..attention.selection import BlockSelection
from ..model.causal import ModelState, Watch
from ..parallel.shares import WHOLE, Shares
from .cost import ChunkCost
from .recipe import Recipe

MAP_BYTES = 32 << 20  # block maps of a run; a longer one keeps those of every second, fourth, … chunk


@dataclass(frozen=True)
class ChunkRecord:
    """One generated chunk: `frames` latent frames from `start_frame` on.

    visible: the latent frames it attended to, oldest first, its own included. window: the latent frames that dense
        attention sees, more than the visible ones if the cache holds only those that roles of heads need.
    sparsity: the share of key blocks that the schedule skips; None if the policy decides how many are read.
    layer_density: the share of visible key blocks that each layer read at the last denoising step, the mean over heads
        and query blocks; 1 if it was neither planned nor recorded.
    seconds: per stage, `denoise`, `clean pass`, `output`.
    why_dense: the reason if every block was read, else None.
    query_blocks: the number of query blocks behind the counts in `block_map`.
    key_block: tokens per key block.
    tiles: blocks are patches of the picture, see `blocks.tile_order`.
    block_map: how many query blocks kept each key block at that step, over the batch's videos: int16
        [layers, heads, visible frames, blocks per frame], frames as in `visible`, on the CPU. None if the chunk was
        dense or the run kept no map of it.
    """

    index: int
    start_frame: int
    frames: int
    visible: tuple[int, ...]
    window: int
    sparsity: float | None
    layer_density: tuple[float, ...]
    steps: int
    seconds: dict[str, float]
    why_dense: str | None
    query_blocks: int
    key_block: int
    tiles: bool = False
    block_map: Tensor | None = None

    @property
    def density(self) -> float:
        """The mean over the layers."""
        return sum(self.layer_density) / len(self.layer_density)

    @property
    def cost(self) -> ChunkCost:
        """The chunk's share of the attention's FLOPs."""
        return ChunkCost(self.frames, self.window, self.density * len(self.visible) / self.window)


@dataclass(frozen=True)
class RunRecord:
    """One run.

    grid: tokens per latent frame, (rows, columns).
    attention: the backends that ran sparse attention, each with its reason.
    notes: other work that ran dense.
    seconds: per stage over the whole run, reading given frames (`replay`) and prompt switches (`recompute`) included.
    facts: other facts about the run, as text.
    """

    chunks: tuple[ChunkRecord, ...]
    batch: int
    layers: int
    heads: int
    grid: tuple[int, int]
    attention: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    facts: dict[str, str]

    def chunk(self, index: int) -> ChunkRecord:
        """The chunk of this index in the video, −1 for the last one. Raises ValueError for one that is not there."""
        for chunk in self.chunks[-1:] if index == -1 else self.chunks:
            if index in (chunk.index, -1):
                return chunk
        there = f"{self.chunks[0].index} to {self.chunks[-1].index}" if self.chunks else "none"
        raise ValueError(f"chunk {index} is not in the record; it holds chunks {there}, and -1 is the last one")


class RunRecorder:
    """Collects one run; `rollout` calls it. One recorder serves one run.

    facts: text to keep in the record.
    map_bytes: the most memory that block maps may take.
    reads_blocks: whether to record the blocks that each layer reads; if not, densities are those of the plans.
    """

    def __init__(
        self, facts: dict[str, str] | None = None, *, map_bytes: int = MAP_BYTES, reads_blocks: bool = True
    ) -> None:
        self.facts, self._map_bytes = dict(facts or {}), map_bytes
        self._chunks: list[_Open] = []
        self._laps: list[tuple[int, str, Any]] = []  # chunk and stage that ended at a moment
        self._notes: list[str] = []
        self._attention: dict[str, str] = {}  # backends that ran, and why
        self._every = 1
        self._reads_blocks = reads_blocks

    @property
    def watch(self) -> Watch | None:
        """Called for every sparse attention of an open chunk's last step, if set."""
        # Not an attribute: a bound method would keep the recorder and its tensors on the device until a collection.
        return self._note_attention if self._reads_blocks else None

    def start(self, dit: Any, latent_shape: Sequence[int], device: torch.device, shares: Shares = WHOLE) -> None:
        """Begin the run, and the first lap. latent_shape: (B, C, frames, h, w). Of several `shares` this is one's."""
        self._batch, _, _, height, width = latent_shape
        self._layers, self._heads = len(dit.blocks), shares.heads_of(dit.blocks[0].self_attn.num_heads)
        if shares.size > 1:
            self.fact("ranks", f"{shares.size}; this record is of the {self._heads} heads of one")
        self._grid, self._device = (height // 2, width // 2), device
        self._laps = [(0, "", _now(device))]

    def lap(self, chunk: int, stage: str) -> None:
        """Count everything since the last lap as this stage of this chunk."""
        self._laps.append((chunk, stage, _now(self._device)))

    def note(self, text: str) -> None:
        """Keep a sentence about work that ran dense."""
        self._notes.append(text)

    def fact(self, name: str, text: str) -> None:
        """Keep a fact of the run; a later text replaces an earlier one."""
        self.facts[name] = text

    def open(self, index: int, recipe: Recipe, state: ModelState) -> None:
        """Begin a chunk to generate, which `state` has just opened, maybe with later ones."""
        layout, options, chunk = state.cache.layout, state.attention, state.chunk
        queries = FrameBlocks(layout.tokens_per_frame, options.block[0])
        slot_frames, rule = tuple(state.cache.slot_frames), options.rule
        frames = recipe.chunk_lengths()[index]
        end, sparsity = chunk.start_frame + chunk.frames, recipe.sparsity(index)
        record = ChunkRecord(
            index,
            chunk.start_frame,
            frames,
            visible=tuple(sorted(slot_frames)),
            window=min(end, recipe.window or end),
            sparsity=sparsity if not sparsity or (rule and rule.uses_sparsity) else None,
            layer_density=(chunk.attention.density,) * self._layers,
            steps=len(recipe.levels(index)) - 1,
            seconds={},
            why_dense=chunk.attention.why_dense,
            query_blocks=self._batch * frames * queries.per_frame,
            key_block=layout.block,
            tiles=options.tiles,
        )
        self._chunks.append(_Open(record, slot_frames, layout.per_frame, state.cache.pooled))

    def _note_attention(self, layer: int, selection: BlockSelection, choice: BackendChoice) -> None:
        self._attention.setdefault(choice.name, choice.reason)
        chunk = self._chunks[-1]
        mask = selection.to_mask((len(chunk.slot_frames) + chunk.pool) * chunk.per_frame)
        chunk.kept[layer] = mask.sum((0, 2), dtype=torch.int16)

    def close(self) -> None:
        """End the open chunk: combine its layers, and drop every second map if there are too many."""
        chunk = self._chunks[-1]
        if not chunk.kept:
            return
        chunk.block_map, chunk.kept = torch.stack(list(chunk.kept.values())), {}
        chunk.kept_sums = chunk.block_map.sum((1, 2), dtype=torch.int64)
        while True:
            for number, one in enumerate(self._chunks):
                if number % self._every:
                    one.block_map = None
            held = sum(one.block_map.nbytes for one in self._chunks if one.block_map is not None)
            if held <= self._map_bytes or self._every > len(self._chunks):
                return
            self._every *= 2

    def share_read(self) -> float | None:
        """The share of key blocks that the last chunk read, if that is recorded; waits for the device."""
        shares = self._chunks[-1].shares_read(self._heads)
        return sum(shares) / len(shares) if shares else None

    def finish(self, *, frames: int | None = None) -> RunRecord:
        """Wait for the device; the record of all denoised chunks, or those within the first `frames` latent frames."""
        per_chunk: dict[int, dict[str, float]] = defaultdict(dict)
        whole: dict[str, float] = {}
        for (_, _, start), (index, stage, end) in pairwise(self._laps):
            for seconds in (per_chunk[index], whole):
                seconds[stage] = seconds.get(stage, 0.0) + _seconds(start, end)
        chunks = [one.finished(per_chunk[one.record.index], self._heads) for one in self._chunks]
        end = float("inf") if frames is None else frames
        return RunRecord(
            tuple(one for one in chunks if "denoise" in one.seconds and one.start_frame + one.frames <= end),
            batch=self._batch,
            layers=self._layers,
            heads=self._heads,
            grid=self._grid,
            attention=tuple(f"{name} ({reason})" for name, reason in self._attention.items()),
            notes=tuple(self._notes),
            seconds=whole,
            facts=self.facts | fast_path.notes(),
        )


@dataclass
class _Open:
    """A chunk while it runs: its record so far, and small tensors on the device.

    pool: slots in use behind those of frames; maps leave them out.
    kept: by layer, int16 [heads, key blocks] in slot order. block_map: all layers of it. kept_sums: int64 [layers].
    """

    record: ChunkRecord
    slot_frames: tuple[int, ...]
    per_frame: int
    pool: int
    kept: dict[int, Tensor] = field(default_factory=dict)
    kept_sums: Tensor | None = None
    block_map: Tensor | None = None

    def shares_read(self, heads: int) -> tuple[float, ...]:
        """The share of key blocks that each layer read; empty if that is not recorded."""
        pairs = heads * self.record.query_blocks * len(self.slot_frames) * self.per_frame
        return () if self.kept_sums is None else tuple(kept / pairs for kept in self.kept_sums.tolist())

    def finished(self, seconds: dict[str, float], heads: int) -> ChunkRecord:
        """The chunk's record, on the CPU and in time order."""
        density, block_map = self.shares_read(heads) or self.record.layer_density, None
        if self.block_map is not None:
            by_time = sorted(range(len(self.slot_frames)), key=self.slot_frames.__getitem__)
            block_map = self.block_map.cpu().unflatten(-1, (-1, self.per_frame))[:, :, by_time]
        return replace(self.record, seconds=seconds, layer_density=density, block_map=block_map)


def _now(device: torch.device) -> Any:
    """This moment in the device's queue of work; on the CPU's clock if the device has no such events."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(end, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
