"""FP8 linears: rounding within a half step, both products alike, and Wan's causal forward running on them."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.fp8 import linear as quantize
from lightforcing.lightforcing_core.fp8.linear import (
    FP8,
    LAYER_LINEARS,
    FP8Linear,
    dequantize_rows,
    plain_product,
    quantize_linears,
    quantize_rows,
    scaled_product,
    why_not_scaled_mm,
)
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.rollout import few_step_sigmas, rollout

TEXT = 32
FINE = AttentionOptions(backend="reference", block=(16, 16), keep_frames=3, sink_frames=1, near_frames=1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def linear_of(out_features, in_features, *, bias=True, dtype=torch.float32):
    linear = torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    linear.weight.data = normal(out_features, in_features, seed=1, dtype=dtype) / in_features**0.5
    return linear


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
    for multiply, rounding in ((plain_product, torch.finfo(dtype).eps), (scaled_product, 2.0**-7)):
        y = multiply(*q, *w, bias, dtype)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= (size + exact.abs()) * max(rounding, 1e-6)).all(), multiply.__name__


def test_a_layers_error_is_that_of_two_roundings():
    """2.6 % from the weight and 2.6 % from the input, independent of each other: 3.7 % together."""
    linear = linear_of(256, 512)
    x = normal(2, 40, 512, seed=3)
    layer = FP8Linear(linear)
    assert relative_error(dequantize_rows(layer.weight, layer.weight_scale, torch.float32), linear.weight) < 0.028
    assert 0.030 < relative_error(layer(x), linear(x)) < 0.040


def test_outliers_of_one_token_cost_no_other_token():
    linear, x = linear_of(64, 256, bias=False), normal(1, 6, 256, seed=4)
    outlier = x.clone()
    outlier[0, 2] *= 1e4
    layer = FP8Linear(linear)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(layer(outlier)[0, others], layer(x)[0, others])
    assert relative_error(layer(outlier), linear(outlier)) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_keep_the_inputs_dtype_and_every_leading_dimension(dtype):
    linear = linear_of(48, 32, dtype=dtype)
    layer = FP8Linear(linear)
    x = normal(2, 3, 5, 32, dtype=dtype)
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), linear(x)) < 0.05
    assert layer(x[:, :, ::2].transpose(0, 1)).shape == (3, 2, 3, 48)
    assert layer(x[:0]).shape == (0, 3, 5, 48)


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 32), (32, 40)])
def test_sides_that_fp8_units_cannot_take_are_refused(out_features, in_features):
    with pytest.raises(ValueError, match=rf"{out_features}×{in_features} are not multiples of 16"):
        FP8Linear(linear_of(out_features, in_features))


def tree(ffn_dim=320, dtype=torch.float32):
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=ffn_dim, layers=2, text_dim=TEXT), dtype=dtype)


def test_the_published_layers_become_fp8_and_nothing_else():
    dit, plain = tree(), tree()
    report = quantize_linears(dit)
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in LAYER_LINEARS}
    assert len(expected) == 20
    assert set(report.layers) == {name for name, m in dit.named_modules() if isinstance(m, FP8Linear)} == expected
    assert report.left == {}
    state, before = dit.state_dict(), plain.state_dict()
    assert state.keys() - before.keys() == {f"{name}.weight_scale" for name in expected}
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(state[name], tensor), name


def test_the_report_counts_bytes():
    dit = tree()
    report = quantize_linears(dit)
    weights = 2 * (8 * 256 * 256 + 2 * 256 * 320)
    rows = 2 * (9 * 256 + 320)
    assert report.bytes_before - report.bytes_after == weights * 3 - rows * 4
    assert "20 layers in FP8" in str(report)
    assert "no FP8 units on cpu" in str(report)


def test_layers_that_do_not_fit_stay_and_are_named():
    dit = tree(ffn_dim=200)
    report = quantize_linears(dit)
    assert set(report.left) == {f"blocks.{i}.ffn.{j}" for i in range(2) for j in (0, 2)}
    assert type(dit.blocks[0].ffn[0]) is torch.nn.Linear
    assert "200×256 are not multiples of 16" in str(report)


def test_a_tree_is_quantised_once_and_a_refusal_changes_nothing():
    dit = tree()
    dit.blocks[1].ffn[2] = torch.nn.Sequential()
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2 is a Sequential, not a plain linear layer"):
        quantize_linears(dit)
    assert not any(isinstance(module, FP8Linear) for module in dit.modules())
    dit = tree()
    quantize_linears(dit)
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.q is a FP8Linear"):
        quantize_linears(dit)


def sample(dit, dtype):
    context = normal(1, 7, TEXT, seed=1)
    options = {"growth": [0.0, 0.5], "attention": FINE, "dtype": dtype}
    chunks = rollout(
        dit, context, latent_shape=(1, 16, 6, 8, 8), frames_per_chunk=3, sigmas=few_step_sigmas(), **options
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


@pytest.fixture(scope="module")
def reference():
    return sample(tree(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_rollout_runs_on_fp8_layers_close_to_the_plain_one(reference, dtype):
    """Latents of a whole run of four steps a chunk: 3 % from the float32 run on these random weights."""
    dit = tree(dtype=dtype)
    quantize_linears(dit)
    latents = sample(dit, dtype)
    assert latents.isfinite().all()
    assert 0.015 < relative_error(latents, reference) < 0.045


def gpu(monkeypatch, capability, answer):
    """torch as it would answer for a GPU of this capability, without one."""
    why_not_scaled_mm.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantize, "scaled_product", answer)
    monkeypatch.setattr(quantize, "quantize_rows", lambda x: (x, x))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: types.SimpleNamespace())


def test_fp8_units_are_used_where_the_gpu_and_torch_have_them(monkeypatch):
    def refuses(*_):
        raise RuntimeError("rowwise scaling is not supported\nhere")

    device = torch.device("cuda", 0)
    gpu(monkeypatch, (8, 6), refuses)
    assert "8.6" in why_not_scaled_mm(device)
    gpu(monkeypatch, (8, 9), refuses)
    assert why_not_scaled_mm(device).endswith("refuses it here: rowwise scaling is not supported")
    gpu(monkeypatch, (9, 0), lambda *_: None)
    assert why_not_scaled_mm(device) is None
    why_not_scaled_mm.cache_clear()


def test_a_layer_takes_the_product_that_its_device_has(monkeypatch):
    layer, x = FP8Linear(linear_of(32, 64)), normal(3, 64)
    plain = layer(x)
    monkeypatch.setattr(quantize, "why_not_scaled_mm", lambda device: None)
    scaled = layer(x)
    assert not torch.equal(scaled, plain)
    assert relative_error(scaled, plain) < 2.0**-8
