"""Attention policies by name."""

from ..selection import FrameBudget, View
from .base import Plan, Policy, SelectionRule
from .gated import Mass, MixtureOfBlocks
from .light_forcing import Hierarchical, UniformTopK
from .static import Radial, SlidingTile, SpatialBand, Window

POLICIES = {
    "light_forcing": Policy(Hierarchical()),
    "dense": Policy(None),
    "window": Policy(Window()),
    "topk": Policy(UniformTopK()),
    "mass": Policy(Mass()),
    "radial": Policy(Radial()),
    "sta": Policy(SlidingTile()),
    "svg1": Policy(SpatialBand()),
    "vmoba": Policy(MixtureOfBlocks()),
}

__all__ = ["POLICIES", "FrameBudget", "Plan", "Policy", "SelectionRule", "View"]
