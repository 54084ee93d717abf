"""`sparse_attention`: every backend equals brute force, and "auto" says what it does."""

import logging
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core import machine
from lightforcing.lightforcing_core.attention.backends import BACKENDS, DENSE, flex
from lightforcing.lightforcing_core.attention.backends.base import Call
from lightforcing.lightforcing_core.attention.backends.dense import FastestDense
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import (
    BackendUnavailable,
    attend,
    choose,
    choose_backend,
    sparse_attention,
)
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.selection import BlockSelection
from lightforcing.lightforcing_core.fast_path import why_no_kernels

from ...support.attention_problems import DEVICE, Problem, let_flex_fail


def check(backend, *sizes, **rest):
    problem = Problem(*sizes, **rest)
    got = problem.attend(backend)
    want = problem.brute_force()
    assert got.shape == problem.q.shape
    assert got.dtype == problem.q.dtype
    if got.dtype == torch.float32:
        assert (got.double() - want).abs().max() <= 1e-4
    else:
        assert (got.double() - want).abs().max() / want.abs().max() <= 2e-2
        assert (got.double() - want).norm() / want.norm() <= 2e-2


# tokens per frame, (query, key) block, query frames, key frames; and the rest.
SHAPES = [
    ((1536, (64, 64), 1, 2), {"density": 0.1, "heads": 1}),
    ((1560, (64, 64), 1, 2), {"density": 0.1, "heads": 1, "dtype": torch.bfloat16}),
    ((1560, (128, 64), 1, 1), {"density": 0.1, "heads": 1}),
    ((390, (64, 32), 1, 3), {"dtype": torch.bfloat16}),
    ((390, (128, 128), 2, 2), {"batch": 2, "density": 0.2}),
    ((96, (32, 16), 2, 4), {"batch": 2, "density": 0.2}),
    ((96, (64, 128), 1, 3), {"dim": 128, "dtype": torch.bfloat16}),
    ((7, (16, 16), 3, 7), {"dtype": torch.float16}),
    ((7, (16, 64), 2, 2), {"batch": 2}),
]


@pytest.mark.parametrize("backend", ["reference", "triton", "flex"])
@pytest.mark.parametrize(("sizes", "rest"), SHAPES)
def test_backend_equals_brute_force(request, backend, sizes, rest):
    if backend == "flex":
        request.getfixturevalue("flex_runs")  # skips if it cannot run here
    check(backend, *sizes, **rest)


@pytest.mark.usefixtures("flex_runs")
def test_flex_compiles_once_for_all_chunk_lengths_and_frame_sizes():
    check("flex", 130, (64, 64), 2, 4)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens_per_frame, q_frames, k_frames in ((130, 2, 6), (130, 2, 8), (70, 3, 9), (99, 1, 2)):
        check("flex", tokens_per_frame, (64, 64), q_frames, k_frames)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@given(
    tokens_per_frame=st.integers(1, 80),
    block=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
    q_frames=st.integers(1, 3),
    past=st.integers(0, 3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    dim=st.sampled_from([8, 24, 64]),
    density=st.floats(0.05, 1.0),
)
def test_reference_equals_brute_force_on_any_shape(tokens_per_frame, block, past, q_frames, **rest):
    check("reference", tokens_per_frame, block, q_frames, q_frames + past, **rest)


@pytest.mark.usefixtures("flex_runs")
@pytest.mark.parametrize("backend", ["triton", "flex", "reference"])
def test_unselected_blocks_and_the_rest_of_the_cache_are_never_read(backend):
    problem = Problem(390, (64, 64), 1, 3, dim=64)
    # The very first block, a full one, and a frame's ragged last one (7 blocks per frame).
    problem.mask[..., 0] = problem.mask[..., 3] = problem.mask[..., 6] = False
    want = problem.brute_force()
    k, v = problem.kv
    cache = torch.full((2, 1, k.shape[1] + 200, 2, 64), torch.nan, device=DEVICE)
    cache[0, :, : k.shape[1]], cache[1, :, : k.shape[1]] = k, v
    problem.kv = list(cache[:, :, : k.shape[1]])
    for start, end in ((0, 64), (192, 256), (384, 390)):
        for x in problem.kv:
            x[:, start:end] = torch.nan
    assert (problem.attend(backend).double() - want).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ["reference", "triton", "dense"])
def test_full_mask_equals_dense_attention_with_its_scale(backend):
    problem = Problem(50, (32, 16), 1, 2, batch=2)
    call = problem.call(mask=torch.ones_like(problem.mask), scale=0.3)
    got, _ = attend(call, choose(call, backend), backend)
    q, k, v = (x.transpose(1, 2) for x in (problem.q, *problem.kv))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(got, dense.transpose(1, 2), atol=1e-4, rtol=0)


def test_mask_and_selection_mean_the_same():
    problem = Problem(50, (32, 16), 1, 2)
    options = {"tokens_per_frame": 50, "block": (32, 16), "backend": "reference"}
    from_list = sparse_attention(problem.q, *problem.kv, selection=BlockSelection.from_mask(problem.mask), **options)
    assert torch.equal(from_list, sparse_attention(problem.q, *problem.kv, mask=problem.mask, **options))


def test_reference_keeps_float64_and_can_be_differentiated():
    problem = Problem(20, (16, 16), 1, 2, dim=4, dtype=torch.float64)
    problem.mask[:] = True

    def attend(q):
        return sparse_attention(q, *problem.kv, mask=problem.mask, tokens_per_frame=20, block=(16, 16))

    assert attend(problem.q.requires_grad_()).dtype == torch.float64
    assert torch.autograd.gradcheck(attend, problem.q, fast_mode=True)


# ------------------------------------------------------------------------------------------------- the choice


def shapes(tokens, keys=None, **options):
    """The choice for bfloat16 shapes of the published model."""
    q, k = (torch.empty(1, length, 12, 128, dtype=torch.bfloat16) for length in (tokens, keys or tokens))
    return choose_backend(q, k, tokens_per_frame=tokens, **options)


@pytest.mark.usefixtures("flex_runs")
def test_auto_on_cpu_compiles_flex_only_for_large_problems():
    assert shapes(4608, 9216).name == shapes(4608, 9216, tail=True).name == "flex"
    small = shapes(96)
    assert small.name == "reference"
    assert "query-key pairs" in small.reason
    assert "Triton" in small.reason  # its interpreter is never taken


@pytest.fixture
def no_compilers(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(flex, "cpp_compiler", lambda: None)
    why_no_kernels.cache_clear()
    yield
    why_no_kernels.cache_clear()


@pytest.mark.usefixtures("no_compilers")
def test_auto_without_a_compiler_or_triton_takes_the_reference_and_says_why():
    choice = shapes(4608, 9216)
    assert choice.name == "reference"
    assert "pip install triton" in choice.reason
    assert "C++ compiler" in choice.reason
    with pytest.raises(BackendUnavailable, match="'triton' cannot run: triton is not installed; install it with"):
        shapes(96, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'flex' cannot run: .* needs a C\+\+ compiler: g\+\+"):
        shapes(96, backend="flex")


def test_triton_that_orders_loads_wrongly_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.2.0+git1")
    assert "need triton 3.3 or newer, not 3.2.0+git1; install torch 2.7" in why_no_kernels.__wrapped__()


@pytest.mark.usefixtures("no_compilers")
def test_auto_without_triton_on_another_device_is_dense_with_one_warning(caplog):
    q = torch.empty(1, 128, 2, 64, device="meta")
    call = Call(q, q, q, FrameBlocks(64, 64), FrameBlocks(64, 64), BlockSelection(q, q))
    choice = choose(call)
    assert choice.name == DENSE.name
    assert "triton is not installed" in choice.reason
    assert "reference" not in choice.reason
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            result, ran = attend(call, choice)
    assert (result.shape, ran) == (q.shape, choice)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "runs dense (triton is not installed" in record.message
    assert choose(call, "reference").name == "reference"  # only when named


def test_dense_reads_everything_through_the_given_attention():
    problem = Problem(40, (32, 16), 1, 2)
    dense = mock.Mock(return_value=problem.q)
    assert DENSE.run(replace(problem.call(), dense=dense)) is problem.q
    dense.assert_called_once_with(problem.q, *problem.kv)


def test_attention_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lightforcing.lightforcing_core.attention.dispatch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_auto_falls_through_when_a_backend_fails_and_a_named_one_raises(monkeypatch, caplog):
    let_flex_fail(monkeypatch, "the compiler is on holiday\nsecond line")
    problem = Problem(20, (16, 16), 1, 2)
    with caplog.at_level(logging.INFO):
        got = [problem.attend("auto") for _ in range(2)]
    want = problem.attend("reference")
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1  # the second call knows and does not try again
    assert "flex failed" in warnings[0]
    assert "on holiday" in warnings[0]
    assert "second line" not in warnings[0]
    assert "on holiday" in choose(problem.call()).reason
    other = choose_backend(problem.q, problem.q, tokens_per_frame=20, block=(32, 32))
    assert other.name == "flex"  # other blocks are another path
    with pytest.raises(RuntimeError, match="on holiday"):
        problem.attend("flex")


def test_auto_and_named_backends_that_run_out_of_memory_raise_it_and_ban_nothing(monkeypatch):
    let_flex_fail(monkeypatch, "Triton Error [CUDA]: out of memory")
    problem = Problem(20, (16, 16), 1, 2)
    for backend in ("auto", "flex"):
        with pytest.raises(torch.OutOfMemoryError):
            problem.attend(backend)
    assert choose(problem.call()).name == "flex"


def test_auto_logs_its_choice_once(caplog):
    problem = Problem(20, (16, 16), 1, 2, dtype=torch.float64)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            problem.attend("auto")
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("[Light Forcing] attention: reference (")


def test_what_a_backend_allocates_is_counted():
    """Of the reference the bound on what it gathers; of Triton the tail's bias; of flex lists and copies."""
    problem = Problem(40, (32, 16), 1, 3, heads=2, dim=32)
    named = {backend.name: backend for backend in BACKENDS}
    call, tail = problem.call(), problem.call(tail=problem.means)
    pairs = 2 * 2 * 9  # heads · query blocks · key blocks
    assert named["triton"].workspace(call) == 0
    assert named["triton"].workspace(tail) == 4 * pairs
    assert named["reference"].workspace(call) == 4 * 2 * 9 * 16 * (2 * 32 + 2 * 32)
    keys, queries = 4 * 9 * 16 * 2 * 32, 4 * 2 * 32 * 2 * 32
    assert named["flex"].workspace(call) == 3 * 4 * pairs + 4 * keys + 2 * queries
    assert named["flex"].workspace(tail) == 6 * 4 * pairs + 6 * keys + 2 * queries


# --------------------------------------------------------------------------------------------------- bad input


STORED = torch.zeros(1, 80, 1, 64, dtype=torch.int8)
IN_8_BITS = {"k": STORED, "v": STORED, "scales": (torch.ones(1, 6, 1),) * 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backend": "magic"},
            "attention backend 'magic'; use 'auto', 'triton', 'flex', 'flashinfer', 'flash4', 'reference'",
        ),
        ({"block": (64, 48)}, "key block of 48 tokens is not a power of two"),
        ({"tokens_per_frame": 30}, "40 tokens are not whole frames of 30"),
        ({"mask": None}, "exactly one of mask and selection, not neither"),
        ({"mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, r"mask is torch.bool \(1, 1, 2, 2\).*\(1, 1, 3, 6\)"),
        ({"mask": torch.ones(1, 1, 3, 6)}, "mask is torch.float32"),
        ({"k": torch.zeros(1, 80, 64)}, r"k \(1, 80, 64\); pass \[B, L, H, D\]"),
        ({"k": torch.zeros(1, 80, 2, 64)}, r"k is torch.float32 \(1, 80, 2, 64\) on cpu; expected .*\(1, 80, 1, 64\)"),
        ({"k": torch.zeros(1, 80, 1, 64, dtype=torch.float16)}, "k is torch.float16 .* on cpu; expected torch.float32"),
        (
            {"mask": None, "selection": BlockSelection(torch.zeros(1, 1, 3, 6), torch.ones(1, 1, 3))},
            "selection.blocks is torch.float32 .* on cpu; expected torch.int32",
        ),
        (
            {"mask": None, "selection": BlockSelection(torch.zeros(1, 1, 4, 6).int(), torch.ones(1, 1, 4).int())},
            r"selection.blocks is torch.int32 \(1, 1, 4, 6\) on cpu; expected torch.int32 \(1, 1, 3, 6\)",
        ),
        ({"q": torch.zeros(1, 40, 1, 64).char()}, "q is torch.int8; attention needs queries in a floating-point dtype"),
        ({"tail": (torch.zeros(1, 6, 1, 64), torch.zeros(1, 3, 1, 64))}, r"tail of v are .*\(1, 3, 1.*\(1, 6, 1, 64\)"),
        ({"tail": (torch.zeros(1, 6, 1, 64).half(),) * 2}, "tail of k are torch.float16 .* torch.float32"),
        (
            {"scales": (torch.ones(1, 6, 1),) * 2},
            "scales are for int8 or float8_e4m3fn keys and values, and k is",
        ),
        (IN_8_BITS | {"scales": None}, r"are torch.int8 without scales; pass scales=\(k_scales, v_scales\)"),
        (IN_8_BITS | {"scales": (torch.ones(1, 6, 1), torch.ones(1, 5, 1))}, r"of v are .*\(1, 5, 1\).* \(1, 6, 1\)"),
        (IN_8_BITS | {"scales": (torch.ones(1, 6, 1).half(),) * 2}, "scales of k are torch.float16"),
        (IN_8_BITS | {"scales": (torch.ones(1, 6, 1),)}, "argument 2 is shorter|shorter than"),
        (IN_8_BITS | {"v": torch.zeros(1, 80, 1, 64)}, "v is torch.float32 .* on cpu; expected torch.int8"),
    ],
)
def test_bad_input_is_refused_with_its_values(change, message):
    arguments = {
        "q": torch.zeros(1, 40, 1, 64),
        "k": torch.zeros(1, 80, 1, 64),
        "v": torch.zeros(1, 80, 1, 64),
        "mask": torch.ones(1, 1, 3, 6, dtype=torch.bool),
        "tokens_per_frame": 40,
        "block": (16, 16),
    }
    with pytest.raises(ValueError, match=message):
        sparse_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "unknown attention backend 'cuda'; use 'auto', 'triton'"),
        ({"block": (100, 64)}, "query block of 100 tokens"),
        ({"sink_frames": 4, "near_frames": 3}, "sink_frames 4 \\+ near_frames 3 exceed keep_frames 6"),
        ({"keep_frames": -1}, "keep_frames -1 is negative"),
        ({"estimator": "max"}, "estimator 'max' is not known; use one of mean, lse"),
        ({"policy": "magic"}, "policy 'magic' is not known; use one of light_forcing, dense, window, topk"),
    ],
)
def test_attention_options_refuse_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)


def test_options_of_saved_runs_load_without_a_policy_and_with_options_that_are_gone():
    saved = {"backend": "reference", "block": [32, 16], "tail": True, "reuse_steps": 2}
    options = AttentionOptions.from_saved(saved)
    assert options == AttentionOptions("reference", (32, 16), tail=True)
    assert "policy" not in options.to_saved()
    topk = replace(options, policy="topk")
    assert AttentionOptions.from_saved(topk.to_saved()) == topk


def test_dense_attention_runs_in_the_way_that_machine_chooses(monkeypatch):
    asked = []

    def choose(work, facts, device, names, run, *, incumbent, tolerance):
        asked.append((facts, incumbent))
        return list(names)[-1]

    monkeypatch.setattr(machine, "choose", choose)
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 6, 2, 8)
    ways = {"usual": lambda q, k, v: q, "better": lambda q, k, v: q + 1}
    assert torch.equal(FastestDense(ways)(q, k, k), q + 1)
    assert torch.equal(FastestDense()(q, k, k), q)  # on a CPU torch has no other kernel
    assert asked == [((1, 4, 2, 8, 6, torch.float32), usual) for usual in ("usual", "torch")]
