"""What a schedule costs in FLOPs against dense attention: its self-attention, and the whole forward around it.

Counted for the 1.3B model at 480×832 unless told otherwise; the ratios hardly move with the number of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .report import ChunkCost

TOKENS_480P = 1560  # per latent frame of 480×832
FEW_STEP_FORWARDS = 5  # per chunk: four denoising steps and the clean pass


@dataclass(frozen=True)
class ClipCost:
    """FLOPs of one video: self-attention as scheduled and dense, and the linear layers beside it."""

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
    tokens_per_frame: int = TOKENS_480P,
    layers: int = 30,
    dim: int = 1536,
    ffn_dim: int = 8960,
    forwards: int = FEW_STEP_FORWARDS,
) -> ClipCost:
    """The cost of these chunks, each run `forwards` times.

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
