"""Policies to compare with: everything, the newest frames, and the best blocks wherever they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pinned import to_device
from ..selection import BlockSelection, SelectionPlan
from .base import FrameBudget, Policy, View


class UniformTopK:
    """For each query block the best key blocks of all visible frames; no frame is favoured.

    Keeps max(1, ⌊(1 − sparsity) · blocks⌋) blocks. Scores and ties are those of `SelectionPlan`.
    """

    needs_means = True

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return SelectionPlan.build(
            view.slot_frames,
            view.current,
            view.k_layout,
            sparsity=sparsity,
            keep_frames=len(view.slot_frames),
            sink_frames=0,
            near_frames=0,
            device=view.device,
        )


@dataclass(frozen=True)
class WindowPlan:
    """The same whole frames for every query block."""

    fixed: BlockSelection
    kept: int
    density: float
    kind: str = "window"

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        return self.fixed


class Window:
    """The chunk's own frames, then the first `budget.sinks` frames, then the newest ones, as far as blocks allow.

    Reads whole frames within ⌊(1 − sparsity) · blocks⌋ key blocks, but never less than the chunk itself.
    """

    needs_means = False

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> WindowPlan:
        slots, per_frame = view.slots_by_time, view.k_layout.per_frame
        past, own = slots[: -view.current], slots[-view.current :]
        affordable = int((1.0 - sparsity) * view.k_blocks) // per_frame - view.current
        by_rank = past[: budget.sinks] + past[budget.sinks :][::-1]
        read = sorted(by_rank[: max(0, affordable)] + own)
        blocks = torch.tensor([slot * per_frame + block for slot in read for block in range(per_frame)])
        rows = (view.batch, view.heads, view.q_blocks)
        kept = len(blocks)
        counts = torch.full(rows, kept, dtype=torch.int32, device=view.device)
        listed = to_device(blocks.to(torch.int32), view.device).expand(*rows, kept)
        return WindowPlan(BlockSelection(listed, counts), kept, kept / view.k_blocks)


DENSE = Policy("dense", "every visible key block, whatever the schedule's sparsity", "Self Forcing", None)
WINDOW = Policy(
    "window",
    "the first and the newest frames, as many as the sparsity leaves",
    "StreamingLLM, arXiv 2309.17453",
    Window(),
)
TOPK = Policy(
    "topk",
    "the best key blocks for each query block, wherever they are",
    "uniform block top-k, as in LightX2V",
    UniformTopK(),
)
