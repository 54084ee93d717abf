"""Hierarchical Sparse Attention: for each query block first the past frames, then the key blocks inside them.

Scores are inner products of block means (Light Forcing, arXiv 2602.04789, section on HSA): not scaled and not
softmaxed, because only their order matters. The rules that make a selection exact:

- of equal frames the oldest wins, of equal blocks the lowest id, that is the first in slot order;
- a NaN score counts as the lowest finite one, an infinite score as the nearest finite one;
- a block whose frame is not eligible is never kept.

Nothing here waits on the device: every count is a Python int. On a GPU a fused kernel makes the same selection.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..fast_path import FastPath, is_recording, why_no_kernels
from ..parallel.shares import WHOLE, Shares
from ..pinned import to_device
from .blocks import FrameBlocks, block_pair
from .roles import Roles

# How a block's share of attention is estimated: by the product of means, or by the log-sum-exp over sub-blocks.
ESTIMATORS = ("mean", "lse")

# Sub-blocks per key block, for the estimator "lse".
SUB_BLOCKS = 4


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
        # Invalid entries go to an extra column, which is dropped.
        mask.scatter_(-1, self.blocks.long().masked_fill(~valid, k_blocks), True)
        return mask[..., :k_blocks]


class FrameBudget(NamedTuple):
    """Past latent frames that a rule may favour: the fewest it keeps, and how many of them are first or nearest."""

    keep: int = 6
    sinks: int = 1
    near: int = 2

    def check(self) -> None:
        """ValueError unless 0 ≤ sinks + nearest ≤ keep."""
        for name, value in zip(("keep_frames", "sink_frames", "near_frames"), self, strict=True):
            if value < 0:
                raise ValueError(f"{name} {value} is negative; use 0 or more latent frames")
        if self.sinks + self.near > self.keep:
            raise ValueError(
                f"sink_frames {self.sinks} + near_frames {self.near} exceed keep_frames {self.keep}; "
                f"raise keep_frames to {self.sinks + self.near} or keep fewer sinks or nearest frames"
            )


class View(NamedTuple):
    """The frames that an open chunk can see, and how they are cut into blocks.

    slot_frames: the latent frames in the cache, in memory order.
    current: the number of them, the newest, that are the chunk's own.
    q_layout, k_layout: how a frame is cut into query and key blocks.
    batch, heads: of the model; of several `shares` the heads of this one.
    grid: rows and columns of tokens in a frame. tiles: blocks are patches of it, see `tile_order`.
    roles: of these heads, () if they are not known. changed: see `HeadRule.changed`, of the last commit.
    pool: slots with blocks that have left the window, see `PersistentBlocks`; they come after it.
    """

    slot_frames: Sequence[int]
    current: int
    q_layout: FrameBlocks
    k_layout: FrameBlocks
    batch: int
    heads: int
    device: torch.device | str | None = None
    grid: tuple[int, int] = (0, 0)
    tiles: bool = False
    roles: Roles = ()
    changed: Tensor | None = None
    pool: int = 0
    shares: Shares = WHOLE

    @property
    def in_time(self) -> list[int]:
        """The slots, oldest frame first."""
        return sorted(range(len(self.slot_frames)), key=self.slot_frames.__getitem__)

    @property
    def start(self) -> int:
        """The chunk's first latent frame: as many are committed."""
        return max(self.slot_frames) + 1 - self.current

    @property
    def q_blocks(self) -> int:
        """Query blocks per head."""
        return self.current * self.q_layout.per_frame

    @property
    def k_blocks(self) -> int:
        """Key blocks per head."""
        return len(self.slot_frames) * self.k_layout.per_frame


def kept_blocks(sparsity: float, k_blocks: int) -> int:
    """The key blocks of `k_blocks` that each query block keeps; truncated, as the published code does."""
    return max(1, int((1.0 - sparsity) * k_blocks))


@dataclass(frozen=True)
class SelectionPlan:
    """Rules by which blocks compete in one chunk; made once per chunk, read by every layer and step.

    `always` bool [k_blocks]: the blocks that are eligible for every query block. `middle_slots` int64 [m]: the
    slots that compete for the `choose` remaining places, oldest frame first (None when every block is eligible).
    `frame_ranks` int32 [slots] combines both: a slot's place in `middle_slots`, or −1 if its blocks are always
    eligible. `kept` is how many blocks each query block keeps. numbers, width: of a `steady` plan.
    """

    layout: FrameBlocks
    always: Tensor
    middle_slots: Tensor | None
    frame_ranks: Tensor
    choose: int
    kept: int
    numbers: Tensor | None = None
    width: int = 0
    uneven = False

    @classmethod
    def build(cls, view: View, sparsity: float, budget: FrameBudget) -> "SelectionPlan":
        """Plan for a chunk that skips the share `sparsity` of key blocks, in [0, 1)."""
        budget.check()
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity {sparsity} is outside [0, 1); 0 keeps every block, 0.88 skips 88 % of them")
        slot_frames, layout, k_blocks = view.slot_frames, view.k_layout, view.k_blocks
        past = view.in_time[: -view.current]
        ranks = torch.full((len(slot_frames),), -1, dtype=torch.int32)
        middle_slots, choose = None, 0
        kept = kept_blocks(sparsity, k_blocks) if past else k_blocks
        # The budget holds at any length: more frames than `budget.keep` are chosen if fewer do not hold `kept` blocks.
        keep = max(budget.keep, -(-kept // layout.per_frame) - view.current)
        if len(past) > keep:
            middle = past[budget.sinks : len(past) - budget.near]
            choose = keep - budget.sinks - budget.near
            ranks[middle] = torch.arange(len(middle), dtype=torch.int32)
            middle_slots = to_device(torch.tensor(middle), view.device)
        ranks = to_device(ranks, view.device)
        always = (ranks < 0).repeat_interleave(layout.per_frame)
        return cls(layout, always, middle_slots, ranks, choose, kept)

    @property
    def density(self) -> float:
        return self.kept / len(self.always)

    @property
    def kind(self) -> Hashable:
        """Whether frames are chosen before blocks; a steady plan always tries."""
        return "steady" if self.tables else self.choose > 0

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return () if self.numbers is None else (self.frame_ranks, self.numbers)

    def of_layer(self, layer: int) -> "SelectionPlan":
        return self  # nothing is selected before queries and keys are known

    def steady(self, slots: int, width: int) -> "SelectionPlan":
        """The same for all `slots` of a cache, so that every chunk launches the same work on lists of `width` entries.

        Slots that are not in use have rank −2. Its `tables` are the ranks, and as int32 the frames to choose, the
        blocks to keep and the number of key blocks in use. The plan itself if it keeps more than `width`.
        """
        if self.kept > width:
            return self
        numbers = torch.tensor((self.choose, self.kept, len(self.always)), dtype=torch.int32)
        ranks = torch.nn.functional.pad(self.frame_ranks, (0, slots - len(self.frame_ranks)), value=-2)
        return replace(self, frame_ranks=ranks, numbers=to_device(numbers, ranks.device), width=width)

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        """Choose frames, then blocks.

        q_means: [B, q_blocks, H, D].
        k_means, frame_means: [B, k_blocks, H, D] and [B, frames, H, D], in slot order.
        sub_means: [B, sub-blocks, H, D] in the layout `sub_block_layout(layout)`, for the estimator "lse": a block's
        score is then the log-sum-exp over its sub-blocks of q·k/√D + log(tokens in the sub-block), which a few strong
        keys can raise as they raise attention itself; a frame's score is the log-sum-exp of its blocks.
        """
        batch, q_blocks, heads = q_means.shape[:3]
        rows, k_blocks = (batch, heads, q_blocks), k_means.shape[1]
        if self.kept == k_blocks and not self.tables:
            every = torch.arange(k_blocks, dtype=torch.int32, device=q_means.device)
            return BlockSelection(every.expand(*rows, k_blocks), _constant(rows, k_blocks, q_means.device))
        if why_not_fused(q_means, k_means, frame_means, sub_means) is None:
            selection = _fast_path(q_means, sub_means).attempt(
                lambda: self._select_fused(q_means, k_means, frame_means, sub_means), "selecting through torch"
            )
            if selection is not None:
                return selection
        if self.tables:  # leave out slots that are not in use
            if is_recording():
                raise RuntimeError("blocks that torch selects differ in number from chunk to chunk")
            used = len(self.always)
            frames = used // self.layout.per_frame
            k_means, frame_means = k_means[:, :used], frame_means[:, :frames]
            sub_means = None if sub_means is None else sub_means[:, : sub_means.shape[1] * used // k_blocks]
        if sub_means is None:
            scores, frame_scores = mean_scores(q_means, k_means), mean_scores(q_means, frame_means)
        else:
            scores = lse_scores(q_means, sub_means, self.layout)
            frame_scores = scores.unflatten(-1, (-1, self.layout.per_frame)).logsumexp(-1)
        blocks = best(scores, self.kept, self._eligible(frame_scores)).to(torch.int32)
        return BlockSelection(blocks, _constant(rows, self.kept, q_means.device))

    def _eligible(self, frame_scores: Tensor) -> Tensor:
        """Boolean mask of eligible blocks, broadcastable to [B, H, q_blocks, k_blocks]."""
        if self.middle_slots is None or self.choose == 0:
            return self.always
        chosen = self.middle_slots[best(frame_scores[..., self.middle_slots], self.choose)]
        frames = torch.zeros_like(frame_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return frames.repeat_interleave(self.layout.per_frame, dim=-1) | self.always

    def _select_fused(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None
    ) -> BlockSelection:
        from ...kernels import selection as kernel

        parts = None
        if sub_means is not None:
            size = sub_block_layout(self.layout).block
            parts = kernel.Parts(sub_means, self.layout.tokens_per_frame, size, SUB_BLOCKS)
        chosen = kernel.select_blocks(
            q_means,
            k_means,
            frame_means,
            self.frame_ranks,
            choose=self.choose,
            kept=self.kept,
            parts=parts,
            numbers=self.numbers,
            width=self.width,
        )
        return BlockSelection(*chosen)


def mean_scores(q_means: Tensor, means: Tensor) -> Tensor:
    """Products of means [B, n, H, D] of queries and of keys, in float32 or wider: [B, H, q_blocks, k_blocks]."""
    wide = torch.promote_types(q_means.dtype, torch.float32)
    scores: Tensor = q_means.to(wide).transpose(1, 2) @ means.to(wide).permute(0, 2, 3, 1)
    return scores


def lse_scores(q_means: Tensor, sub_means: Tensor, layout: FrameBlocks) -> Tensor:
    """The log of the attention to the keys of each block, if its sub-blocks were uniform: [B, H, q_blocks, k_blocks].

    q_means [B, q_blocks, H, D], sub_means [B, sub-blocks, H, D]. layout: of the key blocks.
    """
    wide = torch.promote_types(q_means.dtype, torch.float32)
    subs = sub_block_layout(layout)
    tokens = subs.block_lengths(1, q_means.device).to(wide)
    scores = mean_scores(q_means.to(wide) * q_means.shape[-1] ** -0.5, sub_means)
    scores = scores.unflatten(-1, (-1, subs.per_frame)) + tokens.log()
    missing = layout.per_frame * SUB_BLOCKS - subs.per_frame  # of a frame's ragged last block
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    blocks: Tensor = scores.unflatten(-1, (-1, SUB_BLOCKS)).logsumexp(-1).flatten(-2)
    return blocks


def sub_block_layout(layout: FrameBlocks) -> FrameBlocks:
    """The layout of `layout`'s sub-blocks, which nest in its blocks; ValueError when they do not divide a block."""
    if layout.block % SUB_BLOCKS:
        raise ValueError(
            f"blocks of {layout.block} tokens do not split into {SUB_BLOCKS} sub-blocks; "
            f"use a multiple of {SUB_BLOCKS} or the estimator 'mean'"
        )
    return FrameBlocks(layout.tokens_per_frame, layout.block // SUB_BLOCKS)


def why_not_fused(q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None) -> str | None:
    """The reason why the fused kernel cannot select from these means, [B, n, H, D] each, or None."""
    if not q_means.is_cuda:
        return f"the fused kernel is for CUDA tensors, not for {q_means.device.type}"
    others = [k_means.dtype, frame_means.dtype, *([] if sub_means is None else [sub_means.dtype])]
    if set(others) != {q_means.dtype}:
        given = " and ".join(map(str, [q_means.dtype, *others]))
        return f"the fused kernel takes means of one dtype, not {given}"
    if reason := why_no_kernels() or _fast_path(q_means, sub_means).failure:
        return reason
    from ...kernels import selection as kernel

    return kernel.why_not(q_means, k_means.shape[1], frame_means.shape[1])


def _fast_path(q_means: Tensor, sub_means: Tensor | None) -> FastPath:
    detail = "parts" if sub_means is not None else "means"
    return FastPath("selection kernel", q_means.device, q_means.dtype, None, q_means.shape[-1], detail)


def _constant(shape: tuple[int, ...], value: int, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device=device)


def best(scores: Tensor, count: int, eligible: Tensor | None = None) -> Tensor:
    """Ids of each row's `count` highest scores, ascending: int64 [..., count]. The module's docstring gives the rules.

    scores [..., n], overwritten; eligible: bool, broadcastable to scores, with at least `count` in each row.
    """
    scores.nan_to_num_(nan=torch.finfo(scores.dtype).min)
    if eligible is not None:
        scores.masked_fill_(~eligible, -torch.inf)
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    # `topk` makes no promise about ties, so there are none: the score, as an integer of the same order, in the high
    # half and the id, backwards, in the low half. Adding 0 turns −0 into the 0 that it equals.
    bits = scores.add_(0.0).view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    backwards = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = order.to(torch.int64).mul_(1 << 32).add_(backwards)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(-1).values


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
    """The block mask of Hierarchical Sparse Attention, for whole q and k.

    q: [B, Lq, H, D], the current chunk; k: [B, Lk, H, D], history followed by the current chunk, both after RoPE
    and in whole frames of `tokens_per_frame` tokens. `block` is (query, key) tokens per block. `sparsity` in
    [0, 1) is the share of all key blocks that a query block skips; `keep_frames` past frames stay eligible, among
    them the first `sink_frames` and the last `near_frames`, and more if those do not hold the blocks to keep.

    Returns bool [B, H, q_blocks, k_blocks], blocks aligned to frames. Without history every block is kept; with
    `keep_frames` or fewer past frames every block competes. Raises ValueError for lengths that are not whole
    frames, a sparsity outside [0, 1) and impossible frame counts.

    Source: Light Forcing, arXiv 2602.04789; equal to the released selection if blocks divide the frame. If
    `keep_frames` hold too few blocks, the release adds any blocks of other frames instead of the next best frames.
    """
    q_layout, k_layout = (FrameBlocks(tokens_per_frame, size) for size in block_pair(block))
    q_frames, k_frames = q_layout.frames(q.shape[1]), k_layout.frames(k.shape[1])
    if q_frames > k_frames:
        raise ValueError(f"q holds {q_frames} frames but k only {k_frames}; k must end with the current chunk")
    view = View(range(k_frames), q_frames, q_layout, k_layout, q.shape[0], q.shape[2], k.device)
    plan = SelectionPlan.build(view, sparsity, FrameBudget(keep_frames, sink_frames, near_frames))
    k_means = k_layout.block_means(k)
    selection = plan.select(q_layout.block_means(q), k_means, k_layout.frame_means(k_means))
    return selection.to_mask(k_means.shape[1])
