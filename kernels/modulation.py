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


# The size of a frame changes from run to run; unspecialised, it costs no new compilation.
@triton.jit(do_not_specialize=["tokens_per_frame"])
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
    eps,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    per_frame = tl.cdiv(tokens_per_frame, ROWS)
    frame, within = tl.program_id(0) // per_frame, (tl.program_id(0) % per_frame) * ROWS
    first = frame.to(tl.int64) * tokens_per_frame + within
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    row_is_real, column_is_real = within + rows < tokens_per_frame, columns < WIDTH
    real = row_is_real[:, None] & column_is_real[None, :]
    tile = first * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    modulation = frame.to(tl.int64) * WIDTH + columns
    x = tl.load(x_ptr + tile, mask=real, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + tile, mask=real, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= tl.load(gate_ptr + modulation, mask=column_is_real, other=0.0).to(tl.float32)[None, :]
        total = cast(x + y, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + tile, total, mask=real)
        x = total.to(tl.float32)
    if shift_ptr is not None:
        mean = tl.sum(x, 1) / WIDTH
        x = tl.where(real, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    place = columns if OWN else modulation
    scale = tl.load(scale_ptr + place, mask=column_is_real, other=0.0).to(tl.float32) + (0.0 if OWN else 1.0)
    out = x * inverse[:, None] * scale[None, :]
    if shift_ptr is not None:
        out += tl.load(shift_ptr + place, mask=column_is_real, other=0.0).to(tl.float32)[None, :]
    if row_scales_ptr is None:
        out = cast(out, out_ptr.dtype.element_ty)
    else:
        out, row_scales = to_rows(tl.where(real, out, 0.0))
        tl.store(row_scales_ptr + first + rows, row_scales, mask=row_is_real)
    tl.store(out_ptr + tile, out, mask=real)


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take x [B, L, D], or None."""
    if x.shape[-1] > MAX_WIDTH or x.shape[-1] % 8:
        return f"the modulation kernels take widths up to {MAX_WIDTH} in eights, not {x.shape[-1]}"
    return device.why_not("the modulation kernel", x)


def add_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    fp8: bool = False,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """The sum x + y · gate, and its LayerNorm · (1 + scale) + shift.

    x, y: [B, F · tokens, D]; gate, scale, shift: [B, F or 1, D]. Without y the sum is x, without a gate x + y.
    scale and shift of shape [D] are the norm's own weight and bias: LayerNorm(sum) · scale + shift. Without a shift the
    norm is RMSNorm(sum) · scale.

    The sum is computed in float32 and rounded once, as `torch.addcmul` does. The norm is that of the rounded sum, in
    float32 and rounded once: closer than the unfused steps, which also round the norm and 1 + scale. Returns contiguous
    tensors like x; if `fp8`, for the norm the rows that `quantise_rows` makes of the float32 result. Raises ValueError
    when `why_not` gives a reason or a shape or dtype is off.
    """
    if reason := why_not(x):
        raise ValueError(reason)
    if y is not None:
        device.require("y", y, tuple(x.shape), x.dtype, x.device)
    (batch, length, width), dtype = x.shape, x.dtype
    own = scale.ndim == 1
    frames = 1 if own and gate is None else (scale if gate is None else gate).shape[1]
    framed = batch, frames, width
    fits = scale.shape == ((width,) if own else framed) and scale.dtype == dtype
    fits = fits and (own if shift is None else shift.shape == scale.shape and shift.dtype == dtype)
    fits = fits and length % frames == 0 and (gate is None or (gate.shape == framed and gate.dtype == dtype))
    if not fits:
        given = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (gate, scale, shift) if part is not None)
        raise ValueError(
            f"modulations {given} do not fit x {x.dtype} {tuple(x.shape)}; they are "
            "[B, F or 1, D] for whole frames, or [D] for the norm's own weight and bias"
        )
    total = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    out_dtype = torch.float8_e4m3fn if fp8 else dtype
    out = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    row_scales = torch.empty(batch * length, 1, dtype=torch.float32, device=x.device) if fp8 else None
    parts = (None if part is None else part.contiguous() for part in (x, y, gate, scale, shift))
    tokens, options = length // frames, launch_options(width)
    programs = batch * frames * cdiv(tokens, options["ROWS"])
    tensors = *parts, total, out, row_scales
    launch(_add_norm, (programs,), *tensors, tokens, eps, OWN=own, WIDTH=width, **options)
    return x if total is None else total, out if row_scales is None else (out.flatten(0, 1), row_scales)
