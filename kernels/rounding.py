"""Rounding inside kernels, the same in compiled and interpreted ones."""

import triton
import triton.language as tl

from .device import IS_INTERPRETED


@triton.jit
def _round(x):
    """Round half to even, |x| < 2^22: adding 1.5 · 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest, half to even."""
    if dtype == tl.int8:
        x = _round(x)
    elif IS_INTERPRETED and dtype == tl.bfloat16:  # the interpreter would truncate
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    elif IS_INTERPRETED and dtype == tl.float8e4nv:  # the interpreter would lose carries, NaN and the sign of zero
        power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) * 0.125  # three bits of mantissa, smallest exponent −6
        bits = (_round(x / step) * step).to(dtype).to(tl.uint8, bitcast=True) & 0x7F
        bits = tl.where(x != x, 0x7F, bits).to(tl.uint32) | (x.to(tl.uint32, bitcast=True) >> 31 << 7)
        return bits.to(tl.uint8).to(dtype, bitcast=True)
    return x.to(dtype)
