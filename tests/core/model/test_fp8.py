"""FP8 products: rounding within a half step, and both products alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing.lightforcing_core import fast_path, profile
from lightforcing.lightforcing_core.model import fp8 as quantize
from lightforcing.lightforcing_core.model.fp8 import (
    FP8,
    IN_16_BITS,
    SCALED,
    SCALED_AFTER,
    dequantize_rows,
    product,
    product_then_scales,
    quantize_rows,
    scaled_product,
    why_not_scaled_mm,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_value_is_rounded_by_half_a_step_of_its_row_at_most(seed, exponent, dtype):
    """e4m3 has 3 stored digits, so half a step is 2^-4 of a normal value; below 2^-6 steps are 2^-9 of the scale."""
    x = (normal(5, 48, seed=seed) * 10.0 ** (exponent / 4) * torch.tensor([[1], [1e-3], [1e3], [0.5], [7.0]])).to(dtype)
    stored, scales = quantize_rows(x)
    assert stored.dtype == FP8
    assert scales.dtype == torch.float32
    assert scales.shape == (5, 1)
    error = (dequantize_rows(stored, scales, torch.float64) - x.double()).abs()
    allowed = torch.maximum(x.double().abs() / 16, scales.double() / 2**10)
    assert (error <= allowed * (1 + 1e-5)).all()
    assert (stored.float().abs().amax(dim=1) == 448).all()


def test_rounding_is_to_nearest_with_ties_to_even():
    row = torch.tensor([[448.0, 17.0, 19.0, 16.9, 18.1, -17.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9]])
    stored, scales = quantize_rows(row)
    assert scales.item() == 1.0
    assert stored.float().tolist() == [[448.0, 16.0, 20.0, 16.0, 18.0, -16.0, 2.0**-9, 0.0, 2.0**-8]]


def test_rows_of_zeros_stay_zero_and_infinities_spread_no_further_than_their_row():
    x = normal(3, 16)
    x[0], x[1, 3] = 0.0, float("inf")
    restored = dequantize_rows(*quantize_rows(x), torch.float32)
    assert (restored[0] == 0).all()
    assert restored[1].isnan().all()
    assert restored[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_both_products_are_the_exact_one_up_to_the_outputs_rounding(dtype, bias):
    """torch runs its scaled product on a CPU too, though slowly: what FP8 units would be asked is asked there."""
    x, weight = normal(7, 64), normal(32, 64, seed=1)
    x[0] *= 100.0
    weight[5] *= 1e-3
    q, w = quantize_rows(x), quantize_rows(weight)
    bias = normal(32, seed=2, dtype=dtype) if bias else None
    exact = dequantize_rows(*q, torch.float64) @ dequantize_rows(*w, torch.float64).T
    size = exact.abs().amax(dim=1, keepdim=True)
    exact = exact if bias is None else exact + bias.double()
    for multiply, rounding in (
        (product, torch.finfo(dtype).eps),
        (scaled_product, 2.0**-7),
        (product_then_scales, 2.0**-7),
    ):
        y = multiply(*q, *w, bias, dtype)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= (size + exact.abs()) * max(rounding, 1e-6)).all(), multiply.__name__


def test_a_products_error_is_that_of_two_roundings_and_an_outlier_costs_its_own_token_alone():
    """2.6 % from the weight and 2.6 % from the input, independent of each other: 3.7 % together."""
    x, weight = normal(40, 512, seed=3), normal(256, 512, seed=1) / 512**0.5
    w = quantize_rows(weight)
    assert relative_error(dequantize_rows(*w, torch.float32), weight) < 0.028
    y = product(*quantize_rows(x), *w, None, torch.float32)
    assert 0.030 < relative_error(y, x @ weight.T) < 0.040
    outlier = x.clone()
    outlier[2] *= 1e4
    spread = product(*quantize_rows(outlier), *w, None, torch.float32)
    assert torch.equal(spread[3:], y[3:])
    assert relative_error(spread, outlier @ weight.T) < 0.05


SHAPE = (48, 32, 64)


@pytest.fixture
def gpu(monkeypatch):
    """torch as it would answer for a GPU that has these ways to multiply in FP8, without one."""

    def made(*ways, capability=(9, 0)):
        def product_of(way):
            def run(*_):
                if way not in ways:
                    raise RuntimeError("rowwise scaling is not supported\nhere")

            return run

        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(quantize, "_PRODUCTS", {way: product_of(way) for way in quantize._PRODUCTS})
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))
        why_not_scaled_mm.cache_clear()
        return torch.device("cuda", 0)

    yield made
    why_not_scaled_mm.cache_clear()


def test_the_way_of_a_product_is_the_fastest_proved_one(gpu, monkeypatch):
    """Without a proof: FP8 by rows if torch has it, else 16 bits; the record of the run says which and why."""
    asked, best = [], None

    def choose(work, facts, device, names, run, *, incumbent, tolerance):
        asked.append((work, facts, names, incumbent))
        return best or incumbent

    def way(device):
        return quantize.way_of(SHAPE, torch.bfloat16, device)

    monkeypatch.setattr(quantize.machine, "choose", choose)
    kind, noted = (quantize.WORK, (*SHAPE, torch.bfloat16)), "computed in 16 bits"
    assert way(gpu(capability=(8, 6))) == IN_16_BITS
    assert "this GPU has 8.6" in fast_path.notes()[noted]
    fast_path.begin_run()
    assert (way(gpu()), asked) == (IN_16_BITS, [])
    assert fast_path.notes()[noted].endswith("refuses it here, RuntimeError: rowwise scaling is not supported)")
    fast_path.begin_run()
    assert way(gpu(SCALED, SCALED_AFTER)) == SCALED
    assert fast_path.notes() == {}
    best = IN_16_BITS
    assert way(gpu(SCALED)) == IN_16_BITS
    assert fast_path.notes()[noted] == "32×64 (faster than FP8 here)"
    best = None
    assert way(gpu(SCALED_AFTER)) == IN_16_BITS
    best = SCALED_AFTER
    assert way(gpu(SCALED_AFTER)) == SCALED_AFTER
    by_rows, by_tensor = ((*kind, (name, IN_16_BITS)) for name in (SCALED, SCALED_AFTER))
    assert asked == [(*by_rows, SCALED)] * 2 + [(*by_tensor, IN_16_BITS)] * 2


@pytest.mark.parametrize("way", [SCALED, SCALED_AFTER])
def test_ways_measured_are_the_same_product(monkeypatch, tmp_path, way):
    """On a CPU, which has both in torch, through the real measurement."""
    if way == SCALED_AFTER:
        pytest.importorskip("triton")
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LIGHTFORCING_PROFILE")
    monkeypatch.setattr(quantize, "why_not_scaled_mm", lambda device, asked, *shape: None if asked == way else "no")
    cpu = torch.device("cpu")
    with quantize.machine.measuring():
        quantize.way_of(SHAPE, torch.bfloat16, cpu)
    (rows,) = profile.rows(cpu).values()
    assert [row.state for row in rows.values()] in (["verified"], ["enabled"]), rows
