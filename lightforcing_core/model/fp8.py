"""FP8 products: e4m3 weights with one scale per output channel, activations quantised per token at run time.

The loader's weight dtype `fp8_rowwise` uses them. e4m3 is a floating-point format: rounding a normal distribution costs
2.6 % (root mean square) at any scale, if the largest value is at most 448 and few values are below 2^-6, where its
digits run out.
"""

from functools import cache

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3fn
SMALLEST = 1e-12  # lower bound of a row's largest value, so that a row of zeros has a scale
MULTIPLE = 16  # torch's FP8 product needs both sides of a weight to be multiples of this
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
def why_not_scaled_mm(device: torch.device) -> str | None:
    """The reason why `torch._scaled_mm` with one scale per row does not run on `device`, or None."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 units"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"FP8 units need compute capability 8.9, this GPU has {'.'.join(map(str, capability))}"
    ones = torch.ones(32, 32, device=device)
    try:
        scaled_product(*quantize_rows(ones), *quantize_rows(ones), None, torch.bfloat16)
    except (RuntimeError, ValueError) as error:  # torch raises either if the GPU does not support this scaling
        return f"torch {torch.__version__} does not support it here: {str(error).strip().partition(chr(10))[0]}"
    return None


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


def product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute `scaled_product`, without FP8 units from the same numbers if the device has none.

    e4m3 values and their products are exact in bfloat16 and float32; float16 would overflow and is computed in float32.
    """
    if why_not_scaled_mm(x.device) is None:
        return scaled_product(x, x_scales, weight, weight_scales, bias, dtype)
    compute = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    y = (x.to(compute) @ weight.to(compute).t()).float() * x_scales * weight_scales.t()
    return (y if bias is None else y + bias.float()).to(dtype)
