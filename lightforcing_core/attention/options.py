"""The options of sparse attention, and their checks."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

from .backends import BACKEND_NAMES, BACKENDS
from .blocks import block_pair
from .policies import POLICIES, HeadRule, PersistentBlocks, RollingSink, SelectionRule
from .roles import Roles
from .selection import ESTIMATORS, FrameBudget

# Options of earlier versions that saved runs and graphs may still hold; they no longer have an effect.
RETIRED = frozenset({"reuse_steps"})
MOST = 1_000_000  # that a setting of a policy can be
_log = logging.getLogger(__name__)


class Pools(NamedTuple):
    """Means that the KV cache must keep: of key blocks and frames, of value blocks, of parts of key blocks.

    padded: whether a frame's keys and values take whole blocks of rows, for backends that read only whole blocks.
    """

    keys: bool = False
    values: bool = False
    parts: bool = False
    padded: bool = False


@dataclass(frozen=True)
class AttentionOptions:
    """How a rollout does sparse attention. Raises ValueError with a remedy.

    backend: "auto" or one of `BACKEND_NAMES`.
    block: (query, key) tokens per block, powers of two from 16 on.
    keep_frames, sink_frames, near_frames: the past latent frames that stay eligible for selection (more if those
    hold too few blocks for a chunk's density), and how many of them are the first and the nearest ones.
    policy: one of `POLICIES`. settings: of its rules, by name; the others have their defaults.
    roles: of the model's heads, for policies that read by role; () lets an early clean pass of the run decide them.

    Options beyond the published method:
    estimator: "lse" scores a block by its parts, see `SelectionPlan.select`.
    tail: skipped blocks enter the softmax as their mean.
    tiles: blocks are compact patches of the picture instead of runs of its rows.
    """

    backend: str = "auto"
    block: tuple[int, int] = (64, 64)
    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2
    estimator: str = "mean"
    tail: bool = False
    tiles: bool = False
    policy: str = "light_forcing"
    settings: tuple[tuple[str, float], ...] = ()
    roles: Roles = ()

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_block(self.block)
        self.budget.check()
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator {self.estimator!r} is not known; use one of {', '.join(ESTIMATORS)}")
        if self.policy not in POLICIES:
            raise ValueError(f"attention policy {self.policy!r} is not known; use one of {', '.join(POLICIES)}")
        known = POLICIES[self.policy].settings
        for name, value in self.settings:
            if name not in known:
                others = f"its settings are {', '.join(known)}" if known else "it has none"
                raise ValueError(f"attention policy {self.policy!r} has no setting {name!r}; {others}")
            whole = isinstance(known[name], int)
            if type(value) not in (int, float) or not abs(value) <= MOST or (whole and value != int(value)):
                kind = "whole number" if whole else "number"
                raise ValueError(f"setting {name} {value!r:.80} of policy {self.policy!r} is no {kind} up to {MOST:,}")
        _ = self.rule, self.cache_rule  # check the settings' values
        if self.roles and self.head_rule is None:
            raise ValueError(f"attention policy {self.policy!r} does not read by roles of heads; leave roles out")
        if self.head_rule is not None:
            self.head_rule.check(self.roles)

    def to_saved(self) -> dict[str, Any]:
        """Plain values for a saved run, readable by versions that have the policy."""
        facts = asdict(self)
        if self.policy == "light_forcing":
            del facts["policy"]
        for name in ("settings", "roles"):
            if not facts[name]:
                del facts[name]
        return facts

    @classmethod
    def from_saved(cls, facts: Mapping[str, Any]) -> "AttentionOptions":
        """The options that a saved run holds, of this version or an earlier one."""
        if facts.get("reuse_steps", 1) != 1:
            _log.warning("[Light Forcing] reuse_steps of the saved run is ignored: every step selects its blocks anew")
        kept = {name: value for name, value in facts.items() if name not in RETIRED}
        settings = tuple((name, value) for name, value in kept.get("settings", ()))
        roles = tuple(tuple(map(int, layer)) for layer in kept.get("roles", ()))
        return cls(**{**kept, "block": tuple(kept["block"]), "settings": settings, "roles": roles})

    @functools.cached_property
    def rule(self) -> SelectionRule | None:
        """The policy's selection rule with its settings; None reads everything."""
        rule: SelectionRule | None = self._with_settings(POLICIES[self.policy].selection)
        return rule

    @functools.cached_property
    def cache_rule(self) -> RollingSink | None:
        """The policy's cache rule with its settings; None keeps sinks and the newest frames."""
        rule: RollingSink | None = self._with_settings(POLICIES[self.policy].cache)
        return rule

    def _with_settings(self, rule: Any) -> Any:
        own = {one.name for one in fields(rule)} if is_dataclass(rule) else set()
        values = {name: value for name, value in self.settings if name in own}
        return replace(rule, **values) if values else rule

    @property
    def head_rule(self) -> HeadRule | None:
        """The rule if it reads by roles of heads."""
        return self.rule if isinstance(self.rule, HeadRule) else None

    @property
    def pool_rule(self) -> PersistentBlocks | None:
        """The rule if it keeps blocks that have left the window."""
        return self.rule if isinstance(self.rule, PersistentBlocks) else None

    @property
    def joint(self) -> bool:
        """Whether several chunks are denoised at once, see `Policy`."""
        return POLICIES[self.policy].joint

    @property
    def policy_text(self) -> str:
        """The policy for display, with its settings and the schedule's part in it."""
        policy, rule = POLICIES[self.policy], self.rule
        settings = (f"{name} {value:g}" for name, value in self.settings)
        text = ", ".join([f"{self.policy} ({policy.standing})", *settings])
        return text if rule is None or rule.uses_sparsity else f"{text}; decides itself how much it reads"

    @property
    def budget(self) -> FrameBudget:
        return FrameBudget(self.keep_frames, self.sink_frames, self.near_frames)

    def pools(self, *, sparse: bool) -> Pools:
        """The means that a run's cache keeps; sparse: whether anything is skipped."""
        rule = self.rule
        if rule is None or not sparse:
            return Pools()
        parts = rule.needs_means and self.estimator == "lse"
        return Pools(rule.needs_means or self.tail, self.tail, parts, self.pads_frames)

    @property
    def pads_frames(self) -> bool:
        """Whether the named backend reads whole blocks only."""
        return any(one.pads_frames for one in BACKENDS if one.name == self.backend)


def check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKEND_NAMES:
        raise ValueError(f"unknown attention backend {backend!r}; use 'auto', {', '.join(map(repr, BACKEND_NAMES))}")


def check_block(block: tuple[int, int]) -> None:
    for side, size in zip(("query", "key"), block_pair(block), strict=True):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{side} block of {size} tokens is not a power of two from 16 on; use 64 or 128")
