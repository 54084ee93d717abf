"""The modulation kernels against the steps they replace in the causal forward, and against float64."""

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels.modulation import add_norm
from lightforcing.lightforcing_core.model.fp8 import quantize_rows

from ..support.attention_problems import DEVICE

EPS = 1e-6


def norm_scale_shift(x, scale, shift, eps):
    total, norm = add_norm(x, None, None, scale, shift, eps)
    assert total is x
    return norm


def random(*shape, dtype, seed, spread=1.0, centre=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (centre + spread * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def modulations(batch, frames, width, dtype, seed):
    """Six parts [B, frames, D] as the forward makes them: every sixth row of one tensor."""
    return random(batch, frames, 6, width, dtype=dtype, seed=seed).unbind(2)


def scaled_and_shifted(x, scale, shift, dtype):
    """LayerNorm, then scale and shift, as torch computes them in `dtype`."""
    normed = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=EPS).unflatten(1, (scale.shape[1], -1))
    scale, shift = (part.to(dtype).unsqueeze(2) for part in (scale, shift))
    return torch.addcmul(shift, normed, 1 + scale).flatten(1, 2)


def gated(x, y, gate, dtype):
    x, y = (part.to(dtype).unflatten(1, (gate.shape[1], -1)) for part in (x, y))
    return torch.addcmul(x, y, gate.to(dtype).unsqueeze(2)).flatten(1, 2)


def poisoned(function, *arguments):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "width"), [(2, 3, 7, 72), (1, 1, 5, 1536), (2, 2, 1, 5120), (1, 2, 3, 8192)]
)
def test_norm_scale_shift_is_closer_to_float64_than_the_unfused_steps(batch, frames, tokens, width, dtype):
    x = random(batch, frames * tokens, width, dtype=dtype, seed=width, spread=3.0, centre=5.0)
    shift, scale, *_ = modulations(batch, frames, width, dtype, seed=1)
    got = poisoned(norm_scale_shift, x, scale, shift, EPS)
    assert got.is_contiguous()
    assert got.dtype == dtype
    exact = scaled_and_shifted(x, scale, shift, torch.float64)
    error, unfused = (
        (y.double() - exact).pow(2).mean().sqrt() for y in (got, scaled_and_shifted(x, scale, shift, dtype))
    )
    assert error <= unfused * (1.5 if dtype == torch.float32 else 0.8)  # in 16 bits two roundings less
    ulp = torch.finfo(dtype).eps
    near = 8 * ulp * (1 + exact.abs()) if dtype == torch.float32 else 0.5 * ulp * exact.abs() + 1e-5
    assert ((got.double() - exact).abs() <= near * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 21, 72), (1, 5, 1536), (2, 1, 5120)])
def test_a_norm_without_a_shift_is_rms_norm_rounded_once(batch, tokens, width, dtype):
    x = random(batch, tokens, width, dtype=dtype, seed=width, spread=3.0, centre=5.0)
    weight = random(width, dtype=dtype, seed=1)
    got = poisoned(norm_scale_shift, x, weight, None, EPS)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), EPS)
    near = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= near * 1.001 * exact.abs() + 1e-7).all()


def test_a_far_mean_costs_no_variance():
    x = random(1, 4, 1536, dtype=torch.float32, seed=2, centre=1000.0)
    zero = torch.zeros(1, 1, 1536, device=DEVICE)
    want = scaled_and_shifted(x, zero, zero, torch.float64)
    assert (norm_scale_shift(x, zero, zero, EPS).double() - want).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gated_by", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("batch", "frames", "tokens", "width"), [(2, 3, 7, 72), (1, 1, 5, 1536), (2, 2, 1, 5120)])
def test_a_sum_is_rounded_once_and_its_norm_is_that_of_the_rounded_sum(
    batch, frames, tokens, width, own, gated_by, dtype
):
    x, y = (random(batch, frames * tokens, width, dtype=dtype, seed=seed) for seed in (3, 4))
    shift, scale, gate, *_ = modulations(batch, frames, width, dtype, seed=5)
    gate = gate if gated_by else None
    want = x + y if gate is None else gated(x, y, gate, dtype)
    weight, bias = (random(width, dtype=dtype, seed=seed, centre=seed % 2) for seed in (7, 8))
    total, normed = poisoned(add_norm, x, y, gate, *((weight, bias) if own else (scale, shift)), EPS)
    if dtype == torch.float32:
        torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(total, want)
    if own:
        exact = torch.nn.functional.layer_norm(total.double(), (width,), weight.double(), bias.double(), EPS)
        torch.testing.assert_close(normed.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    else:
        assert torch.equal(normed, norm_scale_shift(total, scale, shift, EPS))


def test_one_modulation_serves_all_frames_of_a_sample():
    x = random(2, 6, 64, dtype=torch.float32, seed=6)
    shift, scale, gate, *_ = modulations(2, 1, 64, torch.float32, seed=7)
    every = [part.expand(2, 3, 64) for part in (gate, scale, shift)]
    assert all(map(torch.equal, add_norm(x, x, gate, scale, shift, EPS), add_norm(x, x, *every, EPS)))


def test_inputs_of_any_strides_are_taken():
    wide = random(2, 6, 128, dtype=torch.float32, seed=8)
    x, y = wide[:, :, :64], wide[:, :, 64:]
    shift, scale, gate, *_ = (part[:, :, ::2] for part in modulations(2, 3, 128, torch.float32, seed=9))
    packed = (part.clone(memory_format=torch.contiguous_format) for part in (x, y, gate, scale, shift))
    assert all(map(torch.equal, add_norm(x, y, gate, scale, shift, EPS), add_norm(*packed, EPS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 6, 64, dtype=torch.float64)}, "not torch.float64"),
        ({"x": torch.zeros(1, 6, 60)}, "widths up to 8192 in eights, not 60"),
        ({"x": torch.zeros(1, 6, 8200)}, "widths up to 8192 in eights, not 8200"),
        ({"x": torch.zeros(1, 7, 64)}, r"torch.float32 \(1, 3, 64\) do not fit x torch.float32 \(1, 7, 64\)"),
        ({"second": torch.zeros(1, 1, 64)}, r"\(1, 1, 64\) do .* \[B, F or 1, D\]"),
        ({"second": torch.zeros(1, 3, 64).half()}, "torch.float16"),
    ],
)
def test_launcher_refuses_with_the_value(change, message):
    arguments = {"x": torch.zeros(1, 6, 64), "first": torch.zeros(1, 3, 64), "second": torch.zeros(1, 3, 64)} | change
    with pytest.raises(ValueError, match=message):
        norm_scale_shift(*(x.to(DEVICE) for x in arguments.values()), EPS)


def test_add_norm_refuses_parts_that_differ():
    x, gate = torch.zeros(1, 6, 64, device=DEVICE), torch.zeros(1, 3, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"y must be torch.float32 \(1, 6, 64\) .* not torch.float32 \(1, 3, 64\)"):
        add_norm(x, gate, gate, gate, gate, EPS)
    with pytest.raises(ValueError, match=r"torch.float32 \(64,\) do not .* or \[D\] for the norm's own"):
        add_norm(x, x, gate, gate, gate[0, 0], EPS)
    with pytest.raises(ValueError, match=r"torch.float32 \(1, 3, 64\) do not .* or \[D\] for the norm's own"):
        add_norm(x, x, gate, gate, None, EPS)


@pytest.mark.parametrize(("batch", "frames", "tokens", "width"), [(2, 3, 7, 72), (1, 2, 3, 5120)])
def test_a_norm_for_fp8_is_quantised_before_it_is_rounded(batch, frames, tokens, width):
    x, y = (random(batch, frames * tokens, width, dtype=torch.float32, seed=seed) for seed in (10, 11))
    y[0, 0, 3], y[-1, -1, 0] = float("nan"), float("inf")
    scale, shift, gate, *_ = modulations(batch, frames, width, torch.float32, seed=12)
    for parts in ((gate, scale, shift), (None, scale[0, 0], shift[0, 0])):
        total, wide = add_norm(x, y, *parts, EPS)
        same, (values, scales) = add_norm(x, y, *parts, EPS, fp8=True)
        wanted = [part.to(DEVICE) for part in quantize_rows(wide.flatten(0, 1).cpu())]
        for got, expected in ((same, total), (values.float(), wanted[0].float()), (scales, wanted[1])):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
