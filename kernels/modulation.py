"""Element-wise steps of a layer, one launch each: modulated norm and gated sum.

One program owns one token, or a few of one frame, with whole rows in registers: x is read once and written once.
Scale, shift and gate differ from frame to frame, as an autoregressive rollout's time steps do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .bound import cdiv, launch
from .quantise import launch_options, to_rows
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
def _add_norm(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    sum_ptr,
    out_ptr,
    row_scales_ptr,
    tokens_per_frame,
    frames,
    eps,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    first, within, frame, batch = _place(tokens_per_frame, frames, ROWS)
    tile, real, columns = _tile(first, within, tokens_per_frame, WIDTH, PADDED, ROWS)
    column_is_real = columns < WIDTH
    modulation = (batch * frames + frame) * WIDTH + columns
    x = tl.load(x_ptr + tile, mask=real, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + tile, mask=real, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + modulation, mask=column_is_real, other=0.0).to(tl.float32)[None, :]
        total = cast(x + y, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + tile, total, mask=real)
        x = total.to(tl.float32)
    mean = tl.sum(x, 1) / WIDTH
    x = tl.where(real, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    place = columns if OWN else modulation
    scale = tl.load(scale_ptr + place, mask=column_is_real, other=0.0).to(tl.float32) + (0.0 if OWN else 1.0)
    shift = tl.load(shift_ptr + place, mask=column_is_real, other=0.0).to(tl.float32)
    out = x * inverse[:, None] * scale[None, :] + shift[None, :]
    if row_scales_ptr is None:
        out = cast(out, out_ptr.dtype.element_ty)
    else:
        out, row_scales = to_rows(tl.where(real, out, 0.0))
        rows = tl.arange(0, ROWS)
        tl.store(row_scales_ptr + first + rows, row_scales, mask=within + rows < tokens_per_frame)
    tl.store(out_ptr + tile, out, mask=real)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take x [B, L, D], or None."""
    if x.shape[-1] > MAX_WIDTH or x.shape[-1] % 8:
        return f"the modulation kernels take widths up to {MAX_WIDTH} in eights, not {x.shape[-1]}"
    return device.why_not("the modulation kernel", x)


Rows = tuple[Tensor, Tensor]  # as `quantise_rows` makes them


def norm_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, fp8: bool = False) -> Tensor | Rows:
    """LayerNorm(x) · (1 + scale) + shift, the norm without weights of its own.

    x: [B, F · tokens, D]; scale, shift: [B, F or 1, D]. All in float32, rounded once at the end: closer than the
    unfused steps, which also round the norm and 1 + scale. Returns a contiguous tensor like x; if `fp8`, the rows that
    `quantise_rows` makes of the float32 result. Raises ValueError when `why_not` gives a reason or a shape or dtype is
    off.
    """
    return _launch(x, None, None, scale, shift, eps, fp8=fp8)


def add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, *, fp8: bool = False
) -> tuple[Tensor, Tensor | Rows]:
    """x + y · gate, or x + y, and its norm as `norm_scale_shift` computes it.

    y: like x; gate: [B, F or 1, D]. The sum is computed in float32 and rounded once, as `torch.addcmul` does, and the
    norm is that of the rounded sum. scale and shift of shape [D] are the norm's own weight and bias: its result is
    LayerNorm(sum) · scale + shift then.
    """
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, _launch(x, y, gate, scale, shift, eps, total, fp8=fp8)


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    total: Tensor | None = None,
    *,
    fp8: bool,
) -> Tensor | Rows:
    """Check the tensors, then run the kernel; returns the norm."""
    if reason := why_not(x):
        raise ValueError(reason)
    if y is not None:
        device.require("y", y, tuple(x.shape), x.dtype, x.device)
    batch, length, width = x.shape
    own = scale.ndim == 1
    frames = 1 if own and gate is None else (scale if gate is None else gate).shape[1]
    framed = (batch, frames, width)
    fits = scale.shape == shift.shape == ((width,) if own else framed) and (gate is None or gate.shape == framed)
    if not fits or length % frames or {scale.dtype, shift.dtype, x.dtype if gate is None else gate.dtype} != {x.dtype}:
        given = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (gate, scale, shift) if part is not None)
        raise ValueError(
            f"modulations {given} do not fit x {x.dtype} {tuple(x.shape)}; they are "
            "[B, F or 1, D] for whole frames, or [D] for the norm's own weight and bias"
        )
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    scales = torch.empty(batch * length, 1, dtype=torch.float32, device=x.device) if fp8 else None
    sizes = length // frames, frames, eps
    options = launch_options(width)
    parts = (None if part is None else part.contiguous() for part in (x, y, gate, scale, shift))
    programs = batch * frames * cdiv(length // frames, options["ROWS"])
    launch(_add_norm, (programs,), *parts, total, out, scales, *sizes, OWN=own, WIDTH=width, **options)
    return out if scales is None else (out.flatten(0, 1), scales)
