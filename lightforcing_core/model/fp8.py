"""FP8 products: e4m3 weights with one scale per output channel, activations quantised per token at run time.

The loader's weight dtype `fp8_rowwise` uses them. e4m3 is a floating-point format: rounding a normal distribution costs
2.6 % (root mean square) at any scale, if the largest value is at most 448 and few values are below 2^-6, where its
digits run out.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import machine
from ..fast_path import FastPath, note, one_line, raise_if_fatal, why_no_kernels
from ..pinned import ROWS_LAYOUT, parts_of

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3fn
SMALLEST = 1e-12  # lower bound of a row's largest value, so that a row of zeros has a scale
MULTIPLE = 16  # torch's FP8 product needs both sides of a weight to be multiples of this
WORK = "FP8 product [{}, {}] of depth {} in {}"
TOLERANCE = 0.1  # of an FP8 product, as a share of the largest value; its rounding is a third of that
SCALED, SCALED_AFTER, IN_16_BITS = "FP8", "FP8 with scales applied after the product", "16 bits"
WIDENED = f"computed in {IN_16_BITS}"  # the fact of a run's record about layers in FP8 that run in 16 bits
# The quantised matrices of a transformer layer; embeddings, time and head are not quantised.
LAYER_LINEARS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [M, K] to (float8_e4m3fn [M, K], float32 scales [M, 1]), rounded to nearest; x ≈ values · scales.

    A row is a token of an activation or an output channel of a weight. A row with infinity or NaN becomes NaN.
    """
    scales = row_scales(x)
    return (x.float() / scales).to(FP8), scales


def row_scales(x: Tensor) -> Tensor:
    """Scales, float32 [M, 1] and above zero, with which the largest value of each row of x [M, K] becomes 448."""
    return x.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST


def dequantize_rows(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, in `dtype`: [M, K]."""
    return (stored.float() * scales).to(dtype)


def why_no_fp8(out_features: int, in_features: int) -> str | None:
    """The reason why a weight of this shape cannot be multiplied in FP8, or None."""
    if out_features % MULTIPLE or in_features % MULTIPLE:
        return f"FP8 needs sizes that are multiples of {MULTIPLE}, not {out_features}×{in_features}"
    return None


@cache
def why_not_scaled_mm(device: torch.device, way: str, rows: int, out_features: int, in_features: int) -> str | None:
    """The reason why torch's FP8 product does not run on `device` with these very sizes, or None.

    way: `SCALED` or `SCALED_AFTER`.
    """
    if device.type != "cuda":
        return f"{device.type} has no FP8 units"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"FP8 units need compute capability 8.9, this GPU has {'.'.join(map(str, capability))}"
    if way == SCALED_AFTER and (reason := why_no_kernels()):
        return reason
    zeros = partial(torch.zeros, device=device)
    x, weight = (zeros(size, in_features, dtype=torch.uint8).view(FP8) for size in (rows, out_features))
    try:
        _PRODUCTS[way](x, zeros(rows, 1), weight, zeros(out_features, 1), None, torch.bfloat16)
    except (RuntimeError, ValueError) as error:  # torch raises either if the GPU does not support this scaling
        raise_if_fatal(error)
        return f"torch {torch.__version__} refuses it here, {one_line(error)}"
    return None


def way_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """The way to multiply x [M, K] of `dtype` by a weight in FP8 [N, K]; shape is (M, N, K).

    FP8 runs if torch has row-wise scales here, else the dequantised weight in 16 bits does, unless another way was
    measured to be faster. The record of the run says what runs in 16 bits.
    """
    reason = why_not_scaled_mm(device, SCALED, *shape)
    fp8, incumbent = (SCALED, SCALED) if reason is None else (SCALED_AFTER, IN_16_BITS)
    chosen = IN_16_BITS
    if reason is None or why_not_scaled_mm(device, SCALED_AFTER, *shape) is None:
        inputs, names = list[Tensor](), (fp8, IN_16_BITS)

        def run(name: str) -> Tensor:
            if not inputs:
                inputs.extend(_sample(shape, dtype, device))
            x, weight, scales = inputs
            if name == IN_16_BITS:
                return functional.linear(x, dequantize_rows(weight, scales, dtype))
            return product(*quantised(x), weight, scales, None, dtype)

        chosen = machine.choose(WORK, (*shape, dtype), device, names, run, incumbent=incumbent, tolerance=TOLERANCE)
    if chosen == IN_16_BITS:
        note(WIDENED, f"{shape[1]}×{shape[2]} ({reason or 'faster than FP8 here'})")
    return chosen


def _sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """An input and a quantised weight of these sizes."""
    generator = torch.Generator(device).manual_seed(0)  # not torch's own, of which others count the draws
    random = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    x, weight = (random(size, shape[2]) for size in shape[:2])
    return x, *quantize_rows(weight)


def multiply(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] · (weight · weight_scales)ᵀ + bias, quantising x if `way_of` says so."""
    if way_of((len(x), *weight.shape), x.dtype, x.device) == IN_16_BITS:
        return functional.linear(x, dequantize_rows(weight, weight_scales, x.dtype), bias)
    return product(*quantised(x), weight, weight_scales, bias, x.dtype)


def quantised(x: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of x [M, K], or of its GELU, in one launch if the kernel can run."""
    if why_no_kernels() is None:
        from ...kernels import quantise

        if quantise.why_not(x) is None:
            path = FastPath("FP8 quantisation", x.device, x.dtype, detail=(x.shape[1], gelu))
            if rows := path.attempt(partial(quantise.quantise_rows, x, gelu=gelu), "running torch's operations"):
                return rows
    return quantize_rows(functional.gelu(x, approximate="tanh") if gelu else x)


def takes_rows(linears: Sequence[Any], x: Tensor) -> bool:
    """Whether all linears, of one width, multiply by FP8 weights, and x's number of rows in FP8; False if none."""
    for one in linears:
        if len(parts_of(one._parameters.get("weight"))) < 2 or one._forward_hooks:
            return False
        if one._full_precision_mm or one.weight_function or one.bias_function or one._forward_pre_hooks:
            return False
        if getattr(one, "comfy_force_cast_weights", False) or "forward" in vars(one):  # as for a bypassed LoRA
            return False
    if not linears:
        return False
    columns, width = sum(one.weight.shape[0] for one in linears), linears[0].weight.shape[1]
    return way_of((x.numel() // x.shape[-1], columns, width), x.dtype, x.device) != IN_16_BITS


def as_input(linears: Sequence[Any], made: Any, x: Tensor) -> Any:
    """`made` as the input of the linears: ComfyUI's quantised tensor if it is (values, scales) of rows of x."""
    if isinstance(made, Tensor):
        return made
    weight = linears[0].weight
    params = replace(weight._params, scale=made[1], orig_dtype=x.dtype, orig_shape=(*x.shape[:-1], made[0].shape[1]))
    return type(weight)(made[0], ROWS_LAYOUT, params)


def scaled_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute (x · x_scales) @ (weight · weight_scales)ᵀ + bias → [M, N] on FP8 units, summed in float32.

    x, weight: float8_e4m3fn [M, K] and [N, K].
    x_scales, weight_scales: float32 [M, 1] and [N, 1].
    bias: [N].
    dtype: of the result, which is rounded to bfloat16 first, the only output that torch has for row-wise scales.
    """
    bias = None if bias is None else bias.to(torch.bfloat16)
    y = torch._scaled_mm(x, weight.T, scale_a=x_scales, scale_b=weight_scales.T, bias=bias, out_dtype=torch.bfloat16)
    return y.to(dtype)


def product_then_scales(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `scaled_product` by a product without scales, whose bfloat16 result a kernel multiplies by them."""
    from ...kernels.quantise import scale_product

    one = _one(x.device)
    y = torch._scaled_mm(x, weight.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return scale_product(y, x_scales, weight_scales, bias, y if dtype is y.dtype else torch.empty_like(y, dtype=dtype))


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


_PRODUCTS = {SCALED: scaled_product, SCALED_AFTER: product_then_scales}


def product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `scaled_product` in the way that the device has, without FP8 units from the same numbers.

    e4m3 values and their products are exact in bfloat16 and float32; float16 would overflow and is computed in float32.
    """
    for way, run in _PRODUCTS.items():
        if why_not_scaled_mm(x.device, way, len(x), *weight.shape) is None:
            return run(x, x_scales, weight, weight_scales, bias, dtype)
    compute = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    y = (x.to(compute) @ weight.to(compute).t()).float() * x_scales * weight_scales.t()
    return (y if bias is None else y + bias.float()).to(dtype)
