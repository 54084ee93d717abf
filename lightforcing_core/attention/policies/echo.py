"""A cache rule that also shows single tokens of the past, chosen by what queries turn to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...refusal import Refusal
from .rolling import RollingSink

OFFSETS = 1, 2, 4, 8, 16  # latent frames ahead at which a key is scored
MOST_USES = 8  # chunks for which the published rule chooses one token
SHARPNESS = 3.0  # of the gate


@dataclass(frozen=True)
class EchoMemory(RollingSink):
    """Show first frames, then as many tokens as a chunk has, chosen in each layer, then the last chunk.

    The tokens are those of the last frames, as many as the window holds, that `token_scores` puts first, in time order
    and for all heads. They fill the places of whole frames, from left to right and from top to bottom.
    They are chosen by the clean queries of the chunk before, which a continued run computes again; the published rule
    asks the next chunk's first step. Its prompt tags, scene memory and decay are left out.

    Source: Echo-Forcing, arXiv 2605.16003.
    """

    memory = 1

    def fitted(self, window: int, longest_chunk: int) -> "RollingSink":
        if (uses := (window - longest_chunk) // longest_chunk) > MOST_USES:
            problem = f"{longest_chunk} could show a token of a window of {window} to {uses} chunks, over {MOST_USES}"
            least = window // (MOST_USES + 2) + 1
            raise Refusal("frames_per_chunk", problem, f"use {least} or more, or a smaller window")
        return super().fitted(window, longest_chunk)


def query_sums(q: Tensor) -> Tensor:
    """Means over tokens of queries before RoPE, and of their pairs' lengths: [B, L, H, D] → [B, H, 3 D / 2]."""
    return torch.cat([q, _lengths(q)], dim=-1).mean(1)


def turned_to(mean: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """The direction [B, H, D] and the weights of lengths [B, H, D / 2] by which keys are scored.

    mean, now: `query_sums` of all first chunks and of the last one. Lengths count as far as the last chunk's queries
    point where those of the first chunks do.
    """
    pairs = mean.shape[-1] // 3
    direction, lengths = mean.split([2 * pairs, pairs], dim=-1)
    likeness = torch.cosine_similarity(direction, now[..., : 2 * pairs], dim=-1)
    gate = torch.exp(SHARPNESS * (likeness - 1.0))[..., None]
    return direction, gate * (lengths - _lengths(direction))


def token_scores(keys: Tensor, direction: Tensor, weights: Tensor) -> Tensor:
    """Scores of keys before RoPE, [B, L, H, D] → [B, H, L].

    direction, weights: see `turned_to`, the direction turned ahead in time by RoPE and averaged over `OFFSETS`.
    """
    along = torch.einsum("blhd,bhd->bhl", keys, direction)
    return along + torch.einsum("blhd,bhd->bhl", _lengths(keys), weights)


def _lengths(x: Tensor) -> Tensor:
    """Lengths of RoPE's pairs (2i, 2i + 1): [..., D] → [..., D / 2]."""
    lengths: Tensor = torch.linalg.vector_norm(x.unflatten(-1, (-1, 2)), dim=-1)
    return lengths
