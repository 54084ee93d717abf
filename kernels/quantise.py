"""FP8 rows of activations: quantised in one pass, and the scales of a product applied in another.

One program owns one row, or a few, with all of their values in registers: each is read once and written once.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .bound import cdiv, launch
from .rounding import cast

MAX_WIDTH = 16384


@triton.jit
def to_rows(x):
    """Float32 rows [ROWS, PADDED], zeros in the padding, as (float8_e4m3fn values, float32 scales [ROWS])."""
    scales = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 1e-12), 448.0)
    has_nan = tl.max((x != x).to(tl.int32), 1)  # which `max` skips
    scales = tl.where(has_nan > 0, float("nan"), scales)
    return cast(tl.div_rn(x, scales[:, None]), tl.float8e4nv), scales


@triton.jit
def gelu_tanh(x):
    """GELU by its tanh form: 0.5 · x · (1 + tanh(u)) is x / (1 + exp(−2u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["rows"])
def _quantise_rows(
    x_ptr, out_ptr, scales_ptr, rows, GELU: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    row, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = (row < rows)[:, None] & (columns < WIDTH)[None, :]
    tile = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    x = tl.load(x_ptr + tile, mask=real, other=0.0).to(tl.float32)
    values, scales = to_rows(gelu_tanh(x) if GELU else x)
    tl.store(out_ptr + tile, values, mask=real)
    tl.store(scales_ptr + row, scales, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _scale_product(
    y_ptr,
    out_ptr,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    rows,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    column_is_real = columns < WIDTH
    real = (row < rows)[:, None] & column_is_real[None, :]
    tile = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    y = tl.load(y_ptr + tile, mask=real, other=0.0).to(tl.float32)
    y *= tl.load(row_scales_ptr + row, mask=row < rows, other=0.0)[:, None]
    y *= tl.load(column_scales_ptr + columns, mask=column_is_real, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=column_is_real, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + tile, cast(y, out_ptr.dtype.element_ty), mask=real)


@functools.cache
def launch_options(width: int) -> dict[str, int]:
    """Padded width, rows and warps: 4,096 values or one row, 16 values a thread."""
    padded = triton.next_power_of_2(width)
    rows = max(1, 4096 // padded)
    return {"PADDED": padded, "ROWS": rows, "num_warps": rows * padded // 512}


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot take x [M, K], or None."""
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        return f"rows are quantised up to a width of {MAX_WIDTH}, not {x.shape[-1]}"
    return device.why_not("the quantisation kernel", x, float8=True)


def quantise_rows(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] to (float8_e4m3fn [M, K], float32 scales [M, 1]) in one launch, as `fp8.quantize_rows` does.

    gelu: quantise GELU(x), tanh form, in float32 and not rounded before.

    Bit for bit the values and scales that torch computes on a CPU; a row with NaN or infinity becomes NaN. The
    caller has asked `why_not`.
    """
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch(_quantise_rows, x.contiguous(), values, scales, GELU=gelu)
    return values, scales


def scale_product(y: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write y [M, N] · row_scales [M, 1] · column_scales [N, 1] + bias [N] to `out`, which may be y; returns it."""
    _launch(_scale_product, y, out, row_scales, column_scales, bias)
    return out


def _launch(kernel: Any, x: Tensor, *others: Tensor | None, **constants: bool) -> None:
    rows, width = x.shape
    options = launch_options(width)
    launch(kernel, (cdiv(rows, options["ROWS"]),), x, *others, rows, **constants, WIDTH=width, **options)
