"""The FLOPs of a schedule against dense attention, for the 1.3B model at 480×832."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..attention.blocks import FrameBlocks
from ..attention.policies import View
from ..attention.selection import kept_blocks
from .recipe import Recipe

LAYERS, DIM, FFN_DIM = 30, 1536, 8960
MOST_PLANNED = 256  # latent frames
FORWARDS = 5  # of a chunk: four denoising steps and the clean pass


@dataclass(frozen=True)
class ChunkCost:
    """One chunk: `frames` latent frames that read the share `density` of `kv_frames`, its own included.

    by_keys: queries and keys decide how much is read; the density is then the most that it can be.
    """

    frames: int
    kv_frames: int
    density: float
    by_keys: bool = False

    def attention_pairs(self, *, dense: bool = False) -> float:
        """Query frames × key frames that one attention call computes, or would compute dense."""
        return self.frames * self.kv_frames * (1.0 if dense else self.density)


def schedule_costs(
    sparsities: Sequence[float], chunk_lengths: Sequence[int], window: int | None, blocks_per_frame: int | None = None
) -> list[ChunkCost]:
    """The cost of a schedule: one `ChunkCost` per chunk. A chunk that sees nothing but itself is dense.

    chunk_lengths and window: latent frames (window None: every frame is visible).
    blocks_per_frame: key blocks in a frame, of which a chunk reads whole ones; if None, the size is not known and a
        density is the complement of a sparsity.
    Raises ValueError when the two lists differ in length.
    """
    costs = []
    for sparsity, frames, end in zip(sparsities, chunk_lengths, accumulate(chunk_lengths), strict=True):
        visible = min(end, window or end)
        blocks = visible * (blocks_per_frame or 0)
        density = kept_blocks(sparsity, blocks) / blocks if blocks else 1.0 - sparsity
        costs.append(ChunkCost(frames, visible, density if visible > frames else 1.0))
    return costs


def recipe_costs(recipe: Recipe) -> list[ChunkCost]:
    """The cost of every chunk that a run of `recipe` generates, by the blocks that its policy keeps at its size.

    Chunks that see more than `MOST_PLANNED` frames read the share that they would read of so many. Once the window has
    moved on by twice its length, chunks of equal length and sparsity read the same.
    """
    options, lengths = recipe.attention, recipe.chunk_lengths()
    grid = recipe.latent_shape[3] // 2, recipe.latent_shape[4] // 2
    q_layout, k_layout = (FrameBlocks(grid[0] * grid[1], size) for size in options.block)
    slots, sinks = recipe.ring
    costs, starts = schedule_costs([0.0] * len(lengths), lengths, recipe.window), [0, *accumulate(lengths)]
    known: dict[tuple[float, ...], ChunkCost] = {}
    for index, cost in enumerate(costs):
        sparsity, end, rule = recipe.sparsity(index), starts[index + 1], options.head_rule
        held = min(cost.kv_frames, slots)  # a cache of roles holds less than the window
        costs[index] = replace(cost, density=held / cost.kv_frames)
        if options.rule is None or not sparsity or cost.kv_frames == cost.frames:
            continue
        seen = min(held, MOST_PLANNED)
        pool = recipe.pool_slots(index)
        key = cost.frames, cost.kv_frames, min(end - seen, 2 * seen), sparsity, pool
        if key not in known:
            kept = min(sinks, end - seen)
            visible = [*range(kept), *range(end - seen + kept, end)]
            view = View(visible, cost.frames, q_layout, k_layout, 1, 1, None, grid, options.tiles, options.roles)
            view = view._replace(pool=pool)
            if rule is not None and (reads := rule.segments) and starts[index - 1] >= rule.split:
                view = view._replace(changed=torch.arange(reads))
            if rule is not None and rule.why_all(view):
                known[key] = replace(costs[index], by_keys=not options.roles)
            else:
                density = options.rule.plan(view, sparsity, options.budget).density
                read = held / cost.kv_frames * (1.0 if density is None else density)
                known[key] = replace(cost, density=read, by_keys=density is None)
        costs[index] = known[key]
    return costs[recipe.first_index :]


def flops_ratio(chunks: Iterable[ChunkCost]) -> float:
    """Attention FLOPs of these chunks over those of dense attention with the same window, in (0, 1]."""
    chunks = list(chunks)
    return sum(chunk.attention_pairs() for chunk in chunks) / sum(chunk.attention_pairs(dense=True) for chunk in chunks)


def clip_flops(chunks: Sequence[ChunkCost], tokens_per_frame: int = 1560) -> tuple[float, float]:
    """FLOPs of self-attention and of the linear layers for these chunks, each run `FORWARDS` times.

    Self-attention counts q·kᵀ and p·v, 4 · dim FLOPs per pair of tokens; linears count the four projections of
    self-attention, two of cross-attention (the text's are computed once) and the feed-forward's two, 2 FLOPs per
    weight and token. 81 frames at 512×768: 548 TFLOP of dense attention, 403 of linears.
    """
    pairs, tokens = sum(chunk.attention_pairs() for chunk in chunks), sum(chunk.frames for chunk in chunks)
    linears = 2.0 * (6 * DIM**2 + 2 * DIM * FFN_DIM) * tokens * tokens_per_frame
    return LAYERS * FORWARDS * 4.0 * DIM * tokens_per_frame**2 * pairs, LAYERS * FORWARDS * linears


def model_ratio(chunks: Sequence[ChunkCost]) -> float:
    """FLOPs of the whole model over those with dense attention: what sparsity can save at best."""
    attention, linears = clip_flops(chunks)
    return (attention + linears) / (attention / flops_ratio(chunks) + linears)
