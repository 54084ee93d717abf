"""Element-wise steps of a layer, one launch each: modulated norm and gated sum.

One program owns one token, or a few of one frame, with whole rows in registers: x is read once and written once.
Scale, shift and gate differ from frame to frame, as an autoregressive rollout's time steps do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .rounding import cast

MAX_WIDTH = 8192


@triton.jit
def _place(tokens_per_frame, frames, ROWS: tl.constexpr):
    """This program's first token, its place in the frame, its frame and batch row."""
    per_frame = tl.cdiv(tokens_per_frame, ROWS)
    program = tl.program_id(0)
    frame = program // per_frame
    within = (program % per_frame) * ROWS
    first = frame.to(tl.int64) * tokens_per_frame + within
    return first, within, frame % frames, (frame // frames).to(tl.int64)


@triton.jit
def _tile(first, within, tokens_per_frame, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of the program's values [ROWS, PADDED], mask of the real ones, columns."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = (within + rows < tokens_per_frame)[:, None] & (columns < WIDTH)[None, :]
    return first * WIDTH + rows[:, None] * WIDTH + columns[None, :], real, columns


# A rollout's frames change from chunk to chunk; unspecialised, they cost no new compilation.
@triton.jit(do_not_specialize=["frames", "tokens_per_frame"])
def _norm_scale_shift(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    scale_stride_b,
    scale_stride_f,
    shift_stride_b,
    shift_stride_f,
    tokens_per_frame,
    frames,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    first, within, frame, batch = _place(tokens_per_frame, frames, ROWS)
    tile, real, columns = _tile(first, within, tokens_per_frame, WIDTH, PADDED, ROWS)
    column_is_real = columns < WIDTH
    x = tl.load(x_ptr + tile, mask=real, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + batch * scale_stride_b + frame * scale_stride_f + columns, mask=column_is_real)
    shift = tl.load(shift_ptr + batch * shift_stride_b + frame * shift_stride_f + columns, mask=column_is_real)
    mean = tl.sum(x, 1) / WIDTH
    x = tl.where(real, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    y = x * inverse[:, None] * (1.0 + scale.to(tl.float32))[None, :] + shift.to(tl.float32)[None, :]
    tl.store(out_ptr + tile, cast(y, out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["frames", "tokens_per_frame"])
def _gated_add(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    gate_stride_b,
    gate_stride_f,
    tokens_per_frame,
    frames,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    first, within, frame, batch = _place(tokens_per_frame, frames, ROWS)
    tile, real, columns = _tile(first, within, tokens_per_frame, WIDTH, PADDED, ROWS)
    column_is_real = columns < WIDTH
    x = tl.load(x_ptr + tile, mask=real, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + tile, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + batch * gate_stride_b + frame * gate_stride_f + columns, mask=column_is_real)
    out = x + y * gate.to(tl.float32)[None, :]
    tl.store(out_ptr + tile, cast(out, out_ptr.dtype.element_ty), mask=real)


def launch_options(width: int) -> dict[str, int]:
    """Padded width, rows and warps: 4,096 values or one row, 16 values a thread."""
    padded = triton.next_power_of_2(width)
    rows = max(1, 4096 // padded)
    return {"PADDED": padded, "ROWS": rows, "num_warps": rows * padded // 512}


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take x [B, L, D], or None."""
    if x.shape[-1] > MAX_WIDTH or x.shape[-1] % 8:
        return f"the modulation kernels take widths up to {MAX_WIDTH} in eights, not {x.shape[-1]}"
    return device.why_not("the modulation kernel", x)


def norm_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift, the norm without weights of its own.

    x: [B, F · tokens, D]; scale, shift: [B, F or 1, D], any strides if channels are contiguous. All in
    float32, rounded once at the end: closer than the unfused steps, which also round the norm and 1 + scale.
    Returns a contiguous tensor like x. Raises ValueError when `why_not` gives a reason or a shape or dtype is off.
    """
    return _launch(_norm_scale_shift, (x,), (scale, shift), eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y · gate, computed in float32 and rounded once, as `torch.addcmul` does; else like `norm_scale_shift`."""
    return _launch(_gated_add, (x, y), (gate,))


def _launch(kernel: Any, tokens: tuple[Tensor, ...], modulations: tuple[Tensor, ...], *numbers: float) -> Tensor:
    """Check the tensors, then run the kernel on tokens and per-frame modulations."""
    x = tokens[0]
    if reason := why_not(x):
        raise ValueError(reason)
    for y in tokens:
        device.require("y", y, tuple(x.shape), x.dtype, x.device)
    batch, length, width = x.shape
    frames = modulations[0].shape[1]
    for part in modulations:
        if part.shape != (batch, frames, width) or part.dtype != x.dtype or part.stride(-1) != 1 or length % frames:
            raise ValueError(
                f"a modulation {part.dtype} {tuple(part.shape)} with strides {part.stride()} does not fit "
                f"x {x.dtype} {tuple(x.shape)}; it is [B, F or 1, D] for whole frames, with contiguous channels"
            )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = launch_options(width)
    strides = (stride for part in modulations for stride in part.stride()[:2])
    arguments = [*(y.contiguous() for y in tokens), *modulations, out, *strides, length // frames, frames, *numbers]
    with device.current(x.device):
        programs = batch * frames * triton.cdiv(length // frames, options["ROWS"])
        kernel[(programs,)](*arguments, WIDTH=width, **options)
    return out
