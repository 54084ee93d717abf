"""Dense attention by ComfyUI or torch, for devices without a sparse backend."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import machine
from ..blocks import FrameBlocks
from ..quantised import dequantise_blocks
from .base import EIGHT_BIT, Backend, Call, DenseAttention


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense attention through torch, [B, L, H, D] in and out. bias: [1, Lk], added to each key's scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(q, k, v)


# torch's own choice is not always the fastest.
TORCH_WAYS: dict[str, DenseAttention] = {
    "torch": sdpa,
    "cudnn": partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    "flash": partial(_sdpa_by, SDPBackend.FLASH_ATTENTION),
}
ONLY_CUDA = ("cudnn", "flash")

WORK = "dense attention of {1} queries to {4} keys, {0}×{2} heads of {3} in {5}"


class FastestDense:
    """Dense attention [B, L, H, D] in the way that was measured to be fastest, without proof the first one.

    preferred: by attention module, the way that its checkpoint asks for, which is not measured.
    """

    def __init__(
        self, ways: Mapping[str, DenseAttention] = TORCH_WAYS, preferred: Mapping[Any, DenseAttention] | None = None
    ) -> None:
        self.preferred = preferred or {}
        self.ways, self._usual = ways, next(iter(ways))
        self._on_cpu = [name for name in ways if name not in ONLY_CUDA]

    def __eq__(self, other: object) -> bool:
        """Equal for the same ways: a graph that was checked in one run is not checked again in the next."""
        return isinstance(other, FastestDense) and (self.ways, self.preferred) == (other.ways, other.preferred)

    def __hash__(self) -> int:
        return hash(tuple(self.ways))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def run(name: str) -> Tensor:
            return self.ways[name](q, k, v)

        names, facts = self.ways if q.is_cuda else self._on_cpu, (*q.shape, k.shape[1], q.dtype)
        usual, tolerance = self._usual, machine.TOLERANCE[q.dtype.itemsize > 2]
        return run(machine.choose(WORK, facts, q.device, names, run, incumbent=usual, tolerance=tolerance))


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
