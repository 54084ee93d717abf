"""FlashAttention-4 and FlashInfer behind `sparse_attention`, by stand-ins for the packages."""

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
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.selection import BlockSelection
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.runtime import Runtime

from ...support.attention_problems import Problem
from ...support.rollouts import TEXT, recipe_of, text, video

FLASH4, FLASHINFER = (next(x for x in BACKENDS if x.name == name) for name in ("flash4", "flashinfer"))


class BlockSparseTensorsTorch(NamedTuple):
    """The fields of flash_attn.cute.block_sparsity.BlockSparseTensorsTorch in flash-attn-4 4.0.0b36."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def attention(q, k, v, scale, allowed):
    """Dense math over the allowed scores, bool [B, H, Lq, Lk]; zeros for a query without any."""
    scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhlm,bmhd->blhd", weights, v.float()).to(q.dtype)


def allowed_by(q, k, counts, ids, block):
    """bool [B, H, Lq, Lk]; reads no list past its count."""
    assert counts.dtype == ids.dtype == torch.int32
    assert counts.shape == ids.shape[:3]
    allowed = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for n in ids[b, h, m, : counts[b, h, m]].tolist():
            allowed[b, h, m * block[0] : (m + 1) * block[0], n * block[1] : (n + 1) * block[1]] = True
    return allowed


def flash_attn_func(q, k, v, *, softmax_scale, block_sparse_tensors):
    """What the real one computes from block-sparse tensors, by dense math."""
    lists = block_sparse_tensors
    assert lists.full_block_idx.is_contiguous()
    pairs = (lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx)
    masked, full = (allowed_by(q, k, *pair, lists.block_size) for pair in pairs)
    return attention(q, k, v, softmax_scale, masked | full), None


def bsa_blk64_fwd(q, k, v, q2k_block_index, block_sparse_num, block_sizes, q2k_block_nums, softmax_scale):
    """What both of FlashInfer's kernels compute: whole blocks of 64 tokens, of which the first block_sizes count."""
    assert q.shape[1] % 64 == k.shape[1] % 64 == 0
    assert q2k_block_index.is_contiguous()
    assert q2k_block_nums.is_contiguous()
    assert block_sizes.dtype == torch.int32
    assert block_sizes.shape == (k.shape[1] // 64,)
    real = torch.arange(64) < block_sizes[:, None]
    allowed = allowed_by(q, k, q2k_block_nums, q2k_block_index, (64, 64))
    return attention(q, k, v, softmax_scale, allowed & real.flatten()), None


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for the installed packages, and a GPU of the given compute capability."""
    modules = {
        "flash_attn.cute": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "flashinfer.cute_dsl.sparse.bsa_attn_sm100_blk64": {"bsa_attn_sm100_blk64_fwd": bsa_blk64_fwd},
        "flashinfer.cute_dsl.sparse.bsa_attn_sm120": {"bsa_attn_sm120_blk64_fwd": bsa_blk64_fwd},
    }
    parents = ("flash_attn", "flashinfer", "flashinfer.cute_dsl", "flashinfer.cute_dsl.sparse")
    for name, content in ({name: {} for name in parents} | modules).items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    versions = {"flash-attn-4": "4.0.0b36", "flashinfer-python": "0.7.0"}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or version(name))

    def on(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

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


@pytest.mark.parametrize(
    ("backend", "capability", "block"),
    [
        (FLASH4, (9, 0), (128, 128)),
        (FLASH4, (10, 0), (256, 128)),
        (FLASH4, (10, 3), (256, 128)),
        (FLASHINFER, (10, 0), (64, 64)),
        (FLASHINFER, (10, 3), (64, 64)),
        (FLASHINFER, (12, 0), (64, 64)),
        (FLASHINFER, (12, 1), (64, 64)),
    ],
)
def test_a_package_takes_its_own_tile_sizes(gpu, backend, capability, block):
    gpu(capability)
    assert backend.why_not(call(block=block)) is None


@pytest.mark.parametrize(
    ("backend", "capability", "change", "message"),
    [
        (FLASH4, (9, 0), {"block": (64, 64)}, r"blocks of \(128, 128\) on sm_90, not \(64, 64\)"),
        (FLASH4, (10, 0), {"block": (128, 128)}, r"blocks of \(256, 128\) on sm_100, not \(128, 128\)"),
        (FLASH4, (12, 0), {}, "block sparsity on sm_9x and sm_10x, not on sm_120"),
        (FLASH4, (9, 0), {"tokens": 1560}, "no ragged blocks, and 1560 tokens per frame"),
        (FLASH4, (9, 0), {"dtype": torch.float32}, "bfloat16 or float16, not torch.float32"),
        (FLASH4, (9, 0), {"stored": torch.int8}, "not set up for torch.int8 keys"),
        (FLASH4, (9, 0), {"dim": 96}, "head dims of 64 or 128, not 96"),
        (FLASH4, (9, 0), {"tail": (None, None)}, "not set up for a pooled tail"),
        (FLASH4, (9, 0), {"grad": True}, "not set up for gradients"),
        (FLASH4, (9, 0), {"device": "cpu"}, "NVIDIA GPUs, not on cpu"),
        (FLASHINFER, (9, 0), {"block": (64, 64)}, "block sparsity on sm_10x and sm_12x, not on sm_90"),
        (FLASHINFER, (12, 0), {}, r"blocks of \(64, 64\) on sm_120, not \(128, 128\)"),
        (FLASHINFER, (10, 0), {"block": (64, 64), "dtype": torch.float16}, "takes torch.bfloat16, not torch.float16"),
        (FLASHINFER, (10, 0), {"block": (64, 64), "device": "cpu"}, "NVIDIA GPUs, not on cpu"),
    ],
)
def test_a_package_says_why_it_cannot_run(gpu, backend, capability, change, message):
    gpu(capability)
    assert re.search(message, backend.why_not(call(**change)))


@pytest.mark.parametrize(
    ("backend", "capability", "block", "package"),
    [(FLASH4, (9, 0), (128, 128), "flash-attn-4"), (FLASHINFER, (12, 0), (64, 64), "flashinfer-python")],
)
def test_a_package_that_is_not_installed_says_what_to_install(monkeypatch, backend, capability, block, package):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert f"pip install --pre {package}" in backend.why_not(call(block=block))


def test_packages_are_not_for_amd(gpu, monkeypatch):
    gpu((12, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "not on AMD GPUs" in FLASHINFER.why_not(call(block=(64, 64)))


def test_flashinfer_that_is_too_old_says_so(gpu, monkeypatch):
    gpu((12, 0))
    monkeypatch.setitem(sys.modules, "flashinfer.cute_dsl.sparse.bsa_attn_sm120", None)
    assert "update flashinfer-python" in FLASHINFER.why_not(call(block=(64, 64)))


@pytest.mark.parametrize("backend", [FLASH4, FLASHINFER])
def test_a_package_must_be_named(monkeypatch, backend):
    monkeypatch.setattr(backend, "why_not", lambda call: None, raising=False)
    problem = Problem(16, (16, 16), 1, 2)
    choice = choose(problem.call())
    assert choice.name == "reference"
    assert backend.name not in choice.reason.lower()
    assert choose(problem.call(), backend.name).name == backend.name


@pytest.mark.parametrize(
    ("backend", "tokens", "block"),
    [(FLASH4, 256, (128, 128)), (FLASHINFER, 128, (64, 64)), (FLASHINFER, 150, (64, 64)), (FLASHINFER, 20, (64, 64))],
)
def test_a_package_is_fed_from_the_compact_list(gpu, monkeypatch, backend, tokens, block):
    gpu((10, 0))
    monkeypatch.setattr(backend, "why_not", lambda call: None, raising=False)
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    problem = Problem(tokens, block, 1, 3, batch=2, dim=16)
    blocks, counts = BlockSelection.from_mask(problem.mask)
    past_the_count = torch.arange(blocks.shape[-1]) >= counts[..., None]
    selection = BlockSelection(blocks.masked_fill(past_the_count, 0)[..., : counts.max()], counts)
    got = problem.attend(backend.name, mask=None, selection=selection)
    assert (got.double() - problem.brute_force()).abs().max() <= 1e-4
    assert current == [problem.q.device]  # it launches on the current one


@pytest.mark.parametrize("kv", [KVOptions(), KVOptions(host=True)], ids=str)
def test_flashinfer_reads_a_cache_of_whole_blocks(gpu, monkeypatch, kv):
    """Ragged frames, the window moving, a dense chunk that sees others: the videos of the reference."""
    gpu((10, 0))
    monkeypatch.setattr(FLASHINFER, "why_not", lambda call: None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    dit = wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=2, text_dim=TEXT))
    video_of = {"latent_shape": (1, 16, 5, 20, 16), "frames_per_chunk": 1, "growth": [0.0, 0.0, 0.6, 0.6, 0.6]}
    videos, memory = [], []
    for backend in ("reference", "flashinfer"):
        options = AttentionOptions(backend=backend, block=(64, 64), keep_frames=3, sink_frames=1, near_frames=1)
        recipe = recipe_of(
            context=text(1), attention=options, window=4, sink_frames=1, sigmas=(1.0, 0.5, 0.0), **video_of
        )
        memory.append(recipe.cache_shape(layers=2, heads=2, head_dim=128, dtype=torch.float32).memory_layout)
        videos.append(video(rollout(dit, recipe, Runtime(kv=kv))))
    assert [layout.rows_per_frame for layout in memory] == [80, 128]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-5)
