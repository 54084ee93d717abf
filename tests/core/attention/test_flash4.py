"""FlashAttention-4 behind `sparse_attention`, by a stand-in for its package."""

import importlib.metadata
import re
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightforcing.lightforcing_core.attention.backends import BACKENDS
from lightforcing.lightforcing_core.attention.backends.base import Call
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import choose
from lightforcing.lightforcing_core.attention.selection import BlockSelection

from ...support.attention_problems import Problem

(FLASH4,) = (backend for backend in BACKENDS if backend.name == "flash4")


class BlockSparseTensorsTorch(NamedTuple):
    """The fields of flash_attn.cute.block_sparsity.BlockSparseTensorsTorch in flash-attn-4 4.0.0b36."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash_attn_func(q, k, v, *, softmax_scale, block_sparse_tensors):
    """What the real one computes from block-sparse tensors, by dense math; reads no list past its count."""
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
    return out, None


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


def call(block=(128, 128), dim=128, dtype=torch.bfloat16, stored=None, tokens=1536, device="cuda", **rest):
    """A call on a card, as far as a reason against it looks."""
    shape = (1, 3 * tokens, 12, dim)
    grad = rest.pop("grad", False)
    q, k = (
        SimpleNamespace(dtype=kind, shape=shape, device=SimpleNamespace(type=device), requires_grad=grad)
        for kind in (dtype, stored or dtype)
    )
    return Call(q, k, k, *(FrameBlocks(tokens, size) for size in block), **rest)


@pytest.mark.parametrize(("capability", "block"), [((9, 0), (128, 128)), ((10, 0), (256, 128)), ((10, 3), (256, 128))])
def test_flash4_takes_its_own_tile_sizes(flash4, capability, block):
    flash4(capability)
    assert FLASH4.why_not(call(block=block)) is None


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
        ((9, 0), {"tail": (None, None)}, "not set up for a pooled tail"),
        ((9, 0), {"grad": True}, "not set up for gradients"),
        ((9, 0), {"device": "cpu"}, "NVIDIA GPUs, not on cpu"),
    ],
)
def test_flash4_says_why_it_cannot_run(flash4, capability, change, message):
    flash4(capability)
    assert re.search(message, FLASH4.why_not(call(**change)))


def test_flash4_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "pip install --pre flash-attn-4" in FLASH4.why_not(call())


def test_flash4_must_be_named(monkeypatch):
    monkeypatch.setattr(FLASH4, "why_not", lambda call: None, raising=False)
    problem = Problem(16, (16, 16), 1, 2)
    choice = choose(problem.call())
    assert choice.name == "reference"
    assert "flash" not in choice.reason.lower()
    assert choose(problem.call(), "flash4").name == "flash4"


def test_flash4_is_fed_from_the_compact_list(flash4, monkeypatch):
    monkeypatch.setattr(FLASH4, "why_not", lambda call: None, raising=False)
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    problem = Problem(256, (128, 128), 1, 3, batch=2, dim=16)
    blocks, counts = BlockSelection.from_mask(problem.mask)
    past_the_count = torch.arange(blocks.shape[-1]) >= counts[..., None]
    selection = BlockSelection(blocks.masked_fill(past_the_count, 0)[..., : counts.max()], counts)
    got = problem.attend("flash4", mask=None, selection=selection)
    assert (got.double() - problem.brute_force()).abs().max() <= 1e-4
    assert current == [problem.q.device]  # it launches on the current one
