"""Hierarchical Sparse Attention of Light Forcing, arXiv 2602.04789."""

from ..selection import FrameBudget, SelectionPlan, View, kept_blocks


class Hierarchical:
    """For each query block the best frames among those that compete, then the best blocks of the eligible frames."""

    needs_means = True

    def kept(self, view: View, sparsity: float) -> int:
        return kept_blocks(sparsity, view.k_blocks)

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return SelectionPlan.build(view, sparsity, budget)
