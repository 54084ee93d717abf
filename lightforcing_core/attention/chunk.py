"""One chunk's attention, decided when it opens: plan, backend, reason if dense."""

from dataclasses import dataclass, replace

import torch

from .backends import DENSE, TRITON
from .backends.base import Call
from .dispatch import BackendChoice, announce, choose
from .options import AttentionOptions
from .policies import Plan, View
from .selection import SelectionPlan


@dataclass(frozen=True)
class ChunkAttention:
    """One chunk's attention; dense without a plan, for the reason `why_dense`.

    choice: the backend of a chunk that skips blocks. It may still fail and be replaced while the chunk runs.
    density: the share of visible key blocks that the chunk reads; 1 if that is not known before.
    """

    plan: Plan | None = None
    choice: BackendChoice | None = None
    why_dense: str | None = None
    density: float = 1.0

    def steady(self, slots: int, width: int) -> "ChunkAttention":
        """The same with a plan that is `SelectionPlan.steady`, if plan and backend allow it."""
        if isinstance(self.plan, SelectionPlan) and self.choice and self.choice.name == TRITON.name:
            return replace(self, plan=self.plan.steady(slots, width))
        return self

    @property
    def is_steady(self) -> bool:
        """Whether it launches the same work in every chunk that skips blocks."""
        return bool(self.plan and self.plan.tables and self.choice and self.choice.name == TRITON.name)

    @property
    def by_keys(self) -> bool:
        """Whether queries and keys decide how many blocks are read."""
        return self.plan is not None and self.plan.density is None

    @property
    def no_backend(self) -> str | None:
        """Why no sparse backend works, if the chunk is dense for that reason."""
        return self.choice.reason if self.choice and self.choice.name == DENSE.name else None


def plan_chunk(
    options: AttentionOptions, view: View, sparsity: float, head_dim: int, dtype: torch.dtype, stored: torch.dtype
) -> ChunkAttention:
    """Plan a chunk that skips the share `sparsity`, in [0, 1), of key blocks.

    dtype: of queries. stored: of keys and values in the cache. Raises `BackendUnavailable` if a named backend
    cannot run.
    """
    rule = options.rule
    if len(view.slot_frames) == view.current:
        return ChunkAttention(why_dense="it has no past frames")
    if sparsity == 0.0:
        return ChunkAttention(why_dense="its scheduled sparsity is 0")
    if rule is None:
        return ChunkAttention(why_dense=f"the attention policy {options.policy!r} reads everything")
    if options.head_rule is not None and (reason := options.head_rule.why_all(view)):
        return ChunkAttention(why_dense=reason)
    call = shapes_of(options, view, head_dim, dtype, stored)
    choice = choose(call, options.backend)
    if choice.name == DENSE.name:
        announce(choice, call.q.device)
        return ChunkAttention(choice=choice, why_dense=f"no sparse attention backend works here: {choice.reason}")
    plan = rule.plan(view, sparsity, options.budget)
    why_dense = None
    if plan.density == 1.0 and not view.pool:
        cause = f"a sparsity of {sparsity:g}" if rule.uses_sparsity else f"the policy {options.policy!r}"
        why_dense = f"{cause} leaves no whole block to skip among {view.k_blocks}"
    return ChunkAttention(plan, choice, why_dense, 1.0 if plan.density is None else plan.density)


def shapes_of(options: AttentionOptions, view: View, head_dim: int, dtype: torch.dtype, stored: torch.dtype) -> Call:
    """A call of the chunk's shapes, without data: one number serves each tensor."""

    def empty(rows: int, kind: torch.dtype) -> torch.Tensor:
        one = torch.empty(1, dtype=kind, device=view.device)
        return one.expand(view.batch, rows, view.heads, head_dim)

    tokens = view.q_layout.tokens_per_frame
    k_layout = replace(view.k_layout, padded=options.pads_frames)
    slots = len(view.slot_frames) + view.pool
    q, k = empty(view.current * tokens, dtype), empty(slots * k_layout.rows_per_frame, stored)
    means = empty(slots * k_layout.per_frame, dtype)
    return Call(q, k, k, view.q_layout, k_layout, tail=(means, means) if options.tail else None)
