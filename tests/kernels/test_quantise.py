"""The quantisation kernels: bit for bit torch's rows, and what they do besides against float64."""

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.kernels import quantise
from lightforcing.kernels.quantise import quantise_rows, scale_product, why_not
from lightforcing.lightforcing_core.model.fp8 import dequantize_rows, quantize_rows

from ..support.attention_problems import DEVICE
from ..support.tape import storage, tensors

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def adversarial(rows, width, dtype):
    """Rows of all sizes, and of zeros, infinities, NaN, one outlier, ties, and the smallest numbers."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    x = x * torch.logspace(-7, 4, rows)[:, None]
    values = torch.finfo(dtype)
    for row, (place, value) in enumerate(
        ((0, 448.0), (1, float("inf")), (width - 1, float("nan")), (2, -float("inf")), (3, values.max))
    ):
        x[row % rows, place % width] = value
    x[5 % rows], x[6 % rows], x[7 % rows] = 0.0, -0.0, values.smallest_normal / 4
    x[8 % rows] = 17.0 + 2.0 * (torch.arange(width) % 2)  # ties of e4m3, once 448 makes the scale 1
    x[8 % rows, 0] = 448.0
    return x.to(dtype)


def same(got, wanted):
    """Equal bits, and NaN of any sign."""
    nan = wanted.float().isnan()
    bits = [tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int32) for tensor in (got, wanted)]
    return torch.equal(got.float().isnan(), nan) and torch.equal(bits[0][~nan], bits[1][~nan])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (9, 24), (11, 1536), (2, 8960), (1, 13824)])
def test_rows_are_torchs_bit_for_bit(rows, width, dtype):
    x = adversarial(rows, width, dtype)
    values, scales = (tensor.cpu() for tensor in quantise_rows(x.to(DEVICE)))
    wanted = quantize_rows(x)  # on a CPU: a GPU multiplies by 1 / 448 instead
    assert same(values, wanted[0])
    assert same(scales, wanted[1])
    strided = torch.cat([x, x], 1).to(DEVICE)[:, :width]
    assert same(quantise_rows(strided)[0].cpu(), wanted[0])


class Traffic(TorchDispatchMode):
    """Counts operations that make memory, and the bytes that they read and write."""

    launches = nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(x): x.nbytes for x in tensors((args, kwargs))}
        made = [x.nbytes for x in tensors(out) if storage(x) not in given]
        if made and "empty" not in func._schema.name:
            self.launches, self.nbytes = self.launches + 1, self.nbytes + sum(made) + sum(given.values())
        return out


@pytest.mark.parametrize(("width", "megabytes"), [(1536, (180, 22)), (8960, (1048, 126))])
def test_one_launch_moves_an_eighth_of_what_torchs_eight_do(monkeypatch, width, megabytes):
    """At the shapes of the 1.3B model, chunks of three frames at 480×832."""
    x, moved = torch.empty(4680, width, dtype=torch.bfloat16, device="meta"), []
    monkeypatch.setattr(quantise, "launch", lambda kernel, grid, *given, **_: moved.append(sum(map(bytes_of, given))))
    with Traffic() as torchs:
        quantize_rows(x)
    quantise_rows(x)
    assert (torchs.launches, len(moved)) == (8, 1)
    assert (round(torchs.nbytes / 1e6), round(moved[0] / 1e6)) == megabytes


def bytes_of(argument):
    return argument.nbytes if isinstance(argument, torch.Tensor) else 0


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(9, 24), (2, 8960)])
def test_gelu_is_quantised_from_float32(rows, width, dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, rows)[:, None]
    x[0, 0], x[1, 1], x[1, 2] = 80.0, -1e4, 1e4
    x = x.to(DEVICE, dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    values, scales = quantise_rows(x, gelu=True)
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double() * 448, largest, rtol=2e-6, atol=1e-12)
    error = (dequantize_rows(values, scales, torch.float64) - exact).abs()
    assert (error <= torch.maximum(exact.abs() / 16, largest / 448 / 2**10) * (1 + 1e-4)).all()
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    assert dequantize_rows(*quantise_rows(x, gelu=True), torch.float32)[:2].isnan().all()


@DTYPES
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_and_bias_of_a_product_are_applied_with_one_rounding(dtype, has_bias):
    rows, width = 7, 72
    draw = torch.Generator().manual_seed(2)
    y = (1e8 * torch.randn(rows, width, generator=draw)).bfloat16()
    row_scales, column_scales = torch.rand(rows, 1, generator=draw), torch.rand(width, 1, generator=draw) * 1e-6
    row_scales[2] = float("nan")
    bias = torch.randn(width, generator=draw).to(dtype) if has_bias else None
    exact = y.double() * row_scales.double() * column_scales.double().T
    exact = exact if bias is None else exact + bias.double()
    on_device = [None if x is None else x.to(DEVICE) for x in (y, row_scales, column_scales, bias)]
    out = on_device[0] if dtype == torch.bfloat16 else torch.empty(rows, width, dtype=dtype, device=DEVICE)
    got = scale_product(*on_device, out).double().cpu()
    assert got[2].isnan().all()
    near = torch.finfo(dtype).eps * exact.abs() + 1e-4 * (dtype != torch.bfloat16)
    assert ((got - exact).abs() <= near)[exact.isfinite()].all()


def test_what_does_not_fit_is_refused():
    assert "up to a width of 16384, not 16385" in why_not(torch.zeros(1, 16385, device=DEVICE))
    assert "not torch.float64" in why_not(torch.zeros(1, 16, dtype=torch.float64, device=DEVICE))
