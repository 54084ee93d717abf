"""What flex_attention is told of a selection: lists of full and of masked blocks, and the rule inside masked ones.

Keys are padded to whole blocks, frame by frame. A pooled tail stands behind them as more keys, one per block.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import FrameBlocks
from .selection import BlockSelection

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def split_ragged(
    selection: BlockSelection, layout: FrameBlocks, k_blocks: int
) -> tuple[BlockSelection, BlockSelection]:
    """The listed blocks that are full, and those that are a frame's ragged last one, each k_blocks wide."""
    blocks, counts = selection
    if not layout.ragged:
        # flex on CPU insists on lists as wide as there are key blocks, of which it reads only `counts`, and takes
        # them for contiguous.
        wide = torch.nn.functional.pad(blocks, (0, k_blocks - blocks.shape[-1])).contiguous()
        counts = counts.contiguous()
        return BlockSelection(wide, counts), BlockSelection(torch.zeros_like(wide), torch.zeros_like(counts))
    mask = selection.to_mask(k_blocks)
    is_ragged = torch.arange(k_blocks, device=blocks.device) % layout.per_frame == layout.per_frame - 1
    return BlockSelection.from_mask(mask & ~is_ragged), BlockSelection.from_mask(mask & is_ragged)


@functools.lru_cache(maxsize=64)
def inside_frame_rule(tokens_per_frame: int, padded: int) -> MaskMod:
    """A flex mask_mod that is true for real key tokens; cached because torch.compile guards on its identity."""

    def inside_frame(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return k_token % padded < tokens_per_frame

    return inside_frame


def followed_by(x: Tensor, means: Tensor, block: int) -> Tensor:
    """x [B, L, H, D], then means [B, n, H, D], then zeros up to whole blocks."""
    padding = -means.shape[1] % block
    return torch.cat([x, means, means.new_zeros(means.shape[0], padding, *means.shape[2:])], dim=1)


def with_tail(
    whole: BlockSelection, masked: BlockSelection, k_blocks: int, all_blocks: int
) -> tuple[BlockSelection, BlockSelection]:
    """The lists of full and of masked blocks, as wide as there are blocks now; all blocks of the tail are masked."""
    tail = torch.arange(k_blocks, all_blocks, dtype=torch.int32, device=whole.blocks.device)
    blocks = torch.cat([tail.expand(*masked.counts.shape, -1), masked.blocks], dim=-1)
    wide = torch.nn.functional.pad(whole.blocks, (0, len(tail)))
    return BlockSelection(wide, whole.counts), BlockSelection(blocks, masked.counts + len(tail))


def tail_rules(
    selection: BlockSelection, layout: FrameBlocks, k_blocks: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which keys of masked blocks a query block sees, and what is added to their scores.

    visible: bool [B, H, q_blocks, k_blocks + 2], whether a query block sees keys of each kind; column: int64 [keys],
    the kind: 0 real tokens, 1 + b the mean of block b, the last one padding; bias: float32 [keys], log(count) of means.
    """
    device, real = selection.blocks.device, k_blocks * layout.block
    column = torch.full((keys,), k_blocks + 1, dtype=torch.int64, device=device)
    column[:real].unflatten(0, (-1, layout.padded_tokens_per_frame))[:, : layout.tokens_per_frame] = 0
    column[real : real + k_blocks] = torch.arange(1, k_blocks + 1, device=device)
    bias = torch.zeros(keys, dtype=torch.float32, device=device)
    bias[real : real + k_blocks] = layout.block_lengths(k_blocks // layout.per_frame, device).log()
    skipped = ~selection.to_mask(k_blocks)
    visible = torch.cat([torch.ones_like(skipped[..., :1]), skipped, torch.zeros_like(skipped[..., :1])], dim=-1)
    return visible, column, bias


def one_of_rule(visible: Tensor, column: Tensor, block_q: int) -> MaskMod:
    """A flex mask_mod that looks a key's kind up; torch.compile takes the tensors as inputs, so no call recompiles."""

    def one_of(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return visible[batch, head, q_token // block_q, column[k_token]]

    return one_of
