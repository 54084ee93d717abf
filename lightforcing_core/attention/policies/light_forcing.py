"""Hierarchical Sparse Attention of Light Forcing: first past frames, then key blocks inside them."""

from ..selection import SelectionPlan
from .base import FrameBudget, Policy, View


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


LIGHT_FORCING = Policy(
    "light_forcing",
    "the best past frames for each query block, then the best key blocks inside them",
    "Light Forcing, arXiv 2602.04789",
    Hierarchical(),
)
