"""Attention policies by name.

A policy is a set of rules. Today it has one, which key blocks a query block reads. A rule for what the cache holds, or
for which frames are denoised together, is another field of `Policy` with today's behaviour as its default.
"""

from .base import FrameBudget, Plan, Policy, SelectionRule, View
from .baselines import DENSE, TOPK, WINDOW
from .light_forcing import LIGHT_FORCING

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (LIGHT_FORCING, DENSE, WINDOW, TOPK)}

__all__ = ["POLICIES", "FrameBudget", "Plan", "Policy", "SelectionRule", "View"]
