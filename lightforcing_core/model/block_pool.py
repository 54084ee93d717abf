"""The pool of a KV cache: slots behind the window, in which each head keeps blocks of frames that have left it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.layer_memory import LayerMemory
from ..attention.blocks import FrameBlocks
from ..attention.selection import best


def keep_best(
    memory: LayerMemory, layout: FrameBlocks, sources: Sequence[int], first: int, frames: int, importance: Tensor
) -> None:
    """Copy the blocks of the slots `sources` that matter most into the `frames` slots from `first` on.

    layout: of keys and values in `memory`, whose sources may be among those slots.
    importance: [B, H, blocks], of each block in slot order.

    Blocks keep their order and, in 8 bits, their bits. Ragged last blocks compete among themselves alone, so that every
    slot of the pool has the layout of a frame.
    """
    per_frame, size = layout.per_frame, layout.block
    by_slot, full = importance.unflatten(-1, (-1, per_frame)), per_frame - layout.ragged
    for start, many in [(0, full)] * (full > 0) + [(full, 1)] * layout.ragged:
        scores = torch.stack([by_slot[..., slot, start : start + many] for slot in sources], -2).flatten(-2)
        chosen = best(scores, frames * many).transpose(1, 2)[:, :, None]  # [B, blocks, 1, H]
        tokens = min(size, layout.tokens_per_frame - start * size)
        for x in (*memory.stored, memory.key_means, memory.value_means):
            if x is None:
                continue
            rows, from_row, each = per_frame, start, 1
            if x is memory.keys or x is memory.values:
                rows, from_row, each = layout.rows_per_frame, start * size, tokens
            bits = x.view(torch.uint8) if x.dtype.itemsize == 1 else x  # FP8 cannot be gathered
            part = bits.unflatten(1, (-1, rows))[:, :, from_row : from_row + many * each]
            blocks = torch.stack([part[:, slot] for slot in sources], 1).unflatten(2, (many, each)).flatten(1, 2)
            index = chosen if x.ndim == 3 else chosen[..., None]
            kept = torch.take_along_dim(blocks, index, 1).unflatten(1, (frames, many)).flatten(2, 3)
            part[:, first : first + frames].copy_(kept)
