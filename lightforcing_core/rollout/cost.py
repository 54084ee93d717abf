"""The FLOPs of a schedule against dense attention, for the 1.3B model at 480×832 by default."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class ChunkCost:
    """One chunk: `frames` latent frames that read the share `density` of `kv_frames`, its own included."""

    frames: int
    kv_frames: int
    density: float

    def attention_pairs(self, *, dense: bool = False) -> float:
        """Query frames × key frames that one attention call computes, or would compute dense."""
        return self.frames * self.kv_frames * (1.0 if dense else self.density)


def schedule_costs(sparsities: Sequence[float], chunk_lengths: Sequence[int], window: int | None) -> list[ChunkCost]:
    """The cost of a schedule: one `ChunkCost` per chunk, its density the complement of its sparsity.

    chunk_lengths and window: latent frames (window None: every frame is visible). Raises ValueError when the two
    lists differ in length.
    """
    return [
        ChunkCost(frames, min(end, window or end), 1.0 - sparsity)
        for sparsity, frames, end in zip(sparsities, chunk_lengths, accumulate(chunk_lengths), strict=True)
    ]


def flops_ratio(chunks: Iterable[ChunkCost]) -> float:
    """Attention FLOPs of these chunks over those of dense attention with the same window, in (0, 1]."""
    chunks = list(chunks)
    return sum(chunk.attention_pairs() for chunk in chunks) / sum(chunk.attention_pairs(dense=True) for chunk in chunks)


@dataclass(frozen=True)
class ClipCost:
    """FLOPs of one video: self-attention as scheduled and dense, and the linear layers."""

    attention: float
    dense_attention: float
    linears: float

    @property
    def attention_ratio(self) -> float:
        """Self-attention over dense self-attention with the same window."""
        return self.attention / self.dense_attention

    @property
    def model_ratio(self) -> float:
        """The whole model over the whole model with dense attention: what sparsity can save at best."""
        return (self.attention + self.linears) / (self.dense_attention + self.linears)


def clip_cost(
    chunks: Sequence[ChunkCost],
    *,
    tokens_per_frame: int = 1560,
    layers: int = 30,
    dim: int = 1536,
    ffn_dim: int = 8960,
    forwards: int = 5,
) -> ClipCost:
    """The cost of these chunks, each run `forwards` times: four denoising steps and the clean pass by default.

    Self-attention counts q·kᵀ and p·v, 4 · dim FLOPs per pair of tokens; linears count the four projections of
    self-attention, two of cross-attention (the text's are computed once) and the feed-forward's two, 2 FLOPs per
    weight and token. 81 frames at 512×768: 548 TFLOP of dense attention, 403 of linears.
    """
    per_pair = 4.0 * layers * dim * tokens_per_frame**2 * forwards
    per_token = 2.0 * layers * (6 * dim**2 + 2 * dim * ffn_dim) * forwards
    return ClipCost(
        attention=per_pair * sum(chunk.attention_pairs() for chunk in chunks),
        dense_attention=per_pair * sum(chunk.attention_pairs(dense=True) for chunk in chunks),
        linears=per_token * tokens_per_frame * sum(chunk.frames for chunk in chunks),
    )
