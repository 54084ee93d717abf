"""The backends behind `attention`: for each, a reason why it cannot run or None, and the run itself.

A backend takes an `Attention`, everything that one call is about, after the front door has checked it, and returns
the output and the log-sum-exp, None where nobody asked.
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .blocks import FrameBlocks
from .fast_path import kernel_module
from .flex_rules import followed_by, inside_frame_rule, one_of_rule, split_ragged, tail_rules, with_tail
from .quantised import dequantise_blocks
from .selection import BlockSelection

# Elements that the reference may gather at once.
REFERENCE_CHUNK = 1 << 24

# [B, Lq, H, D] in q's dtype; where it is asked for, the natural log of the sum of each query's exponentiated scores,
# [B, Lq, H] in float32 or wider, −inf where a query attends to nothing.
Result = tuple[Tensor, Tensor | None]


class Request(NamedTuple):
    """What decides whether a backend can run: q and k (shape, dtype and device only), (query, key) block, and needs."""

    q: Tensor
    k: Tensor
    block: tuple[int, int]
    needs_grad: bool = False
    tail: bool = False
    tokens_per_frame: int | None = None
    lse: bool = False

    @property
    def stored(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.k.dtype


@dataclass(frozen=True)
class Attention:
    """One call: q [B, Lq, H, D], k and v [B, Lk, H, D], the compact list, both block layouts, and what is optional.

    scales: those of 8-bit k and v, float32 [B, k_blocks, H] each. tail: the block means of k and v. uneven: query
    blocks may read different numbers of key blocks. lse: whether a log-sum-exp is asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    selection: BlockSelection
    q_layout: FrameBlocks
    k_layout: FrameBlocks
    scale: float
    scales: tuple[Tensor, Tensor] | None = None
    tail: tuple[Tensor, Tensor] | None = None
    uneven: bool = False
    lse: bool = False


# ------------------------------------------------------------------------------------------------------- Triton


def why_not_triton(request: Request) -> str | None:
    kernel = kernel_module("block_sparse")
    if isinstance(kernel, str):
        return kernel
    if request.needs_grad:
        return "the Triton kernel has no backward pass; run under torch.no_grad()"
    return kernel.why_not(request.q, request.block, request.stored)


def run_triton(a: Attention) -> Result:
    kernel = kernel_module("block_sparse")
    assert isinstance(kernel, ModuleType)
    result = kernel.block_sparse_attention(
        a.q,
        a.k,
        a.v,
        *a.selection,
        tokens_per_frame=a.q_layout.tokens_per_frame,
        block_q=a.q_layout.block,
        block_k=a.k_layout.block,
        scale=a.scale,
        scales=a.scales,
        tail=a.tail,
        uneven=a.uneven,
        return_lse=a.lse,
    )
    return result if a.lse else (result, None)


def dense_triton(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], k_layout: FrameBlocks) -> Tensor:
    """The same kernel over all key blocks of an 8-bit cache."""
    kernel = kernel_module("block_sparse")
    assert isinstance(kernel, ModuleType)
    frame, block = k_layout.tokens_per_frame, k_layout.block
    return kernel.dense_attention(q, k, v, tokens_per_frame=frame, block_q=128, block_k=block, scales=scales)


# --------------------------------------------------------------------------------------------------------- flex


@functools.cache
def cpp_compiler() -> str | None:
    """A C++ compiler that torch.compile can call, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if (found := shutil.which(name or ""))), None
    )


def why_not_flex(request: Request) -> str | None:
    q = request.q
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"flex_attention takes bfloat16, float16 or float32, not {q.dtype}"
    if request.needs_grad:
        return "flex is set up for inference; run under torch.no_grad()"
    if q.device.type == "cpu":
        if request.lse:
            return "flex_attention gives no log-sum-exp on CPU"
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return "flex_attention on CPU needs an x86 CPU with AVX2"
        if cpp_compiler() is None:
            return "flex_attention on CPU needs a C++ compiler; install g++ or clang++, or set CXX"
        return None
    if q.device.type not in ("cuda", "xpu"):
        return f"flex_attention is not used on {q.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "flex_attention on a GPU is compiled by triton, which is not installed"
    if request.lse and not hasattr(importlib.import_module("torch.nn.attention.flex_attention"), "AuxRequest"):
        return f"flex_attention gives a log-sum-exp from PyTorch 2.9 on, and this is {torch.__version__}"
    if q.shape[-1] < 16:
        return f"flex_attention on a GPU needs a head dim of 16 or more, not {q.shape[-1]}"
    return None


def run_flex(a: Attention) -> Result:
    """Frames are padded to whole blocks; only a frame's ragged last key block is masked token by token.

    A pooled tail becomes more keys behind the others, whose scores get log(count) and of which each query block is
    shown those of the blocks that it does not read. 8-bit keys and values are dequantised and attended to head by
    head, so that no copy of the cache is ever made.
    """
    if a.scales is None:
        return _flex(a, slice(None))
    outs, lses = zip(*(_flex(a, slice(head, head + 1)) for head in range(a.q.shape[2])), strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if a.lse else None


def _flex(a: Attention, heads: slice) -> Result:
    from torch.nn.attention.flex_attention import BlockMask

    q = a.q[:, :, heads]
    if q.device.type == "cpu" and widens_on_cpu(q.dtype):
        q = q.float()
    if a.scales is None:
        k, v = a.k.to(q.dtype), a.v.to(q.dtype)
    else:
        k, v = dequantised(a.k, a.v, a.scales, a.k_layout, heads, q.dtype)
    q, k, v = a.q_layout.pad(q), a.k_layout.pad(k), a.k_layout.pad(v)
    k_blocks = k.shape[1] // a.k_layout.block
    selection = BlockSelection(a.selection.blocks[:, heads], a.selection.counts[:, heads])
    whole, masked = split_ragged(selection, a.k_layout, k_blocks)
    mask_mod = inside_frame_rule(a.k_layout.tokens_per_frame, a.k_layout.padded_tokens_per_frame)
    bias: tuple[Tensor, ...] = ()
    if a.tail is not None:
        means = [x[:, :, heads].to(q.dtype) for x in a.tail]
        k, v = (followed_by(x, more, a.k_layout.block) for x, more in zip((k, v), means, strict=True))
        whole, masked = with_tail(whole, masked, k_blocks, k.shape[1] // a.k_layout.block)
        visible, column, bias_of_key = tail_rules(selection, a.k_layout, k_blocks, k.shape[1])
        mask_mod, bias = one_of_rule(visible, column, a.q_layout.block), (bias_of_key,)
    block = (a.q_layout.block, a.k_layout.block)
    block_mask = BlockMask.from_kv_blocks(
        masked.counts,
        masked.blocks,
        whole.counts,
        whole.blocks,
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[1], k.shape[1]),
        compute_q_blocks=False,
    )
    tiles = None
    if q.device.type != "cpu":  # a GPU tile must divide a block
        tiles = {"BLOCK_M": min(64, block[0]), "BLOCK_N": min(64, block[1])}
    one_head = q.shape[2] == 1  # torch.compile makes code of its own for sizes of 1
    attend = _compiled_flex(
        q.device.type, q.dtype, q.shape[-1], *block, a.k_layout.ragged, one_head, bool(bias), lse=a.lse
    )
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask, a.scale, tiles, *bias)
    out = a.q_layout.unpad(out.transpose(1, 2)).to(a.q.dtype)
    return out, lse if lse is None else a.q_layout.unpad(lse.transpose(1, 2))


def widens_on_cpu(dtype: torch.dtype) -> bool:
    """Whether flex runs in float32 for narrower input: CPUs without AMX tiles multiply bfloat16 more slowly."""
    return dtype.itemsize < 4 and not torch.cpu._is_amx_tile_supported()


@functools.lru_cache(maxsize=64)
def _compiled_flex(*kind: object, lse: bool) -> Callable[..., Result]:
    """flex_attention compiled once for all lengths; `kind` and `lse` are what makes code of its own necessary.

    torch.compile counts recompilations per code object and past a small limit falls back to a dense, uncompiled
    flex. So each kind gets its own code object, and fullgraph turns that fallback into an error.
    """
    from torch.nn.attention import flex_attention as flex

    def attend(
        q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, tiles: Any, bias: Tensor | None = None
    ) -> Result:
        """bias: added to the scores of each key, float32 [keys]."""

        def biased(score: Tensor, batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[k_token]

        score_mod = None if bias is None else biased
        if not lse:
            return flex.flex_attention(q, k, v, score_mod, block_mask, scale, kernel_options=tiles), None
        asked = flex.AuxRequest(lse=True)
        out, beside = flex.flex_attention(q, k, v, score_mod, block_mask, scale, kernel_options=tiles, return_aux=asked)
        return out, beside.lse

    attend.__code__ = attend.__code__.replace(co_name=f"attend_{'_'.join(map(str, (*kind, lse)))}")
    return torch.compile(attend, dynamic=True, fullgraph=True)


# -------------------------------------------------------------------------------------------- FlashAttention-4


# What FlashAttention-4's block-sparse forward takes, by major compute capability: (query, key) tokens per block.
FLASH4_BLOCKS = {9: (128, 128), 10: (256, 128)}


def why_not_flash4(request: Request) -> str | None:
    q = request.q
    if request.needs_grad or request.tail or request.stored != q.dtype:
        what = "gradients" if request.needs_grad else "a pooled tail" if request.tail else f"{request.stored} keys"
        return f"flash4 is not set up for {what}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"flash4 takes head dims of 64 or 128, not {q.shape[-1]}"
    if q.device.type != "cuda":
        return f"FlashAttention-4 runs on NVIDIA GPUs, not on {q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major not in FLASH4_BLOCKS:
        return f"FlashAttention-4 has block sparsity on sm_90, sm_100 and sm_103, not on sm_{major}{minor}"
    if request.block != FLASH4_BLOCKS[major]:
        wanted = FLASH4_BLOCKS[major]
        return f"FlashAttention-4 takes (query, key) blocks of {wanted} on sm_{major}{minor}, not {request.block}"
    tokens = request.tokens_per_frame
    if tokens is not None and any(tokens % size for size in request.block):
        return f"flash4 has no ragged blocks, and {tokens} tokens per frame are no multiple of {request.block}"
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "FlashAttention-4 is not installed; install it with `pip install --pre flash-attn-4`"
    return None


def run_flash4(a: Attention) -> Result:
    """Every listed block is a full one: it needs no mask. Written against flash-attn-4 4.0.0b36."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    none = torch.zeros_like(a.selection.counts)
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=a.selection.counts,
        full_block_idx=a.selection.blocks.contiguous(),
        block_size=(a.q_layout.block, a.k_layout.block),
    )
    with torch.cuda.device(a.q.device):  # it launches on the current one
        out, lse = flash_attn_func(a.q, a.k, a.v, softmax_scale=a.scale, block_sparse_tensors=lists, return_lse=a.lse)
    return out, lse.transpose(1, 2) if a.lse else None


# ---------------------------------------------------------------------------------------------------- reference


def why_not_reference(request: Request) -> str | None:
    return None


def run_reference(a: Attention) -> Result:
    """Gather each query block's keys and values and attend to them densely, a few query blocks at a time."""
    q, q_layout, k_layout = a.q, a.q_layout, a.k_layout
    batch, _, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks, counts = a.selection
    width, q_blocks = blocks.shape[-1], counts.shape[-1]
    lengths = k_layout.block_lengths(a.k.shape[1] // k_layout.tokens_per_frame, q.device)
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(k_layout.block, device=q.device)
    listed = torch.arange(width, device=q.device) < counts[..., None]
    queries = q_layout.pad(q).unflatten(1, (q_blocks, q_layout.block))
    out = torch.zeros_like(queries)
    lse = queries.new_zeros(queries.shape[:-1], dtype=wide) if a.lse else None
    step = max(1, REFERENCE_CHUNK // (width * k_layout.block * (2 * dim + 2 * q_layout.block)))

    def gather(side: int, b: int, h: int, ids: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        x = (a.k, a.v)[side][b, :, h][tokens].to(wide)
        if a.scales is not None:
            x = x * a.scales[side][b, :, h].to(wide)[ids].repeat_interleave(k_layout.block, dim=1)[..., None]
        return x.masked_fill(~real[..., None], 0)

    for b in range(batch):
        for h in range(heads):
            for first in range(0, q_blocks, step):
                part = slice(first, first + step)
                ids = blocks[b, h, part].long()
                real = ((within < lengths[ids, None]) & listed[b, h, part, :, None]).flatten(1)
                tokens = (starts[ids, None] + within).flatten(1).masked_fill(~real, 0)
                keys, values = (gather(side, b, h, ids, tokens, real) for side in (0, 1))
                part_q = queries[b, part, :, h].to(wide) * a.scale
                scores = (part_q @ keys.mT).masked_fill(~real[:, None], -torch.inf)
                if a.tail is not None:
                    row = BlockSelection(blocks[b, h, part], counts[b, h, part])
                    k_means, v_means = (x[b, :, h].to(wide) for x in a.tail)
                    tail_scores = part_q @ k_means.mT + lengths.to(wide).log()
                    tail_scores = tail_scores.masked_fill(row.to_mask(len(lengths))[:, None], -torch.inf)
                    scores = torch.cat([scores, tail_scores], -1)
                if lse is not None:
                    lse[b, part, :, h] = scores.logsumexp(-1)
                weights = scores.softmax(-1)
                if a.tail is None:
                    # A softmax over nothing is NaN; an empty list gives zeros instead.
                    weights = weights.masked_fill((counts[b, h, part] == 0)[:, None, None], 0)
                    mixed = weights @ values
                else:
                    mixed = weights[..., : values.shape[1]] @ values + weights[..., values.shape[1] :] @ v_means
                out[b, part, :, h] = mixed.to(q.dtype)
    return q_layout.unpad(out.flatten(1, 2)), lse if lse is None else q_layout.unpad(lse.flatten(1, 2))


def dense_by_head(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], k_layout: FrameBlocks) -> Tensor:
    """Dense attention over an 8-bit cache, of which one head at a time is dequantised."""
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        out[:, :, head : head + 1] = _attended(q, k, v, scales, k_layout, slice(head, head + 1))
    return out


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, heads: slice
) -> Tensor:
    """Dense attention of some heads, whose dequantised keys and values are gone when it returns."""
    pair = dequantised(k, v, scales, layout, heads, q.dtype)
    queries, keys, values = (x.transpose(1, 2) for x in (q[:, :, heads], *pair))
    return scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def dequantised(
    k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, heads: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Some heads of 8-bit keys and values as plain numbers."""
    k_scales, v_scales = (x[:, :, heads] for x in scales)
    keys = dequantise_blocks(k[:, :, heads], k_scales, layout, dtype)
    return keys, dequantise_blocks(v[:, :, heads], v_scales, layout, dtype)


WHY_NOT: dict[str, Callable[[Request], str | None]] = {
    "triton": why_not_triton,
    "flex": why_not_flex,
    "flash4": why_not_flash4,
    "reference": why_not_reference,
}
RUN: dict[str, Callable[[Attention], Result]] = {
    "triton": run_triton,
    "flex": run_flex,
    "flash4": run_flash4,
    "reference": run_reference,
}
