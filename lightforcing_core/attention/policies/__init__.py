"""Attention policies by name."""

from ..selection import FrameBudget, View
from .base import Plan, Policy, SelectionRule
from .gated import Mass, MixtureOfBlocks
from .heads import DummyForcing, ForcingKV, HeadRule
from .light_forcing import Hierarchical, UniformTopK
from .rolling import RollingSink
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
    "forcing_kv": Policy(ForcingKV()),
    "dummy_forcing": Policy(DummyForcing()),
    "rolling_sink": Policy(None, RollingSink()),
}

__all__ = ["POLICIES", "FrameBudget", "HeadRule", "Plan", "Policy", "RollingSink", "SelectionRule", "View"]
