"""A decoder's channel norm and SiLU in one launch, written behind the frames that the next convolution keeps.

One program owns a few positions of a picture with all their channels and goes through the frames: each value is read
once and written once, and the kept frames are replaced in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .bound import cdiv, launch
from .rounding import cast

MAX_CHANNELS = 2048
LAYOUT = torch.channels_last_3d


# Frames and picture sizes change from call to call; unspecialised, they cost no new compilation.
@triton.jit(do_not_specialize=["frames", "positions"])
def _norm_silu(
    x_ptr, past_ptr, gamma_ptr, out_ptr, frames, positions, scale, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = (rows < positions)[:, None] & (columns < CHANNELS)[None, :]
    tile = rows[:, None] * CHANNELS + columns[None, :]
    frame_size = positions.to(tl.int64) * CHANNELS
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * frames * frame_size
    past_ptr += batch * 2 * frame_size
    out_ptr += batch * (2 + frames) * frame_size
    older = tl.load(past_ptr + tile, mask=real)
    newer = tl.load(past_ptr + frame_size + tile, mask=real)
    tl.store(out_ptr + tile, older, mask=real)
    tl.store(out_ptr + frame_size + tile, newer, mask=real)
    tl.debug_barrier()  # all threads have read the kept frames
    if frames == 1:
        tl.store(past_ptr + tile, newer, mask=real)
    gain = tl.load(gamma_ptr + columns, mask=columns < CHANNELS).to(tl.float32) * scale
    for frame in range(frames):
        x = tl.load(x_ptr + frame * frame_size + tile, mask=real, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), eps)
        y = x / norm[:, None] * gain[None, :]
        y = cast(y * tl.sigmoid(y), out_ptr.dtype.element_ty)
        tl.store(out_ptr + (2 + frame) * frame_size + tile, y, mask=real)
        if frame + 2 >= frames:
            tl.store(past_ptr + (frame + 2 - frames) * frame_size + tile, y, mask=real)


def why_not(x: Tensor) -> str | None:
    """Why the kernel cannot take x [B, C, T, H, W], or None."""
    if x.shape[1] > MAX_CHANNELS or x[0, :, 0].numel() >= 2**31:
        return f"the decoder's norm takes up to {MAX_CHANNELS} channels and 2^31 values a frame, not {tuple(x.shape)}"
    return device.why_not("the decoder's norm", x)


def norm_silu_behind(past: Tensor, x: Tensor, gamma: Tensor, scale: float, eps: float) -> Tensor:
    """`past`, then SiLU(x / max(‖x‖, eps) · scale · gamma); the last two frames of the result replace `past`.

    past: [B, C, 2, H, W] in the layout `LAYOUT`. x: [B, C, T, H, W]. gamma: C values. Computed in float32 and rounded
    once. Returns [B, C, 2 + T, H, W] in `LAYOUT`. Raises ValueError when `why_not` gives a reason or a tensor is off.
    """
    if reason := why_not(x):
        raise ValueError(reason)
    batch, channels, frames, height, width = x.shape
    device.require("past", past, (batch, channels, 2, height, width), x.dtype, x.device)
    if not past.is_contiguous(memory_format=LAYOUT):
        raise ValueError(f"past has strides {past.stride()}, which are not those of {LAYOUT}")
    x = x.contiguous(memory_format=LAYOUT)
    out = torch.empty(
        (batch, channels, 2 + frames, height, width), dtype=x.dtype, device=x.device, memory_format=LAYOUT
    )
    padded = triton.next_power_of_2(channels)
    rows = max(1, 2048 // padded)
    grid = cdiv(height * width, rows), batch
    sizes = {"CHANNELS": channels, "PADDED": padded, "ROWS": rows, "num_warps": 4}
    launch(_norm_silu, grid, x, past, gamma, out, frames, height * width, scale, eps, **sizes)
    return out
