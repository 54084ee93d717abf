"""A rule that also reads blocks that have left the window, kept in a pool by the attention that they get."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pinned import to_device
from ..blocks import FrameBlocks
from ..selection import BlockSelection, FrameBudget, SelectionPlan, View
from .gated import Mass
from .light_forcing import UniformTopK

POOL_WINDOW = 9  # latent frames: with a pool of 3 they take 43 % less memory than 21, the paper's clip 42 % less


@dataclass(frozen=True)
class PersistentBlocks:
    """For each query block all of its head's persistent blocks, and the best key blocks of the window.

    persistent: how many blocks a head keeps of those that have left the window, as many as are in so many latent
    frames. Each time frames leave, those with the highest `importance` among them and the kept ones stay.

    Source: Sparse Forcing (PBSA), arXiv 2604.21221, whose models are trained with it. The paper measures importance in
    the first step of the chunk that reads; here it is by the clean queries of the chunk before, which a continued run
    computes again.
    """

    persistent: int = 3
    needs_means = True
    uses_sparsity = True

    def __post_init__(self) -> None:
        if self.persistent < 1:
            raise ValueError(f"persistent {self.persistent} keeps no block; use 1 latent frame or more, or policy topk")

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> "PoolPlan":
        pool = torch.arange(view.k_blocks, view.k_blocks + view.pool * view.k_layout.per_frame, dtype=torch.int32)
        return PoolPlan(UniformTopK().plan(view, sparsity, budget), to_device(pool, view.device))


@dataclass(frozen=True)
class PoolPlan:
    """A chunk's plan: a selection in the window, and the ids of the pool's blocks, int32, which come after it.

    `density` is relative to the window alone, and over 1 if the pool holds more than is skipped.
    """

    window: SelectionPlan
    pool: Tensor
    uneven = False
    tables = ()

    @property
    def kept(self) -> int:
        return self.window.kept + len(self.pool)

    @property
    def density(self) -> float:
        return self.kept / len(self.window.always)

    @property
    def kind(self) -> Hashable:
        return "pool", self.window.kind

    def of_layer(self, layer: int) -> "PoolPlan":
        return self  # nothing is selected before queries and keys are known

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        blocks, counts = self.window.select(q_means, k_means, frame_means, sub_means)
        pool = self.pool.expand(*counts.shape, -1)
        return BlockSelection(torch.cat([blocks, pool], dim=-1), counts + len(self.pool))


def importance(q_means: Tensor, k_means: Tensor, layout: FrameBlocks) -> Tensor:
    """The attention that each key block gets from all query blocks, by means of keys: [B, H, k_blocks].

    q_means, k_means: [B, blocks, H, D]. layout: of the key blocks, which count by their tokens.
    """
    lengths = layout.block_lengths(k_means.shape[1] // layout.per_frame, k_means.device)
    return Mass().scores(q_means, k_means, lengths).softmax(-1).sum(-2)
