"""Hierarchical Sparse Attention of Light Forcing, arXiv 2602.04789."""

from ..selection import SelectionPlan
from .base import FrameBudget, View


class Hierarchical:
    """For each query block the best frames among those that compete, then the best blocks of the eligible frames."""

    needs_means = True

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return SelectionPlan.build(
            view.slot_frames,
            view.current,
            view.k_layout,
            sparsity=sparsity,
            keep_frames=budget.keep,
            sink_frames=budget.sinks,
            near_frames=budget.near,
            device=view.device,
        )
