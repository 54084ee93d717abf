"""Rules that keep as many key blocks as the schedule says, those with the best scores."""

from ..selection import FrameBudget, SelectionPlan, View


class Hierarchical:
    """For each query block the best frames among those that compete, then the best blocks of the eligible frames.

    Source: Light Forcing, arXiv 2602.04789.
    """

    needs_means = True
    uses_sparsity = True

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return SelectionPlan.build(view, sparsity, budget)


class UniformTopK(Hierarchical):
    """For each query block the best key blocks of all visible frames; no frame is favoured. As in LightX2V.

    Keeps max(1, ⌊(1 − sparsity) · blocks⌋) blocks. Scores and ties are those of `SelectionPlan`.
    """

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> SelectionPlan:
        return super().plan(view, sparsity, FrameBudget(keep=len(view.slot_frames), sinks=0, near=0))
