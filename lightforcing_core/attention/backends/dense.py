"""Dense attention as ComfyUI or torch computes it, for "auto" on a device without a sparse backend."""

import torch
from torch import Tensor

from ..blocks import FrameBlocks
from ..quantised import dequantise_blocks
from .base import EIGHT_BIT, Backend, Call, Result


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch, [B, L, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Dense(Backend):
    """Reads every block, whatever is selected: quality can only rise. 8-bit keys are widened one head at a time."""

    name = "dense"

    def why_not(self, call: Call) -> str | None:
        return "dense attention gives no log-sum-exp" if call.wants_lse else None

    def workspace(self, call: Call) -> int:
        return widened_bytes(call.k, call.q.dtype) if call.k.dtype in EIGHT_BIT else 0

    def run(self, call: Call) -> Result:
        q = call.q
        if call.scale is not None:
            q = q * (call.scale * q.shape[-1] ** 0.5)
        if call.scales is not None:
            return Result(dense_by_head(q, call.k, call.v, call.scales, call.k_layout))
        return Result((call.dense or sdpa)(q, call.k, call.v))


def dense_by_head(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], k_layout: FrameBlocks) -> Tensor:
    """Dense attention over an 8-bit cache, of which one head at a time is dequantised."""
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        out[:, :, head : head + 1] = _attended(q, k, v, scales, k_layout, slice(head, head + 1))
    return out


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, heads: slice
) -> Tensor:
    """Dense attention of some heads, whose dequantised keys and values are gone when it returns."""
    return sdpa(q[:, :, heads], *dequantised(k, v, scales, layout, heads, q.dtype))


def dequantised(
    k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, heads: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Some heads of 8-bit keys and values as plain numbers."""
    k_scales, v_scales = (x[:, :, heads] for x in scales)
    keys = dequantise_blocks(k[:, :, heads], k_scales, layout, dtype)
    return keys, dequantise_blocks(v[:, :, heads], v_scales, layout, dtype)


def widened_bytes(k: Tensor, dtype: torch.dtype) -> int:
    """The most bytes of keys and values while one head of an 8-bit cache k [B, L, H, D] is dequantised to `dtype`."""
    numbers = k.shape[0] * k.shape[1] * k.shape[3]
    # Values are widened in float32, multiplied by a scale for every token, and then get their dtype.
    float32 = 4 * (numbers + k.shape[0] * k.shape[1])
    return numbers * dtype.itemsize + float32 + (0 if dtype == torch.float32 else numbers * dtype.itemsize)
