"""One layer's sparse attention over plain tensors, as a rollout computes it."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from ..lightforcing_core.attention.blocks import FrameBlocks
from ..lightforcing_core.attention.options import AttentionOptions
from ..lightforcing_core.attention.policies import Plan
from ..lightforcing_core.attention.policies.static import FixedPlan
from ..lightforcing_core.attention.quantised import KVDtype
from ..lightforcing_core.attention.selection import BlockSelection
from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.causal import ModelState, attended
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.model.kv_storage import CacheShape, KVOptions
from ..lightforcing_core.rollout.schedule import chunk_sparsities

HEAD_DIM = 128
FRAMES = 3  # latent frames per chunk
CHUNKS = 7  # of an 81-frame video
FAMILY = FAMILIES["light_forcing_short"]  # the published method's settings
SPARSITIES = chunk_sparsities(CHUNKS * FRAMES, FRAMES, target=FAMILY.target, base=FAMILY.base)


def check_chunk(chunk: int) -> None:
    if not 2 <= chunk <= CHUNKS:
        raise ValueError(f"chunk {chunk} has no sparse arm; use 2 to {CHUNKS}")


def published(backend: str, block: tuple[int, int], family: Family = FAMILY) -> AttentionOptions:
    """The published method with these blocks."""
    sparse = family.sparse
    return AttentionOptions(backend, block, sparse.keep_frames, sparse.keep_sink, sparse.keep_near)


class LayerAttention:
    """Attention of one chunk, with k and v in a KV cache.

    q: [B, Lq, H, D], the chunk.
    k, v: [B, Lk, H, D], all visible frames, those of the chunk last. grid: rows and columns of a frame's tokens.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, int],
        sparsity: float,
        options: AttentionOptions,
        kv: KVDtype = "same",
    ) -> None:
        tokens_per_frame = math.prod(grid)
        own, frames = (x.shape[1] // tokens_per_frame for x in (q, k))
        sizes = 1, len(q), frames, grid, q.shape[2], q.shape[3], options.block[1]
        shape = CacheShape(*sizes, pools=options.pools(sparse=True), dtype=q.dtype)
        self.q, self.state = q, ModelState(KVCache(shape, KVOptions(kv), q.device), options)
        # The first chunk decides the mean that an 8-bit cache keeps keys less, as in a run.
        for start, end in pairwise(sorted({0, min(own, frames - own), frames - own, frames})):
            part = slice(start * tokens_per_frame, end * tokens_per_frame)
            self.state.open_chunk(end - start, sparsity if end == frames else 0.0, q.device)
            self.state.cache.store(0, k[:, part], v[:, part])
            self.state.cache.commit()

    @property
    def plan(self) -> Plan:
        plan = self.state.chunk.attention.plan
        assert plan is not None  # the chunk has a past and skips blocks
        return plan

    def select(self) -> BlockSelection:
        """Pool the chunk's q and select; keys are pooled already."""
        memory = self.state.cache.visible(0)
        assert memory.key_means is not None
        assert memory.frame_means is not None
        q_layout = FrameBlocks(self.state.cache.layout.tokens_per_frame, self.state.attention.block[0])
        return self.plan.select(q_layout.block_means(self.q), memory.key_means, memory.frame_means, memory.sub_means)

    def arm(self, selection: BlockSelection | None = None) -> Callable[[], Tensor]:
        """A function that computes [B, Lq, H, D]; it selects the blocks to read unless they are given."""
        state, attention = self.state, self.state.chunk.attention
        if selection is not None:
            attention = replace(
                attention, plan=FixedPlan(selection, self.plan.kept, self.plan.density, self.plan.uneven)
            )
        return partial(attended, self.q, None, 0, replace(state, chunk=replace(state.chunk, attention=attention)))
