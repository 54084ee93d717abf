"""Rules that give each head the frames of its role, the same for all of its query blocks.

Sources: Forcing-KV, arXiv 2605.09681; Dummy Forcing, arXiv 2601.20499; both by their released code, in frames instead
of chunks. The schedule's sparsity is not used, except that a chunk of sparsity 0 is dense.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...pinned import to_device
from ..blocks import FrameBlocks
from ..roles import DYNAMIC, STATIC, Roles, dummy_forcing_roles, forcing_kv_roles
from ..selection import BlockSelection, FrameBudget, View, best, kept_blocks, lse_scores, mean_scores
from .static import FixedPlan

SEGMENTS = 6  # runs of blocks that a frame is cut into


@dataclass(frozen=True)
class HeadPlan(FixedPlan):
    """A chunk's lists of each layer; `selection` is the first layer's, or that of the layer that is asked.

    choosing: the heads of each layer that choose `chosen` blocks by their scores, bool [H, 1, 1], None if none does.
    layout: of key blocks.
    """

    layers: Sequence[BlockSelection] = ()
    chosen: int = 0
    choosing: Sequence[Tensor | None] = ()
    layout: FrameBlocks | None = None

    @property
    def kind(self) -> Hashable:
        return "heads", self.chosen

    def of_layer(self, layer: int) -> "BlockSelection | HeadPlan":
        lists, heads = self.layers[layer], self.choosing[layer] if self.choosing else None
        return lists if heads is None else replace(self, selection=lists, choosing=(heads,))

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        assert self.layout is not None
        (choosing,) = self.choosing
        assert choosing is not None
        scores = mean_scores(q_means, k_means) if sub_means is None else lse_scores(q_means, sub_means, self.layout)
        lists = self.selection.to_mask(k_means.shape[1])
        chosen = torch.zeros_like(lists).scatter_(-1, best(scores, self.chosen), True)
        return BlockSelection.from_mask(torch.where(choosing, chosen, lists))

    @classmethod
    def build(cls, view: View, masks: Tensor, roles: Tensor, kept: int, density: float) -> "HeadPlan":
        """masks: bool [roles, k_blocks] on the device, of at most `kept` blocks each; roles: int64 [layers, H]."""
        blocks, counts = BlockSelection.from_mask(masks)
        roles, rows = to_device(roles, masks.device), (view.batch, -1, view.q_blocks)
        by_layer = zip(blocks[:, :kept][roles].unsqueeze(2), counts[roles].unsqueeze(2), strict=True)
        layers = [BlockSelection(ids.expand(*rows, -1), each.expand(rows)) for ids, each in by_layer]
        return cls(layers[0], kept, density, uneven=True, layers=layers)


class HeadRule(ABC):
    """A rule that reads frames by the role of each head.

    sinks, near: the first and the newest past frames that it reads; a cache need not hold others.
    split: the committed frames from which roles decide. probe_frames: the visible frames, if the window has as many,
    from which on a clean pass shows the roles.
    """

    names: ClassVar[tuple[str, ...]]  # of the roles, by number
    probe_frames: ClassVar[int]
    sinks = 1
    near: int
    split: int
    needs_means = False
    uses_sparsity = False

    @property
    def segments(self) -> int:
        """How many segments `changed` finds."""
        return 0

    def check(self, roles: Roles) -> None:
        """ValueError unless these are roles of this rule."""
        numbers = {role for layer in roles for role in layer}
        if len({len(layer) for layer in roles}) > 1 or not numbers <= set(range(len(self.names))):
            meant = ", ".join(f"{number} for {name}" for number, name in enumerate(self.names))
            raise ValueError(f"roles must be as many numbers in each layer, {meant}; leave them out to probe them")

    def described(self, roles: Roles) -> str:
        counts = Counter(role for layer in roles for role in layer)
        return ", ".join(f"{name} {counts[number]}" for number, name in enumerate(self.names))

    def why_all(self, view: View) -> str | None:
        """The reason why a chunk reads everything visible, or None."""
        if not view.roles:
            return "the roles of its heads are not known yet"
        reads, past = self.sinks + self.near, len(view.slot_frames) - view.current
        if past < min(reads, view.start):
            return f"its window holds {past} past frames, fewer than the {reads} that the policy chooses from"
        return None

    @abstractmethod
    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> HeadPlan:
        """The plan of a chunk for which `why_all` gives no reason."""

    @abstractmethod
    def groups(self, past: int, own: int) -> Sequence[int]:
        """How many frames are in each group whose masses decide the roles; of the visible ones, oldest first."""

    @abstractmethod
    def decide(self, masses: Tensor) -> Roles:
        """The roles, from the `group_masses` of all layers, [layers, H, groups]; waits for the device."""

    def changed(self, keys_of: Callable[[int], Tensor], layout: FrameBlocks, roles: Roles) -> Tensor | None:
        """What the keys of a committed chunk say about its frames, for `View.changed`; see `ForcingKV`."""
        return None


@dataclass(frozen=True)
class ForcingKV(HeadRule):
    """The first frame, the last one and the chunk's own; dynamic heads read what changed most before the last one too.

    Frames are cut into six runs of blocks. Of those of the three frames before the last one, the `share` whose keys
    differ most from the next frame's are read, as `changed` finds them when a chunk is committed that began after
    `split` frames or more. Layer 0 has static heads only.

    blocks: an experiment: each query block of a dynamic head reads, instead of these, the share `blocks` of all visible
    blocks that score best, as in `topk`. 0: off.
    """

    split: int = 6
    share: float = 0.33
    blocks: float = 0.0
    names = ("static", "dynamic")
    probe_frames = 8
    near = 4

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share {self.share} is outside [0, 1]; the published one is 0.33")
        if not 0.0 <= self.blocks <= 1.0:
            raise ValueError(f"blocks {self.blocks} is outside [0, 1]; use 0 for the published frames, or 0.5")

    @property
    def needs_means(self) -> bool:  # type: ignore[override]
        return self.blocks > 0.0

    @property
    def segments(self) -> int:
        return 0 if self.blocks else round(3 * SEGMENTS * self.share)

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> HeadPlan:
        past, own = view.in_time[: -view.current], view.in_time[-view.current :]
        per_frame, segment = view.k_layout.per_frame, _segment_of_block(view.k_layout)
        changed = torch.empty(0, device=view.device) if view.changed is None else view.changed
        # Of each block whether static heads read it, and its segment's number, −1 outside the three frames.
        static, number = torch.full((2, len(view.slot_frames), per_frame), -1)
        static[[past[0], past[-1], *own]] = 1
        for place, slot in enumerate(past[-4:-1]):
            number[slot] = place * SEGMENTS + segment
        reads, numbers = to_device(torch.stack([static, number]).flatten(1), view.device)
        masks = torch.stack([reads > 0, (reads > 0) | (numbers[:, None] == changed).any(1)])
        kinds, kept = torch.tensor(view.roles), int((static > 0).sum())
        kinds[0] = 0
        mean = kept + len(changed) / SEGMENTS * per_frame * kinds.float().mean().item()
        most = min(kept + len(changed) * int(segment.bincount().max()), view.k_blocks)
        if not self.blocks:
            return HeadPlan.build(view, masks, kinds, most, mean / view.k_blocks)
        chosen = kept_blocks(1.0 - self.blocks, view.k_blocks)
        mean += (chosen - kept) * kinds.float().mean().item()
        plan = HeadPlan.build(view, masks, kinds, kept, mean / view.k_blocks)
        choosing = [to_device(heads[:, None, None], view.device) if heads.any() else None for heads in kinds > 0]
        return replace(plan, kept=max(kept, chosen), chosen=chosen, choosing=choosing, layout=view.k_layout)

    def described(self, roles: Roles) -> str:
        return super().described(((STATIC,) * len(roles[0]), *roles[1:]))

    def groups(self, past: int, own: int) -> Sequence[int]:
        return [1] * (past + own)

    def decide(self, masses: Tensor) -> Roles:
        return forcing_kv_roles(masses)

    def changed(self, keys_of: Callable[[int], Tensor], layout: FrameBlocks, roles: Roles) -> Tensor | None:
        """The segments of the three frames before the last one whose keys differ most from the next frame's.

        keys_of: gives the keys of a layer, [frames · tokens, H, D], oldest first, after RoPE. Those of dynamic heads
        count, of layer 1 as in the released code, or of the first layer after it that has some. None if no layer has,
        and for fewer than four frames. Returns int64 [segments], ascending: a segment's frame · 6 + its place.
        """
        layer = next((layer for layer, one in enumerate(roles) if layer and DYNAMIC in one), None)
        if layer is None or not self.segments:
            return None
        heads = [head for head, role in enumerate(roles[layer]) if role == DYNAMIC]
        frames = keys_of(layer).unflatten(0, (-1, layout.tokens_per_frame))[-4:]
        if len(frames) < 4:
            return None
        x = torch.stack([frames[:, :, head] for head in heads], dim=2).flatten(2).float()
        alike = torch.cosine_similarity(x[:-1], x[1:], dim=-1)
        # A product, because sums by index add in any order on a GPU. NaN of a segment without blocks is the highest.
        of_token = _segment_of_block(layout)[layout.block_of_token(1)]
        weights = torch.nn.functional.one_hot(of_token, SEGMENTS).float()
        means = alike @ to_device(weights / weights.sum(0), alike.device)
        return lowest(means.flatten(), self.segments)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` lowest scores [n], ascending; of equal ones the first."""
    return scores.sort(dim=0, stable=True).indices[:count].sort().values


def _segment_of_block(layout: FrameBlocks) -> Tensor:
    """The segment of each block of a frame, int64 [blocks]; the first segments are longer if blocks do not divide."""
    parts = torch.arange(layout.per_frame).tensor_split(SEGMENTS)
    return torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])


@dataclass(frozen=True)
class DummyForcing(HeadRule):
    """The first frame, the `near` last ones or only the last one, and the chunk's own, by the role of a head.

    Everything visible until `split` frames are committed. dummies: the share of heads that read only the last frame.
    """

    near: int = 3
    split: int = 6
    dummies: float = 0.5
    names = ("first", "near", "last")
    probe_frames = 6

    def __post_init__(self) -> None:
        if self.near < 1:
            raise ValueError(f"near {self.near} reads no near frame; the published numbers are 3 and 6")
        if not 0.0 <= self.dummies <= 1.0:
            raise ValueError(f"dummies {self.dummies} is outside [0, 1]; the published share is 0.5")

    def why_all(self, view: View) -> str | None:
        if view.start < self.split:
            return f"roles decide only after {self.split} frames"
        return super().why_all(view)

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> HeadPlan:
        past, own = view.in_time[: -view.current], view.in_time[-view.current :]
        masks = torch.zeros(len(self.names), len(view.slot_frames), view.k_layout.per_frame, dtype=torch.bool)
        for role, frames in enumerate((past[:1], past[-int(self.near) :], past[-1:])):
            masks[role, [*frames, *own]] = True
        kinds, counts = torch.tensor(view.roles), masks.flatten(1).sum(1)
        density = counts[kinds].float().mean().item() / view.k_blocks
        masks = to_device(masks.flatten(1), view.device)
        return HeadPlan.build(view, masks, kinds, int(counts[kinds].max()), density)

    def groups(self, past: int, own: int) -> Sequence[int]:
        return 1, past - 1, own

    def decide(self, masses: Tensor) -> Roles:
        return dummy_forcing_roles(masses, round(self.dummies * masses.shape[0] * masses.shape[1]))
