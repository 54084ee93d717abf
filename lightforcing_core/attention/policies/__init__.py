"""Attention policies by name."""

from ..selection import FrameBudget, View
from .base import Plan, Policy, SelectionRule
from .baselines import UniformTopK, Window
from .light_forcing import Hierarchical

POLICIES = {
    "light_forcing": Policy(Hierarchical()),
    "dense": Policy(None),
    "window": Policy(Window()),
    "topk": Policy(UniformTopK()),
}

__all__ = ["POLICIES", "FrameBudget", "Plan", "Policy", "SelectionRule", "View"]
