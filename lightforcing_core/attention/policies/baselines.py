"""Policies to compare with: the newest frames, and the best blocks of all frames."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pinned import to_device
from ..selection import BlockSelection, FrameBudget, SelectionPlan, View, kept_blocks
from .light_forcing import Hierarchical


class UniformTopK(Hierarchical):
    """For each query block the best key blocks of all visible frames; no frame is favoured. As in LightX2V.

    Keeps max(1, ⌊(1 − sparsity) · blocks⌋) blocks. Scores and ties are those of `SelectionPlan`.
    """

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return super().plan(view, sparsity, FrameBudget(keep=len(view.slot_frames), sinks=0, near=0))


@dataclass(frozen=True)
class WindowPlan:
    """The same whole frames for every query block."""

    fixed: BlockSelection
    kept: int
    kind: str = "window"
    tables = ()

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        return self.fixed


class Window:
    """The chunk's own frames, then the first `budget.sinks` frames, then the newest ones, as far as blocks allow.

    Reads whole frames within ⌊(1 − sparsity) · blocks⌋ key blocks, but never less than the chunk itself.
    Source: StreamingLLM, arXiv 2309.17453.
    """

    needs_means = False

    def kept(self, view: View, sparsity: float) -> int:
        per_frame = view.k_layout.per_frame
        return max(view.current, kept_blocks(sparsity, view.k_blocks) // per_frame) * per_frame

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> WindowPlan:
        slots = sorted(range(len(view.slot_frames)), key=view.slot_frames.__getitem__)
        per_frame, kept = view.k_layout.per_frame, self.kept(view, sparsity)
        past, own = slots[: -view.current], slots[-view.current :]
        by_rank = past[: budget.sinks] + past[budget.sinks :][::-1]
        read = sorted(by_rank[: kept // per_frame - view.current] + own)
        blocks = torch.tensor([slot * per_frame + block for slot in read for block in range(per_frame)])
        rows = (view.batch, view.heads, view.q_blocks)
        counts = torch.full(rows, kept, dtype=torch.int32, device=view.device)
        listed = to_device(blocks.to(torch.int32), view.device).expand(*rows, kept)
        return WindowPlan(BlockSelection(listed, counts), kept)
