"""The optional parts behind the front door: 8-bit keys and values, the pooled tail, FlashAttention-4."""

import importlib.metadata
import re
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightforcing.lightforcing_core.attention import attention_backends
from lightforcing.lightforcing_core.attention import dispatch as attention
from lightforcing.lightforcing_core.attention.dispatch import (
    BackendUnavailable,
    choose_backend,
    dense_attention_8bit,
    sparse_attention,
)
from lightforcing.lightforcing_core.attention.selection import BlockSelection

from ...support.attention_problems import DEVICE, EIGHT_BIT, SHAPES, SIZES, Problem, let_flex_fail


@pytest.fixture(scope="module")
def flex():
    try:
        choose_backend(torch.zeros(1, 64, 1, 64, device=DEVICE), torch.zeros(1, 64, 1, 64), backend="flex")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("stored", EIGHT_BIT)
def test_flex_with_8bit_keys_and_values_equals_brute_force(stored):
    problem = Problem(64, (16, 32), 2, 2, stored, batch=2)
    error = (problem.attend("flex").double() - problem.brute_force(problem.mask)).abs().max()
    assert error <= 1e-4


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", EIGHT_BIT)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_8bit_keys_and_values_equal_brute_force(backend, stored, shape):
    problem = Problem(*shape, stored, batch=2)
    error = (problem.attend(backend).double() - problem.brute_force(problem.mask)).abs().max()
    assert error <= 1e-4


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooled_tail_equals_brute_force(backend, stored, shape):
    problem = Problem(*shape, stored)
    got = problem.attend(backend, tail=problem.means)
    assert (got.double() - problem.brute_force(problem.mask, problem.means)).abs().max() <= 1e-4


@pytest.mark.usefixtures("flex")
def test_flex_with_a_tail_equals_brute_force_and_compiles_once():
    """Ragged frames, more means than a block holds, and query blocks that read every block of some tiles, or none."""
    from torch._dynamo.utils import counters

    graphs = []
    for k_frames in (5, 7, 6):
        problem = Problem(40, (32, 16), 2, k_frames, None, batch=2)
        problem.mask[0, 0, 1] = True
        problem.mask[0, 1, 0, :16] = True
        problem.mask[0, 1, 0, 16:] = False
        got = problem.attend("flex", tail=problem.means)
        assert (got.double() - problem.brute_force(problem.mask, problem.means)).abs().max() <= 1e-4
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.usefixtures("flex")
def test_flex_with_a_tail_over_8bit_keys_equals_brute_force():
    problem = Problem(64, (16, 32), 2, 2, torch.int8, batch=2)
    got = problem.attend("flex", tail=problem.means)
    assert (got.double() - problem.brute_force(problem.mask, problem.means)).abs().max() <= 1e-4


@settings(max_examples=20)
@given(**SIZES, with_tail=st.booleans())
def test_reference_keeps_float64_with_and_without_tail(with_tail, **sizes):
    problem = Problem(stored=None, dtype=torch.float64, **sizes)
    means = problem.means if with_tail else None
    got = problem.attend("reference", tail=means)
    assert got.dtype == torch.float64
    assert (got - problem.brute_force(problem.mask, means)).abs().max() <= 1e-12


def test_reference_gathers_8bit_blocks_a_few_at_a_time(monkeypatch):
    problem = Problem(*SHAPES[0], torch.int8)
    at_once = problem.attend("reference", tail=problem.means)
    monkeypatch.setattr(attention_backends, "REFERENCE_CHUNK", 1)
    torch.testing.assert_close(problem.attend("reference", tail=problem.means), at_once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("stored", EIGHT_BIT)
@pytest.mark.parametrize("tokens_per_frame", [40, 64])
def test_dense_attention_over_an_8bit_cache_equals_brute_force(backend, stored, tokens_per_frame):
    problem = Problem(tokens_per_frame, (64, 32), 1, 3, stored, batch=2)
    got = dense_attention_8bit(
        problem.q, *problem.kv, problem.scales, tokens_per_frame=tokens_per_frame, block_k=32, backend=backend
    )
    want = problem.brute_force(torch.ones_like(problem.mask))
    assert got.shape == problem.q.shape
    assert (got.double() - want).abs().max() <= 1e-4


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor wider than 8 bits that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize > 1:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("stored", EIGHT_BIT)
def test_no_wider_copy_of_an_8bit_cache_is_made(stored, monkeypatch):
    problem = Problem(32, (32, 32), 1, 8, stored, heads=4)
    cache = problem.kv[0].numel()
    monkeypatch.setattr(attention_backends, "_compiled_flex", lambda *kind, lse: lambda q, *rest: (q, None))
    monkeypatch.setattr(attention_backends, "REFERENCE_CHUNK", 1)
    runs = {
        "flex": lambda: attention_backends.run_flex(call),
        "reference": lambda: attention_backends.run_reference(call),
        "dense": lambda: dense_attention_8bit(
            problem.q, *problem.kv, problem.scales, tokens_per_frame=32, block_k=32, backend="reference"
        ),
    }
    layouts = [attention.FrameBlocks(32, 32)] * 2
    call = attention_backends.Attention(
        problem.q, *problem.kv, BlockSelection.from_mask(problem.mask), *layouts, 0.1, problem.scales
    )
    for name, run in runs.items():
        with LargestTensor() as largest:
            run()
        assert largest.elements <= cache // 4, name  # one head of four


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.usefixtures("flex")
def test_auto_runs_a_tail_on_flex(monkeypatch):
    monkeypatch.setattr(attention, "_failures", {})
    q, k = torch.empty(1, 4608, 12, 128), torch.empty(1, 9216, 12, 128)
    assert choose_backend(q, k, tail=True).name == choose_backend(q, k).name == "flex"


def test_failure_with_8bit_keys_does_not_decide_for_others(monkeypatch):
    let_flex_fail(monkeypatch)
    problem = Problem(*SHAPES[0], torch.int8)
    assert (problem.attend("auto").double() - problem.brute_force(problem.mask)).abs().max() <= 1e-4
    assert choose_backend(problem.q, problem.kv[0]).name == "reference"
    assert choose_backend(problem.q, problem.q).name == "flex"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, r"k and v are torch.int8 without scales; pass scales=\(k_scales, v_scales\)"),
        (
            {"scales": (torch.ones(1, 6, 1), torch.ones(1, 5, 1))},
            r"scales of v are .*\(1, 5, 1\).*float32 \(1, 6, 1\)",
        ),
        ({"scales": (torch.ones(1, 6, 1).half(), torch.ones(1, 6, 1))}, "scales of k are torch.float16"),
        ({"scales": (torch.ones(1, 6, 1),)}, "argument 2 is shorter|shorter than"),
        ({"v": torch.zeros(1, 80, 1, 64)}, "v is torch.float32 on cpu but k is torch.int8"),
        (
            {"k": torch.zeros(1, 80, 1, 64)},
            "scales are for int8 or float8_e4m3fn keys and values, and k is torch.float32",
        ),
        ({"q": torch.zeros(1, 40, 1, 64).char()}, "q is torch.int8; attention needs queries in a floating-point dtype"),
        (
            {"tail": (torch.zeros(1, 6, 1, 64), torch.zeros(1, 3, 1, 64))},
            r"tail of v are .*\(1, 3, 1, 64\).*\(1, 6, 1, 64\)",
        ),
        ({"tail": (torch.zeros(1, 6, 1, 64).half(),) * 2}, "tail of k are torch.float16 .* torch.float32"),
    ],
)
def test_optional_parts_that_do_not_fit_are_refused(change, message):
    arguments = {
        "q": torch.zeros(1, 40, 1, 64),
        "k": torch.zeros(1, 80, 1, 64, dtype=torch.int8),
        "v": torch.zeros(1, 80, 1, 64, dtype=torch.int8),
        "mask": torch.ones(1, 1, 3, 6, dtype=torch.bool),
        "scales": (torch.ones(1, 6, 1), torch.ones(1, 6, 1)),
        "tokens_per_frame": 40,
        "block": (16, 16),
    }
    with pytest.raises(ValueError, match=message):
        sparse_attention(**(arguments | change))


def test_dense_attention_8bit_refuses_what_is_not_8bit():
    q = torch.zeros(1, 40, 1, 64)
    with pytest.raises(ValueError, match=r"scales are missing: torch\.float32 keys"):
        dense_attention_8bit(q, q, q, None, tokens_per_frame=40, block_k=16)
    with pytest.raises(ValueError, match="scales are for int8"):
        dense_attention_8bit(q, q, q, (torch.ones(1, 3, 1),) * 2, tokens_per_frame=40, block_k=16)


# -------------------------------------------------------------------------------------------- FlashAttention-4


class BlockSparseTensorsTorch(NamedTuple):
    """The fields of flash_attn.cute.block_sparsity.BlockSparseTensorsTorch in flash-attn-4 4.0.0b36."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash_attn_func(q, k, v, *, softmax_scale, block_sparse_tensors, return_lse=False):
    """What the real one computes from block-sparse tensors, by dense math; reads no list past its count.

    Its log-sum-exp is [B, H, L], natural and −inf for rows without keys.
    """
    lists = block_sparse_tensors
    block_q, block_k = lists.block_size
    assert all(x.dtype == torch.int32 for x in lists[:4])
    assert lists.mask_block_cnt.shape == lists.full_block_cnt.shape == lists.full_block_idx.shape[:3]
    assert lists.mask_block_idx.shape[:3] == lists.full_block_cnt.shape
    assert lists.full_block_idx.is_contiguous()
    allowed = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    for counts, ids in ((lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx)):
        for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            for n in ids[b, h, m, : counts[b, h, m]].tolist():
                allowed[b, h, m * block_q : (m + 1) * block_q, n * block_k : (n + 1) * block_k] = True
    scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) * softmax_scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1).nan_to_num(0.0), v.float()).to(q.dtype)
    return out, scores.logsumexp(-1) if return_lse else None


@pytest.fixture
def flash4(monkeypatch):
    """A stand-in for the installed package, and a GPU of the given compute capability."""
    package, cute, sparsity = (ModuleType(name) for name in ("flash_attn", "cute", "block_sparsity"))
    cute.flash_attn_func, sparsity.BlockSparseTensorsTorch = flash_attn_func, BlockSparseTensorsTorch
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda x: "4.0.0b36" if x == "flash-attn-4" else version(x))

    def on(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    on((9, 0))
    return on


def request(block=(128, 128), dim=128, dtype=torch.bfloat16, stored=None, tokens=1536, device="cuda", **needs):
    shape = (1, 4608, 12, dim)
    q = SimpleNamespace(dtype=dtype, shape=shape, device=SimpleNamespace(type=device))
    k = SimpleNamespace(dtype=stored or dtype, shape=shape, device=q.device)
    return attention_backends.Request(q, k, block, tokens_per_frame=tokens, **needs)


@pytest.mark.parametrize(("capability", "block"), [((9, 0), (128, 128)), ((10, 0), (256, 128)), ((10, 3), (256, 128))])
def test_flash4_takes_its_own_tile_sizes(flash4, capability, block):
    flash4(capability)
    assert attention_backends.why_not_flash4(request(block=block)) is None


@pytest.mark.parametrize(
    ("capability", "change", "message"),
    [
        ((9, 0), {"block": (64, 64)}, r"blocks of \(128, 128\) on sm_90, not \(64, 64\)"),
        ((10, 0), {"block": (128, 128)}, r"blocks of \(256, 128\) on sm_100, not \(128, 128\)"),
        ((12, 0), {}, "block sparsity on sm_90, sm_100 and sm_103, not on sm_120"),
        ((8, 0), {}, "not on sm_80"),
        ((9, 0), {"tokens": 1560}, "no ragged blocks, and 1560 tokens per frame"),
        ((9, 0), {"dtype": torch.float32}, "bfloat16 or float16, not torch.float32"),
        ((9, 0), {"stored": torch.int8}, "not set up for torch.int8 keys"),
        ((9, 0), {"dim": 96}, "head dims of 64 or 128, not 96"),
        ((9, 0), {"tail": True}, "not set up for a pooled tail"),
        ((9, 0), {"needs_grad": True}, "not set up for gradients"),
        ((9, 0), {"device": "cpu"}, "NVIDIA GPUs, not on cpu"),
    ],
)
def test_flash4_says_why_it_cannot_run(flash4, capability, change, message):
    flash4(capability)
    assert re.search(message, attention_backends.why_not_flash4(request(**change)))


def test_flash4_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "pip install --pre flash-attn-4" in attention_backends.why_not_flash4(request())


def test_flash4_must_be_named(flash4, monkeypatch):
    monkeypatch.setattr(attention, "_failures", {})
    monkeypatch.setitem(attention_backends.WHY_NOT, "flash4", lambda request: None)
    monkeypatch.setitem(attention_backends.WHY_NOT, "flex", lambda request: "no flex in this test")
    q = torch.empty(1, 256, 1, 128)
    choice = choose_backend(q, q)
    assert choice.name == "reference"
    assert "flash" not in choice.reason.lower()
    assert choose_backend(q, q, backend="flash4").name == "flash4"


def test_flash4_is_fed_from_the_compact_list(flash4, monkeypatch):
    monkeypatch.setitem(attention_backends.WHY_NOT, "flash4", lambda request: None)
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    problem = Problem(256, (128, 128), 1, 3, None, batch=2, dim=16)
    blocks, counts = BlockSelection.from_mask(problem.mask)
    past_the_count = torch.arange(blocks.shape[-1]) >= counts[..., None]
    selection = BlockSelection(blocks.masked_fill(past_the_count, 0)[..., : counts.max()], counts)
    options = {"selection": selection, "tokens_per_frame": 256, "block": (128, 128), "backend": "flash4"}
    got = sparse_attention(problem.q, *problem.kv, **options)
    want, want_lse = problem.brute_force_and_lse(problem.mask)
    assert (got.double() - want).abs().max() <= 1e-4
    assert current == [problem.q.device]  # it launches on the current one
    same, lse = sparse_attention(problem.q, *problem.kv, **options, return_lse=True)
    assert torch.equal(same, got)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=0)
