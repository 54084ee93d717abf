"""Attention policies by name."""

from ..selection import FrameBudget, View
from .base import Plan, Policy, SelectionRule
from .echo import EchoMemory
from .gated import GatedPlan, Mass, MixtureOfBlocks
from .heads import DummyForcing, ForcingKV, HeadRule
from .light_forcing import Hierarchical, UniformTopK
from .pool import PersistentBlocks
from .rolling import RollingSink
from .static import Radial, SlidingTile, SpatialBand, Window

POLICIES = {
    "light_forcing": Policy(Hierarchical(), standing="published"),
    "dense": Policy(None),
    "window": Policy(Window()),
    "topk": Policy(UniformTopK()),
    "mass": Policy(Mass(), standing="untrained"),
    "radial": Policy(Radial()),
    "sta": Policy(SlidingTile()),
    "svg1": Policy(SpatialBand()),
    "vmoba": Policy(MixtureOfBlocks()),
    "forcing_kv": Policy(ForcingKV(), standing="untrained"),
    "dummy_forcing": Policy(DummyForcing(), standing="untrained"),
    "rolling_sink": Policy(None, RollingSink(), standing="untrained"),
    "echo_forcing": Policy(None, EchoMemory(), standing="experimental"),
    "pbsa": Policy(PersistentBlocks(), standing="untrained"),
    "rolling_forcing": Policy(None, standing="published", joint=True),
}

__all__ = [
    "POLICIES",
    "FrameBudget",
    "GatedPlan",
    "HeadRule",
    "PersistentBlocks",
    "Plan",
    "Policy",
    "RollingSink",
    "SelectionRule",
    "View",
]
