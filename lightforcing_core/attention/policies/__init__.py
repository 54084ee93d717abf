"""Attention policies by name.

A policy is a set of rules. Today it has one, which key blocks a query block reads; rules of what the cache holds and of
which frames are denoised together belong beside it in `Policy`, with today's behaviour as their default.
"""

from .base import FrameBudget, Plan, Policy, SelectionRule, View
from .baselines import DENSE, TOPK, WINDOW
from .light_forcing import LIGHT_FORCING

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (LIGHT_FORCING, DENSE, WINDOW, TOPK)}

__all__ = ["POLICIES", "FrameBudget", "Plan", "Policy", "SelectionRule", "View"]
