"""Eight-bit keys and values: one scale per attention block and head, so that one outlier costs one block only."""

from typing import Literal

import torch
from torch import Tensor

from .blocks import FrameBlocks

# How the KV cache stores keys and values: in the model's dtype, or in eight bits.
KVDtype = Literal["same", "int8", "fp8"]
STORED: dict[KVDtype, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise_blocks(x: Tensor, layout: FrameBlocks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as stored · scale, rounded to nearest (ties to even).

    x: [B, frames · tokens_per_frame, H, D]; dtype: torch.int8 or torch.float8_e4m3fn. Returns stored, x's shape in
    `dtype`, and scales, float32 [B, frames · blocks per frame, H]: the largest magnitude of a block and head over
    127 or 448, and 1 for a block of zeros.
    """
    largest = _LARGEST[dtype]
    blocks = layout.pad(x).unflatten(1, (-1, layout.block)).float()
    scales = blocks.abs().amax((2, 4)) / largest
    scales.masked_fill_(scales == 0, 1.0)
    stored = blocks / scales[:, :, None, :, None]
    if dtype is torch.int8:
        stored = stored.round_()
    return layout.unpad(stored.clamp_(-largest, largest).to(dtype).flatten(1, 2)), scales


def dequantise_blocks(stored: Tensor, scales: Tensor, layout: FrameBlocks, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise_blocks`, in `dtype`: [B, frames · tokens_per_frame, H, D]."""
    blocks = layout.block_of_token(layout.frames(stored.shape[1]), stored.device)
    return stored.float().mul_(scales[:, blocks].unsqueeze(-1)).to(dtype)
