"""FP8 linears: e4m3 weights with a scale per output channel, activations quantised per token as they come.

The loader's `fp8_rowwise` multiplies with these functions. e4m3 is a floating format: it rounds normal distributions by
2.6 % (root mean square) at any scale, as long as the largest value stays under 448 and few fall below 2^-6, where its
digits run out.
"""

from functools import cache

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3fn
SMALLEST = 1e-12  # a row of zeros, or nearly, is scaled as if its largest value were this
MULTIPLE = 16  # torch's FP8 product wants both sides of a weight to be multiples of it
# The matrices of one transformer layer that Light Forcing quantises; embeddings, time and head stay as they are.
LAYER_LINEARS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as stored · scale, rounded to nearest: stored float8_e4m3fn [M, K], scales float32 [M, 1].

    A row is a token of an activation or an output channel of a weight. A row with an infinity or a NaN comes out as
    NaN, as it would spread in a plain product.
    """
    scales = row_scales(x)
    return (x.float() / scales).to(FP8), scales


def row_scales(x: Tensor) -> Tensor:
    """What puts the largest value of every row of x [M, K] at 448: float32 [M, 1], above zero."""
    return x.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST) / LARGEST


def dequantize_rows(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, in `dtype`: [M, K]."""
    return (stored.float() * scales).to(dtype)


def why_no_fp8(out_features: int, in_features: int) -> str | None:
    """Why a weight of this shape cannot be multiplied in FP8, or None."""
    if out_features % MULTIPLE or in_features % MULTIPLE:
        return f"FP8 needs sizes that are multiples of {MULTIPLE}, not {out_features}×{in_features}"
    return None


@cache
def why_not_scaled_mm(device: torch.device) -> str | None:
    """Why `torch._scaled_mm` is not used with a scale per row on `device`, or None. Asked once per device."""
    if device.type != "cuda":
        return f"no FP8 units on {device.type}"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"FP8 units come with compute capability 8.9, this GPU has {'.'.join(map(str, capability))}"
    ones = torch.ones(32, 32, device=device)
    try:
        scaled_product(*quantize_rows(ones), *quantize_rows(ones), None, torch.bfloat16)
    except (RuntimeError, ValueError) as error:  # torch raises either for a scaling that a GPU lacks
        return f"torch {torch.__version__} refuses it here: {str(error).strip().partition(chr(10))[0]}"
    return None


def scaled_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x · x_scales) @ (weight · weight_scales)ᵀ + bias on FP8 units, summed in float32.

    x: [M, K] and weight: [N, K] float8_e4m3fn; scales: float32 [M, 1] and [N, 1]; bias: [N]. Returns [M, N] in
    `dtype`, which was bfloat16 on the way: torch gives row-wise products in nothing else.
    """
    bias = None if bias is None else bias.to(torch.bfloat16)
    y = torch._scaled_mm(
        x, weight.t(), scale_a=x_scales, scale_b=weight_scales.t(), bias=bias, out_dtype=torch.bfloat16
    )
    return y.to(dtype)


def plain_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same product of the same numbers without FP8 units; shapes as `scaled_product`.

    e4m3 values and their products are exact in bfloat16 and float32; float16 would overflow, so it takes float32.
    """
    compute = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    y = (x.to(compute) @ weight.to(compute).t()).float() * x_scales * weight_scales.t()
    return (y if bias is None else y + bias.float()).to(dtype)


def product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_product` where the device can, else `plain_product`."""
    multiply = plain_product if why_not_scaled_mm(x.device) else scaled_product
    return multiply(x, x_scales, weight, weight_scales, bias, dtype)
