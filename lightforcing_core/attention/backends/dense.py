"""Dense attention by ComfyUI or torch, for devices without a sparse backend."""

import torch
from torch import Tensor

from ..blocks import FrameBlocks
from ..quantised import dequantise_blocks
from .base import EIGHT_BIT, Backend, Call


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch, [B, L, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Dense(Backend):
    """Reads every block; 8-bit keys are widened one head at a time."""

    name = "dense"

    def why_not(self, call: Call) -> str | None:
        return None

    def workspace(self, call: Call) -> int:
        """Keys and values of one head of an 8-bit cache while they are dequantised."""
        if call.k.dtype not in EIGHT_BIT:
            return 0
        batch, tokens, _, dim = call.k.shape
        narrow = 0 if call.q.dtype == torch.float32 else batch * tokens * dim * call.q.dtype.itemsize
        # Values are widened in float32, multiplied by a scale for every token, and then get their dtype.
        return batch * tokens * (dim * call.q.dtype.itemsize + 4 * (dim + 1)) + narrow

    def run(self, call: Call) -> Tensor:
        q = call.q
        if call.scale is not None:
            q = q * (call.scale * q.shape[-1] ** 0.5)
        if call.scales is None:
            return (call.dense or sdpa)(q, call.k, call.v)
        out = torch.empty_like(q)
        for head in range(q.shape[2]):
            one = slice(head, head + 1)
            # The wider keys and values have no name here, so that they are freed before the next head's are made.
            out[:, :, one] = sdpa(q[:, :, one], *dequantised(call.k, call.v, call.scales, call.k_layout, one, q.dtype))
        return out


def dequantised(
    k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, heads: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The 8-bit keys and values of some heads, dequantised."""
    k_scales, v_scales = (x[:, :, heads] for x in scales)
    keys = dequantise_blocks(k[:, :, heads], k_scales, layout, dtype)
    return keys, dequantise_blocks(v[:, :, heads], v_scales, layout, dtype)
