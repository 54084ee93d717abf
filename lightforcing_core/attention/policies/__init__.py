"""Attention policies by name."""

from .base import FrameBudget, Plan, Policy, SelectionRule, View
from .baselines import UniformTopK, Window
from .light_forcing import Hierarchical

POLICIES = {
    "light_forcing": Policy(Hierarchical()),
    "dense": Policy(None),
    "window": Policy(Window()),
    "topk": Policy(UniformTopK()),
}

__all__ = ["POLICIES", "FrameBudget", "Plan", "Policy", "SelectionRule", "View"]
