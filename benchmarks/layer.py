"""One layer's sparse attention over plain tensors, as a rollout computes it."""

from torch import Tensor

from ..lightforcing_core.attention.backends.dense import dequantised
from ..lightforcing_core.attention.blocks import FrameBlocks
from ..lightforcing_core.attention.dispatch import sparse_attention
from ..lightforcing_core.attention.options import AttentionOptions
from ..lightforcing_core.attention.quantised import STORED, KVDtype, quantise_blocks
from ..lightforcing_core.attention.selection import BlockSelection, SelectionPlan, View, sub_block_layout
from ..lightforcing_core.families import FAMILIES, Family
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
    """Attention of one chunk, with k and v pooled and quantised as in the cache.

    q: [B, Lq, H, D], the chunk.
    k, v: [B, Lk, H, D], all visible frames, those of the chunk last.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tokens_per_frame: int,
        sparsity: float,
        options: AttentionOptions,
        kv: KVDtype = "same",
    ) -> None:
        self.tensors, self.tokens_per_frame, self.options = (q, k, v), tokens_per_frame, options
        self._q_layout, self._layout = (FrameBlocks(tokens_per_frame, size) for size in options.block)
        self._sub_layout = sub_block_layout(self._layout) if options.estimator == "lse" else None
        frames, current = k.shape[1] // tokens_per_frame, q.shape[1] // tokens_per_frame
        view = View(range(frames), current, self._q_layout, self._layout, q.shape[0], q.shape[2], q.device)
        budget = options.budget if sparsity else options.budget._replace(keep=frames)
        self.plan = SelectionPlan.build(view, sparsity, budget)
        self.k_means = self._layout.block_means(k)
        self.tail = (self.k_means, self._layout.block_means(v)) if options.tail else None
        self._frame_means = self._layout.frame_means(self.k_means)
        self._sub_means = self._sub_layout.block_means(k) if self._sub_layout else None
        self.stored, self._scales = (k, v), None
        if kv != "same":
            (k, k_scales), (v, v_scales) = (quantise_blocks(x, self._layout, STORED[kv]) for x in (k, v))
            self.stored, self._scales = (k, v), (k_scales, v_scales)

    def select(self) -> BlockSelection:
        """Pool the chunk's q and k and select; older keys are pooled already."""
        q, k, v = self.tensors
        own = slice(k.shape[1] - q.shape[1], None)
        means = (self._sub_layout or self._layout).block_means(k[:, own])
        if self._sub_layout is None:
            self._layout.frame_means(means)
        if self.options.tail:
            self._layout.block_means(v[:, own])
        return self.plan.select(self._q_layout.block_means(q), self.k_means, self._frame_means, self._sub_means)

    def attend(self, selection: BlockSelection, backend: str | None = None) -> Tensor:
        """[B, Lq, H, D] by the options' backend or another one."""
        return sparse_attention(
            self.tensors[0],
            *self.stored,
            selection=selection,
            tokens_per_frame=self.tokens_per_frame,
            block=self.options.block,
            backend=backend or self.options.backend,
            scales=self._scales,
            tail=self.tail,
        )

    def exact(self, selection: BlockSelection, *, frames: int | None = None, heads: int | None = None) -> Tensor:
        """The same in float64 from k and v as they are stored, or only of the first frames and heads."""
        rows = slice(frames and frames * self._q_layout.per_frame)
        q, k, v, *means = (x[:, :, :heads].double() for x in (self.tensors[0], *self.stored, *(self.tail or ())))
        if self._scales:
            k, v = dequantised(*self.stored, self._scales, self._layout, slice(heads), q.dtype)
        return sparse_attention(
            q[:, : frames and frames * self.tokens_per_frame],
            k,
            v,
            selection=BlockSelection(*(x[:, :heads, rows] for x in selection)),
            tokens_per_frame=self.tokens_per_frame,
            block=self.options.block,
            backend="reference",
            tail=(means[0], means[1]) if means else None,
        )

    def __call__(self, backend: str | None = None) -> Tensor:
        return self.attend(self.select(), backend)
