"""Rules that read as many key blocks as the scores of each query block ask for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...parallel.shares import WHOLE, Shares
from ...pinned import to_device
from ..blocks import FrameBlocks
from ..selection import BlockSelection, FrameBudget, View, best, kept_blocks, lse_scores, mean_scores


@dataclass(frozen=True)
class Mass:
    """The key blocks that get most of each query block's attention, if keys inside a block were equal.

    Each head and query block reads as many as it needs: `top_p` 0 shares the schedule's number of blocks among all of
    a layer by their attention; other values in (0, 1) read the largest until their sum is more than `top_p`. Sources:
    SpargeAttn, arXiv 2502.18137, and SVG2, arXiv 2505.18875, on blocks; ragged blocks count by their tokens.

    similarity: a mean does not stand for a block whose tokens are less alike than this, as SpargeAttn tests: all query
    blocks read such a key block, and such a query block reads everything. 0: no test. A test reads all keys once more.
    """

    top_p: float = 0.0
    similarity: float = 0.0
    needs_means = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.top_p < 1.0:
            raise ValueError(f"top_p {self.top_p} is outside [0, 1); use 0 for the schedule's sparsity, or 0.9")
        if not 0.0 <= self.similarity < 1.0:
            raise ValueError(f"similarity {self.similarity} is outside [0, 1); use 0 for no test, or 0.6")

    @property
    def uses_sparsity(self) -> bool:
        return not self.top_p

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> "GatedPlan":
        kept = kept_blocks(sparsity, view.k_blocks)
        density = None if self.top_p or self.similarity else kept / view.k_blocks
        share = 0 if self.top_p else kept
        return GatedPlan(self, view.k_layout, view.k_blocks, density, share, shares=view.shares)

    def scores(self, q_means: Tensor, k_means: Tensor, lengths: Tensor) -> Tensor:
        scores: Tensor = mean_scores(q_means, k_means) * q_means.shape[-1] ** -0.5
        return scores + lengths.log()

    def reads(self, plan: "GatedPlan", scores: Tensor) -> Tensor:
        shares = scores.softmax(-1)
        if self.top_p:
            return until_more_than(shares, self.top_p)
        shares = plan.shares.all_heads(shares.scatter(-1, shares.argmax(-1, keepdim=True), torch.inf))
        mask, rows = torch.zeros_like(shares, dtype=torch.bool), shares.flatten(1, 2).shape[1]
        chosen = best(shares.flatten(1), plan.budget * rows)
        return plan.shares.own_heads(mask.flatten(1).scatter_(1, chosen, True).view_as(mask))


@dataclass(frozen=True)
class MixtureOfBlocks:
    """Each query block's own key blocks, and the best others until their share of all scores is more than `share`.

    Scores are products of means, less the lowest of each row. Source: VMoBA, arXiv 2506.23858, on block
    means instead of single queries, without its cycle of spatial layers; the schedule's sparsity is not used.
    """

    share: float = 0.25
    similarity = 0.0
    needs_means = True
    uses_sparsity = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share {self.share} is outside (0, 1); the published one is 0.25")

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> "GatedPlan":
        size, starts = view.k_layout.block, torch.arange(0, view.q_layout.tokens_per_frame, view.q_layout.block)
        keys = torch.arange(view.k_layout.per_frame) * size
        shared = (keys < starts[:, None] + view.q_layout.block) & (starts[:, None] < keys + size)
        own = torch.zeros(view.current, *shared.shape[:1], len(view.in_time), *shared.shape[1:], dtype=torch.bool)
        for number, slot in enumerate(view.in_time[-view.current :]):
            own[number, :, slot] = shared
        own = to_device(own.view(view.q_blocks, view.k_blocks), view.device)
        return GatedPlan(self, view.k_layout, view.k_blocks, None, own=own)

    def scores(self, q_means: Tensor, k_means: Tensor, lengths: Tensor) -> Tensor:
        return mean_scores(q_means, k_means)

    def reads(self, plan: "GatedPlan", scores: Tensor) -> Tensor:
        weights = scores - scores.amin(-1, keepdim=True)
        assert plan.own is not None
        limit = self.share * weights.sum(-1, keepdim=True) - (weights * plan.own).sum(-1, keepdim=True)
        return until_more_than(weights.masked_fill(plan.own, -1.0), limit.clamp(min=0.0)) | plan.own


@dataclass(frozen=True)
class GatedPlan:
    """A chunk's plan by `rule`.

    budget: blocks per query block on average. own: bool [q_blocks, k_blocks], whether a key block is a query block's.
    alike: whether each query and each key block passes the rule's `similarity`, bool [B, H, blocks] both.
    """

    rule: Mass | MixtureOfBlocks
    layout: FrameBlocks
    kept: int
    density: float | None
    budget: int = 0
    own: Tensor | None = None
    alike: tuple[Tensor, Tensor] | None = None
    shares: Shares = WHOLE
    kind = "gated"
    uneven = True
    tables = ()

    def of_layer(self, layer: int) -> "GatedPlan":
        return self  # nothing is selected before queries and keys are known

    def seeing(self, queries: Tensor, keys: Tensor) -> "GatedPlan":
        """The plan for blocks of this self-similarity, [B, H, blocks] both."""
        return replace(self, alike=(queries > self.rule.similarity, keys > self.rule.similarity))

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        if sub_means is not None:
            scores = lse_scores(q_means, sub_means, self.layout)
        else:
            scores = self.rule.scores(q_means, k_means, self.layout.block_lengths(frame_means.shape[1], q_means.device))
        least = torch.finfo(scores.dtype).min
        scores.nan_to_num_(nan=least)
        if self.alike is None:
            return BlockSelection.from_mask(self.rule.reads(self, scores))
        queries, keys = self.alike[0][..., None], self.alike[1][:, :, None]
        return BlockSelection.from_mask(self.rule.reads(self, scores.masked_fill(~keys, least)) | ~keys | ~queries)


def until_more_than(weights: Tensor, limit: Tensor | float) -> Tensor:
    """The largest weights of each row until their sum is more than `limit` ≥ 0: bool, shaped as weights [..., n].

    At least the largest one; of equal weights the first ones.
    """
    falling = weights.sort(dim=-1, descending=True, stable=True)
    before = falling.values.cumsum(-1) - falling.values
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, falling.indices, before <= limit)
