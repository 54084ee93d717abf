"""The fused kernels inside whole rollouts, under Triton's interpreter, against the modules that they stand for."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels import modulation, store
from lightforcing.lightforcing_core import fast_path
from lightforcing.lightforcing_core.model import fused
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas

from ...support import rollouts
from ...support.rollouts import FINE, roll, text

LAYERS = 2
ROOT = Path(__file__).parents[3]


@pytest.fixture
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=32, seed=0))


@pytest.fixture
def ran(monkeypatch):
    """The kernels taken on the CPU too, and what ran: launcher names in order."""
    calls = []
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    for kernel, function in ((store, "fused_store"), (modulation, "add_norm")):
        plain = getattr(kernel, function)

        def counted(*arguments, plain=plain, function=function, **options):
            calls.append(function)
            return plain(*arguments, **options)

        monkeypatch.setattr(kernel, function, counted)
    return calls


def video(dit, *, size=(10, 14), **changes):
    """Latents of three chunks of 2 frames; 35 tokens per frame by default, in blocks of 16, so blocks are ragged."""
    settings = {"latent_shape": (1, 16, 6, *size), "frames_per_chunk": 2, "growth": (0.0, 0.5, 0.6)}
    return rollouts.video(roll(dit, text(1), sigmas=few_step_sigmas((1000,)), **settings | changes))


CASES = {
    "dense": {"growth": None},
    "ring wrapped, sinks stay": {"window": 4, "sink_frames": 1},
    "ring wrapped, sinks follow": {"window": 4, "sink_frames": 1, "sink_rope": "follow"},
    "int8 in CPU memory": {"kv": KVOptions("int8", host=True)},
    "tail, parts, tiles": {"attention": replace(FINE, tail=True, estimator="lse", tiles=True)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_whole_video_equals_the_one_of_the_modules(dit, ran, case, monkeypatch):
    with_kernels = video(dit, **case)
    # 3 chunks of one step and 2 clean passes; those skip the last layer's attention and all behind it.
    passes = 3 + 2
    others = {"follow": -2}.get(case.get("sink_rope"), 0)  # the sinks' own chunk keeps its originals
    others += 2 if "kv" in case else 0  # the first chunk stores its keys twice, for their mean
    assert ran.count("fused_store") == LAYERS * (passes + others)
    assert ran.count("add_norm") == 4 * (LAYERS * passes - 2) + passes  # the first layer's norm adds nothing
    monkeypatch.setattr(fused, "DEVICES", ())
    modules = video(dit, **case)
    bound = 3e-3 if "kv" in case else 1e-4  # a value on the edge of two codes may fall to either
    assert (with_kernels - modules).abs().max() <= bound * modules.abs().max()


def weight_set(make):
    return lambda linear: setattr(linear, "weight", torch.nn.Parameter(make(linear.weight.data), requires_grad=False))


def made_in_another_mode(linear):
    with torch.inference_mode(not torch.is_inference_mode_enabled()):
        linear.weight = torch.nn.Parameter(torch.randn(128, 128), requires_grad=False)


def test_recordings_leave_weights_where_they_are():
    dit = wan_from_state_dict(random_state_dict(dim=128, ffn_dim=128, layers=1, text_dim=32))
    attention, x = dit.blocks[0].self_attn, torch.randn(2, 5, 128)
    linears = attention.q, attention.k, attention.v
    places = [linear.weight.data_ptr() for linear in linears]
    with torch.no_grad(), fast_path.recording():
        fused.project(attention, x, with_q=True)
    assert places == [linear.weight.data_ptr() for linear in linears]


def test_sums_keep_the_gradient_of_either_part(ran):
    norm = torch.nn.LayerNorm(128, elementwise_affine=False)
    x, y, scale = torch.randn(1, 4, 128), torch.randn(1, 4, 128, requires_grad=True), torch.zeros(1, 1, 128)
    with torch.enable_grad():
        assert all(out.requires_grad for out in fused.add_norm(norm, x, y, None, scale, scale, ()))


CHANGES = {
    "moved": (lambda linear: setattr(linear.weight, "data", linear.weight.data.clone()), True),
    "patched": (weight_set(lambda weight: 2 * weight), True),
    "patched in place": (lambda linear: linear.weight.data.mul_(2), True),
    "without a bias": (lambda linear: setattr(linear, "bias", None), False),
    "cast by ComfyUI": (lambda linear: setattr(linear, "comfy_cast_weights", True), True),  # to the dtype that it has
    "patched while used": (lambda linear: setattr(linear, "weight_function", [torch.clone]), False),
    "hooked": (lambda linear: linear.register_forward_hook(lambda module, inputs, output: 2 * output), False),
    "forward replaced": (lambda linear: setattr(linear, "forward", lambda x: 0 * x), False),
    "made in another mode": (made_in_another_mode, False),
}


@pytest.mark.parametrize(("change", "together"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
def test_q_k_and_v_are_one_product_as_long_as_their_weights_are_plain(made_in, change, together):
    with made_in():
        dit = wan_from_state_dict(random_state_dict(dim=128, ffn_dim=128, layers=1, text_dim=32))
        attention, x = dit.blocks[0].self_attn, torch.randn(2, 5, 128)
        linears = attention.q, attention.k, attention.v
        before = {name: weight.clone() for name, weight in attention.state_dict().items()}
        for joined in (True, together):
            q, k, v = fused.project(attention, x, with_q=True)
            _, *without_q = fused.project(attention, x, with_q=False)
            assert (q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()) == joined
            for got, linear in zip((q, k, v, *without_q), (*linears, *linears[1:]), strict=True):
                torch.testing.assert_close(got, linear(x), rtol=0, atol=1e-5)
            if joined:  # and nothing is kept twice
                assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
                assert linears[0].weight.untyped_storage().nbytes() == 3 * linears[0].weight.nbytes
            if change is not None:
                assert all(torch.equal(weight, before[name]) for name, weight in attention.state_dict().items())
                change(attention.k)
                change = None


@pytest.mark.parametrize("change", [None, *CHANGES], ids=str)
def test_a_plain_feed_forward_has_its_gelu_in_the_first_product(monkeypatch, change):
    calls = []

    def product(bias, x, weight, use_gelu):  # as on CUDA: the CPU's own has another form of GELU
        calls.append(use_gelu)
        return torch.nn.functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "EPILOGUES", ("cpu",))
    monkeypatch.setattr(torch, "_addmm_activation", product)
    with torch.inference_mode():
        dit = wan_from_state_dict(random_state_dict(dim=128, ffn_dim=128, layers=1, text_dim=32))
        ffn, x = dit.blocks[0].ffn, torch.randn(2, 5, 128)
        if change is not None:
            CHANGES[change][0](ffn[0])
        torch.testing.assert_close(fused.feed_forward(ffn, x), ffn(x), rtol=0, atol=1e-5)
    is_plain = change is None or CHANGES[change][1] or change == "made in another mode"
    assert calls == ([True] if is_plain else [])


def test_a_layer_is_at_most_fifteen_launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "laboratory.launches", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    published, with_tail = map(int, re.findall(r": (\d+) launches per layer", done.stdout))
    assert published <= 15
    assert with_tail <= 16  # the pooled tail's bias


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_norms_that_comfyui_casts_keep_the_fused_store(dit, ran, dtype):
    """As loaded by `fp8_e4m3fn`, `_fast` and `fp8_e5m2`: the cast is made once per run."""
    norms = [norm for block in dit.blocks for norm in (block.self_attn.norm_q, block.self_attn.norm_k)]
    for norm in norms:
        norm.to(dtype).comfy_cast_weights = True
    small = {"size": (4, 10)}
    with_kernels = video(dit, **small)
    assert ran.count("fused_store") == LAYERS * 5
    assert "store" not in fast_path.notes()
    weight, again = (fused._cast(norms[0], norms[0].weight, torch.zeros(1)) for _ in range(2))
    assert weight is again
    with torch.no_grad():
        norms[0].weight.copy_(norms[0].weight.float().flip(0))
        assert torch.equal(fused._cast(norms[0], norms[0].weight, torch.zeros(1)), norms[0].weight.float())
        norms[0].weight.copy_(weight)
    for norm in norms:
        norm.float()
    wanted = video(dit, **small)
    assert (with_kernels - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda norm: setattr(norm, "weight_function", [torch.clone]), "a norm is changed by a LoRA while it is used"),
        (lambda norm: norm.register_forward_hook(lambda module, inputs, output: output), "a norm has a hook"),
    ],
)
def test_a_norm_that_does_more_than_read_its_weight_is_left_alone_and_the_record_says_why(dit, ran, change, reason):
    change(dit.blocks[0].self_attn.norm_q)
    change(dit.blocks[1].self_attn.norm_k)
    video(dit, size=(4, 10))
    assert "fused_store" not in ran
    assert "add_norm" in ran
    assert fast_path.notes()["store"] == f"modules, because {reason}"


@pytest.mark.parametrize(("kernel", "function"), [(store, "fused_store"), (modulation, "add_norm")])
def test_a_kernel_that_fails_is_replaced_for_the_run_with_one_warning(dit, ran, monkeypatch, caplog, kernel, function):
    want = video(dit, size=(4, 10))
    broken = mock.Mock(side_effect=RuntimeError("PTX was compiled with an unsupported toolchain"))
    monkeypatch.setattr(kernel, function, broken)
    with caplog.at_level(logging.WARNING):
        got = video(dit, size=(4, 10))
    broken.assert_called_once()
    (record,) = [record for record in caplog.records if "fused" in record.message]
    assert "unsupported toolchain" in record.message
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
