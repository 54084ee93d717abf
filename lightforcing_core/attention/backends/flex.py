"""Block-sparse attention by `torch.nn.attention.flex_attention`, compiled.

flex takes lists of full and of masked blocks, and a rule for keys of masked ones. Frames are padded to whole blocks, so
only a frame's ragged last key block is masked. A pooled tail is appended as more keys, one per block.
"""

import functools
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..blocks import FrameBlocks
from ..selection import BlockSelection
from .base import EIGHT_BIT, Backend, Call
from .dense import dequantised

# Query-key pairs, B · H · Lq · Lk, from which on a CPU a compiled flex pays for its compilation. Measured on two
# busy cores at 12 % density: compiling takes 4 to 20 s once; at this size the reference took 0.6 s per call, flex
# 0.2 s, so compiling pays after ten to fifty calls, less than one clip.
FLEX_MIN_SCORES = 1 << 24

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Flex(Backend):
    """flex_attention on any GPU with Triton, and on x86 CPUs with a C++ compiler."""

    name = "flex"

    def why_not(self, call: Call) -> str | None:
        q = call.q
        if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"flex_attention takes bfloat16, float16 or float32, not {q.dtype}"
        if call.needs_grad:
            return "flex is set up for inference; run under torch.no_grad()"
        if q.device.type == "cpu":
            if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
                return "flex_attention on CPU needs an x86 CPU with AVX2"
            return None if cpp_compiler() else "flex_attention on CPU needs a C++ compiler: g++, clang++ or CXX"
        if q.device.type not in ("cuda", "xpu"):
            return f"flex_attention is not used on {q.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "flex_attention on a GPU is compiled by triton, which is not installed"
        if q.shape[-1] < 16:
            return f"flex_attention on a GPU needs a head dim of 16 or more, not {q.shape[-1]}"
        return None

    def why_not_auto(self, call: Call) -> str | None:
        scores = call.q.shape[0] * call.q.shape[2] * call.q.shape[1] * call.k.shape[1]
        if call.q.device.type != "cpu" or scores >= FLEX_MIN_SCORES:
            return None
        return f"{scores:,} query-key pairs on CPU are fewer than {FLEX_MIN_SCORES:,}, too few to wait for a compiler"

    def workspace(self, call: Call) -> int:
        """The lists, and padded or widened copies of keys, values and queries."""
        q, tail = call.q, call.tail is not None
        batch, _, heads, dim = q.shape
        # 8-bit keys and values are widened one head at a time; the heads' outputs are joined at the end.
        by_head = call.k.dtype in EIGHT_BIT
        numbers = batch * (1 if by_head else heads) * dim
        # On a CPU keys and values of narrow dtypes are copied once, widened to float32 or packed inside flex.
        widened = widens_on_cpu(q.dtype) or (by_head and heads > 1)
        copies = 2 + 2 * call.k_layout.ragged + 2 * tail  # appending a tail's means takes one more copy
        keys = copies * numbers * call.k_blocks * call.k_layout.block
        queries = 2 * numbers * call.q_blocks * call.q_layout.block if widened or call.q_layout.ragged else 0
        lists = 4 * (6 if tail else 3) * batch * heads * call.q_blocks * call.k_blocks
        apart = q.nbytes if by_head and heads > 1 else 0
        return apart + lists + (keys + queries) * (4 if widened else q.dtype.itemsize)

    def run(self, call: Call) -> Tensor:
        if call.scales is None:
            return _attend(call)
        return torch.cat([_attend(call.heads(slice(head, head + 1))) for head in range(call.q.shape[2])], dim=2)


@functools.cache
def cpp_compiler() -> str | None:
    """A C++ compiler that torch.compile can call, or None."""
    names = os.environ.get("CXX", ""), "g++", "clang++", "cl"
    return next(filter(None, map(shutil.which, names)), None)


def widens_on_cpu(dtype: torch.dtype) -> bool:
    """Whether flex on a CPU computes narrower input in float32: CPUs without AMX multiply bfloat16 more slowly."""
    return dtype.itemsize < 4 and not torch.cpu._is_amx_tile_supported()


def _attend(call: Call) -> Tensor:
    """flex over all heads of `call` at once; 8-bit keys and values are dequantised."""
    from torch.nn.attention.flex_attention import BlockMask

    q, q_layout, k_layout, selection = call.q, call.q_layout, call.k_layout, call.blocks_read
    if q.device.type == "cpu" and widens_on_cpu(q.dtype):
        q = q.float()
    if call.scales is None:
        k, v = call.k.to(q.dtype), call.v.to(q.dtype)
    else:
        k, v = dequantised(call.k, call.v, call.scales, k_layout, slice(None), q.dtype)
    q, k, v = q_layout.pad(q), k_layout.pad(k), k_layout.pad(v)
    k_blocks = k.shape[1] // k_layout.block
    whole, masked = split_ragged(selection, k_layout, k_blocks)
    mask_mod = inside_frame_rule(k_layout.tokens_per_frame, k_layout.padded_tokens_per_frame)
    bias: tuple[Tensor, ...] = ()
    if call.tail is not None:
        means = [x.to(q.dtype) for x in call.tail]
        k, v = (followed_by(x, more, k_layout.block) for x, more in zip((k, v), means, strict=True))
        whole, masked = with_tail(whole, masked, k_blocks, k.shape[1] // k_layout.block)
        mask_mod, bias_of_key = tail_rules(selection, k_layout, k_blocks, k.shape[1], q_layout.block)
        bias = (bias_of_key,)
    block_mask = BlockMask.from_kv_blocks(
        masked.counts,
        masked.blocks,
        whole.counts,
        whole.blocks,
        BLOCK_SIZE=call.block,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[1], k.shape[1]),
        **_mask_options(),
    )
    tiles = None
    if q.device.type != "cpu":  # a GPU tile must divide a block
        tiles = {"BLOCK_M": min(64, call.block[0]), "BLOCK_N": min(64, call.block[1])}
    one_head = q.shape[2] == 1  # torch.compile specialises on sizes of 1
    kind = (q.device.type, q.dtype, q.shape[-1], *call.block, k_layout.ragged, one_head, bool(bias))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _compiled(*kind)(q, k, v, block_mask, call.score_scale, tiles, *bias)
    return q_layout.unpad(out.transpose(1, 2)).to(call.q.dtype)


@functools.cache
def _mask_options() -> dict[str, Any]:
    """Leave out lists for the backward pass if PyTorch allows it (from 2.9 on)."""
    from torch.nn.attention.flex_attention import BlockMask

    parameters = inspect.signature(BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": False} if "compute_q_blocks" in parameters else {}


@functools.lru_cache(maxsize=64)
def _compiled(*kind: object) -> Callable[..., Tensor]:
    """flex_attention compiled once for all lengths of a `kind`.

    torch.compile counts recompilations per code object and past a small limit falls back to a dense, uncompiled
    flex. So each kind gets its own code object, and fullgraph turns that fallback into an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, tiles: Any, bias: Tensor | None = None
    ) -> Any:
        """bias: added to the scores of each key, float32 [keys]."""

        def biased(score: Tensor, batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[k_token]

        score_mod = None if bias is None else biased
        return flex_attention(q, k, v, score_mod, block_mask, scale, kernel_options=tiles)

    attend.__code__ = attend.__code__.replace(co_name=f"attend_{'_'.join(map(str, kind))}")
    return torch.compile(attend, dynamic=True, fullgraph=True)


# ---------------------------------------------------------------------------------------------- lists and rules


def split_ragged(
    selection: BlockSelection, layout: FrameBlocks, k_blocks: int
) -> tuple[BlockSelection, BlockSelection]:
    """The listed blocks that are full, and a frame's ragged last ones, k_blocks wide."""
    blocks, counts = selection
    if not layout.ragged:
        # flex on CPU requires contiguous lists as wide as there are key blocks, although it reads only the first
        # `counts` entries of each.
        wide = torch.nn.functional.pad(blocks, (0, k_blocks - blocks.shape[-1])).contiguous()
        counts = counts.contiguous()
        return BlockSelection(wide, counts), BlockSelection(torch.zeros_like(wide), torch.zeros_like(counts))
    mask = selection.to_mask(k_blocks)
    is_ragged = torch.arange(k_blocks, device=blocks.device) % layout.per_frame == layout.per_frame - 1
    return BlockSelection.from_mask(mask & ~is_ragged), BlockSelection.from_mask(mask & is_ragged)


@functools.lru_cache(maxsize=64)
def inside_frame_rule(tokens_per_frame: int, padded: int) -> MaskMod:
    """A flex mask_mod that is true for real key tokens; cached because torch.compile guards on its identity."""

    def inside_frame(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return k_token % padded < tokens_per_frame

    return inside_frame


def followed_by(x: Tensor, means: Tensor, block: int) -> Tensor:
    """x [B, L, H, D], then means [B, n, H, D], then zeros up to whole blocks."""
    padding = -means.shape[1] % block
    return torch.cat([x, means, means.new_zeros(means.shape[0], padding, *means.shape[2:])], dim=1)


def with_tail(
    whole: BlockSelection, masked: BlockSelection, k_blocks: int, all_blocks: int
) -> tuple[BlockSelection, BlockSelection]:
    """Both lists as wide as the blocks with the tail, whose blocks are all masked."""
    tail = torch.arange(k_blocks, all_blocks, dtype=torch.int32, device=whole.blocks.device)
    blocks = torch.cat([tail.expand(*masked.counts.shape, -1), masked.blocks], dim=-1)
    wide = torch.nn.functional.pad(whole.blocks, (0, len(tail)))
    return BlockSelection(wide, whole.counts), BlockSelection(blocks, masked.counts + len(tail))


def tail_rules(
    selection: BlockSelection, layout: FrameBlocks, k_blocks: int, keys: int, block_q: int
) -> tuple[MaskMod, Tensor]:
    """A flex mask_mod for keys of masked blocks, and the bias of each key's scores.

    A key is of kind 0, a real token, of kind 1 + b, the mean of block b, or of the last kind, padding. The bias is
    float32 [keys], log(count) of means.
    """
    device, real = selection.blocks.device, k_blocks * layout.block
    kind = torch.full((keys,), k_blocks + 1, dtype=torch.int64, device=device)
    kind[:real].unflatten(0, (-1, layout.padded_tokens_per_frame))[:, : layout.tokens_per_frame] = 0
    kind[real : real + k_blocks] = torch.arange(1, k_blocks + 1, device=device)
    bias = torch.zeros(keys, dtype=torch.float32, device=device)
    bias[real : real + k_blocks] = layout.block_lengths(k_blocks // layout.per_frame, device).log()
    skipped = ~selection.to_mask(k_blocks)
    visible = torch.cat([torch.ones_like(skipped[..., :1]), skipped, torch.zeros_like(skipped[..., :1])], dim=-1)

    # torch.compile takes the tensors that this reads as inputs, so no call recompiles.
    def sees(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return visible[batch, head, q_token // block_q, kind[k_token]]

    return sees, bias
