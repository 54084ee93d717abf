"""Channel norm and SiLU behind the frames that a convolution keeps: one kernel on a GPU, else torch's operations."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fast_path import FastPath, why_no_kernels

DEVICES = ("cuda",)  # devices on which the kernel runs; tests add the CPU, for Triton's interpreter
EPS = 1e-12  # of `F.normalize`


def joined(past: Tensor, x: Tensor, norm: Any | None) -> Tensor:
    """`past`, then x after `norm` and SiLU; `past` becomes the last frames of the result.

    past: [B, C, 2, H, W]. x: [B, C, T, H, W] → [B, C, 2 + T, H, W]. norm: a Wan VAE's channel norm, or None for x as
    it is. On a CPU and in the kernel the norm and SiLU are computed in float32 (float64 from float64), rounded once.
    """
    kept, (batch, channels, count, *size) = past.shape[2], x.shape
    if norm is None:
        frames = torch.cat([past, x], dim=2)
    else:
        if x.device.type in DEVICES and why_no_kernels() is None:
            from ...kernels import channel_norm as kernel

            if kernel.why_not(x) is None:
                run = partial(kernel.norm_silu_behind, past, x, norm.gamma, norm.scale, EPS)
                path = FastPath("fused VAE norm", x.device, x.dtype, detail=channels)
                if (fused := path.attempt(run, "running torch's operations")) is not None:
                    return fused
        # On a CPU float32 is faster than 16 bits; on a GPU it would double the memory traffic.
        y = x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x
        y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min_(EPS)
        y *= norm.scale * norm.gamma.to(y)
        shape = batch, channels, kept + count, *size
        frames = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        frames[:, :, :kept], frames[:, :, kept:] = past, F.silu(y, inplace=True)
    past.copy_(frames[:, :, -kept:])
    return frames
