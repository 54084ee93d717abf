"""Attention libraries that cannot be there without a card: each takes what the real one takes, and gives its shapes."""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from stream_order import Impossible
from torch import Tensor
from torch.nn.attention import flex_attention


def flex(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, mask: Any, scale: float, *, kernel_options: Any = None
) -> Tensor:
    """`flex_attention` with a block mask, heads before tokens."""
    _require_beside(q, k, v, mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    return torch.empty_like(q)


class BlockSparseTensorsTorch(NamedTuple):
    """The lists of flash-attn-4 4.0.0b36, of its fields those that an inference may set."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    block_sparse_tensors: BlockSparseTensorsTorch,
    return_lse: bool = False,
) -> tuple[Tensor, None]:
    """`flash_attn.cute.flash_attn_func`, which runs on the current device, and what it asks of its lists."""
    lists = block_sparse_tensors
    if lists.full_block_cnt is None or lists.full_block_idx is None or lists.block_size is None:
        raise Impossible("flash4 gets no list of full blocks or no block size")
    _require_beside(q, k, v, *lists[:4])
    if q.device.index != torch.cuda.current_device():
        raise Impossible(f"flash4 gets tensors on {q.device} while cuda:{torch.cuda.current_device()} is current")
    blocks = [-(-x.shape[1] // size) for x, size in zip((q, k), lists.block_size, strict=True)]
    for count, index in (lists[:2], lists[2:4]):
        fits = count.shape == index.shape[:3] == (q.shape[0], q.shape[2], blocks[0]) and index.shape[3] <= blocks[1]
        if not fits or {count.dtype, index.dtype} != {torch.int32}:
            raise Impossible(f"flash4 gets lists {tuple(count.shape)} and {tuple(index.shape)} for {blocks} blocks")
    return torch.empty_like(q), None


@contextlib.contextmanager
def attention_stand_ins() -> Iterator[None]:
    """flex_attention that is never compiled, and flash-attn-4 installed."""
    cute, sparsity = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.block_sparsity")
    cute.flash_attn_func, sparsity.BlockSparseTensorsTorch = flash4, BlockSparseTensorsTorch
    there = {"flash_attn": ModuleType("flash_attn"), cute.__name__: cute, sparsity.__name__: sparsity}
    version = importlib.metadata.version

    def version_of(name: str) -> str:
        return "4.0.0b36" if name == "flash-attn-4" else version(name)

    with (
        mock.patch.object(torch, "compile", lambda function, **_: function),
        mock.patch.object(flex_attention, "flex_attention", flex),
        mock.patch.dict(sys.modules, there),
        mock.patch.object(importlib.metadata, "version", version_of),
    ):
        yield


def _require_beside(q: Tensor, *others: Tensor) -> None:
    if found := {x.device for x in others} - {q.device}:
        raise Impossible(f"attention gets q on {q.device} and others on {found}")
