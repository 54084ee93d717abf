"""Hierarchical Sparse Attention: for each query block first the past frames, then the key blocks inside them.

Scores are inner products of block means (Light Forcing, arXiv 2602.04789, section on HSA). No score is scaled or
softmaxed: only their order matters. Nothing here waits on the device: every count is a Python int.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import FrameBlocks, block_pair


class BlockSelection(NamedTuple):
    """The key blocks that each query block attends to, as a compact list that never leaves the device.

    blocks: int32 [B, H, q_blocks, width], key-block ids, ascending; only the first `counts` entries of a row are
    valid, the rest are 0. counts: int32 [B, H, q_blocks].
    """

    blocks: Tensor
    counts: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> "BlockSelection":
        """The list form of a boolean mask [B, H, q_blocks, k_blocks]."""
        counts = mask.sum(-1, dtype=torch.int32)
        ids = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
        # Selected ids sort before the sentinel, so every row starts with its own ids in ascending order.
        blocks = torch.where(mask, ids, mask.shape[-1]).sort(-1).values
        return cls(blocks.masked_fill(blocks == mask.shape[-1], 0), counts)

    def to_mask(self, k_blocks: int) -> Tensor:
        """The mask form: bool [B, H, q_blocks, k_blocks]."""
        valid = torch.arange(self.blocks.shape[-1], device=self.blocks.device) < self.counts[..., None]
        mask = torch.zeros(*self.counts.shape, k_blocks + 1, dtype=torch.bool, device=self.blocks.device)
        # Invalid entries land in a column of their own, which is dropped.
        mask.scatter_(-1, self.blocks.long().masked_fill(~valid, k_blocks), True)
        return mask[..., :k_blocks]


@dataclass(frozen=True)
class SelectionPlan:
    """Which frame slots play which part for one chunk; made once per chunk, read by every layer and step.

    `always` bool [k_blocks]: the blocks that are eligible for every query block. `middle_slots` int64 [m]: the
    slots that compete for the `choose` remaining places (None when every block is eligible). `kept` is how many
    blocks each query block keeps.
    """

    layout: FrameBlocks
    always: Tensor
    middle_slots: Tensor | None
    choose: int
    kept: int

    @classmethod
    def build(
        cls,
        slot_frames: Sequence[int],
        current_frames: int,
        layout: FrameBlocks,
        *,
        sparsity: float,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        device: torch.device | str | None = None,
    ) -> "SelectionPlan":
        """Plan for slots that hold the latent frames `slot_frames` (in memory order).

        The `current_frames` newest frames are the current chunk, all others are past. `sparsity` in [0, 1) is the
        share of key blocks to skip; `keep_frames`, `sink_frames` and `near_frames` count past latent frames.
        """
        check_frame_budget(keep_frames, sink_frames, near_frames)
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity {sparsity} is outside [0, 1); 0 keeps every block, 0.88 skips 88 % of them")
        slots_by_time = sorted(range(len(slot_frames)), key=slot_frames.__getitem__)
        past, current = slots_by_time[:-current_frames], slots_by_time[-current_frames:]
        k_blocks = len(slot_frames) * layout.per_frame
        frame_is_eligible = torch.ones(len(slot_frames), dtype=torch.bool)
        middle_slots, choose, eligible = None, 0, k_blocks
        if len(past) > keep_frames:
            middle = past[sink_frames : len(past) - near_frames]
            choose = keep_frames - sink_frames - near_frames
            frame_is_eligible[middle] = False
            middle_slots = torch.tensor(middle, device=device)
            eligible = (keep_frames + len(current)) * layout.per_frame
        # Without a past the chunk is dense; the float product is truncated as the published code does.
        kept = max(1, min(int((1.0 - sparsity) * k_blocks), eligible)) if past else k_blocks
        always = frame_is_eligible.repeat_interleave(layout.per_frame).to(device)
        return cls(layout, always, middle_slots, choose, kept)

    def select(self, q_means: Tensor, k_means: Tensor, frame_means: Tensor) -> BlockSelection:
        """Choose frames, then blocks.

        q_means [B, q_blocks, H, D], k_means [B, k_blocks, H, D], frame_means [B, frames, H, D], the last two in
        slot order. Ties go to whichever `torch.topk` returns.
        """
        wide = torch.promote_types(q_means.dtype, torch.float32)
        q = q_means.to(wide).transpose(1, 2)
        k_blocks = k_means.shape[1]
        batch, heads, q_blocks = q.shape[:3]
        if self.kept == k_blocks:
            every = torch.arange(k_blocks, dtype=torch.int32, device=q.device)
            blocks = every.expand(batch, heads, q_blocks, k_blocks)
        else:
            scores = q @ k_means.to(wide).permute(0, 2, 3, 1)
            scores.masked_fill_(~self._eligible(q, frame_means.to(wide)), -torch.inf)
            blocks = scores.topk(self.kept, dim=-1, sorted=False).indices.sort(-1).values.to(torch.int32)
        counts = torch.full((batch, heads, q_blocks), blocks.shape[-1], dtype=torch.int32, device=q.device)
        return BlockSelection(blocks, counts)

    def _eligible(self, q: Tensor, frame_means: Tensor) -> Tensor:
        """Boolean mask of eligible blocks, broadcastable to [B, H, q_blocks, k_blocks]."""
        if self.middle_slots is None or self.choose == 0:
            return self.always
        frame_scores = q @ frame_means[:, self.middle_slots].permute(0, 2, 3, 1)
        chosen = self.middle_slots[frame_scores.topk(self.choose, dim=-1).indices]
        frames = torch.zeros(*q.shape[:3], frame_means.shape[1], dtype=torch.bool, device=q.device)
        frames.scatter_(-1, chosen, True)
        return frames.repeat_interleave(self.layout.per_frame, dim=-1) | self.always


def check_frame_budget(keep_frames: int, sink_frames: int, near_frames: int) -> None:
    """ValueError unless 0 ≤ sinks + nearest ≤ keep_frames."""
    for name, value in (("keep_frames", keep_frames), ("sink_frames", sink_frames), ("near_frames", near_frames)):
        if value < 0:
            raise ValueError(f"{name} {value} is negative; use 0 or more latent frames")
    if sink_frames + near_frames > keep_frames:
        raise ValueError(
            f"sink_frames {sink_frames} + near_frames {near_frames} exceed keep_frames {keep_frames}; "
            f"raise keep_frames to {sink_frames + near_frames} or keep fewer sinks or nearest frames"
        )


def hierarchical_block_mask(
    q: Tensor,
    k: Tensor,
    *,
    tokens_per_frame: int,
    block: tuple[int, int] = (64, 64),
    sparsity: float,
    keep_frames: int = 6,
    sink_frames: int = 1,
    near_frames: int = 2,
) -> Tensor:
    """The blocks that Hierarchical Sparse Attention keeps, for whole q and k (the rollout pools only once).

    q: [B, Lq, H, D], the current chunk; k: [B, Lk, H, D], history followed by the current chunk, both after RoPE
    and in whole frames of `tokens_per_frame` tokens. `block` is (query, key) tokens per block. `sparsity` in
    [0, 1) is the share of all key blocks that a query block skips; `keep_frames` past frames stay eligible, among
    them the first `sink_frames` and the last `near_frames`.

    Returns bool [B, H, q_blocks, k_blocks], blocks aligned to frames. Without history every block is kept; with
    `keep_frames` or fewer past frames every block competes. Raises ValueError for lengths that are not whole
    frames, a sparsity outside [0, 1) and impossible frame counts.

    Source: Light Forcing, arXiv 2602.04789; equal to the released selection where blocks divide the frame.
    """
    q_layout, k_layout = (FrameBlocks(tokens_per_frame, size) for size in block_pair(block))
    q_frames, k_frames = q_layout.frames(q.shape[1]), k_layout.frames(k.shape[1])
    if q_frames > k_frames:
        raise ValueError(f"q holds {q_frames} frames but k only {k_frames}; k must end with the current chunk")
    plan = SelectionPlan.build(
        range(k_frames),
        q_frames,
        k_layout,
        sparsity=sparsity,
        keep_frames=keep_frames,
        sink_frames=sink_frames,
        near_frames=near_frames,
        device=k.device,
    )
    k_means = k_layout.block_means(k)
    selection = plan.select(q_layout.block_means(q), k_means, k_layout.frame_means(k_means))
    return selection.to_mask(k_means.shape[1])
