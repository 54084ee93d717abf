"""Block-sparse attention in Triton: each query block reads only the key blocks in its list.

One program owns up to 128 rows of one query block of one head and walks the block's list with an online softmax, as
FlashAttention does (arXiv 2205.14135, 2307.08691). Blocks are aligned to frames: block `b` of a side with `n` blocks
per frame starts at token `(b // n) · tokens_per_frame + (b % n) · block`, and a frame's last block may be ragged.

Variants of the same kernel: without a list every block is read (dense); keys and values may be int8 or fp8 with one
scale per block and head, converted tile by tile in registers; with a pooled tail every block that is not in the list
enters the softmax as its mean. Programs of one head are neighbours in the grid and share its blocks in L2.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .tuning import Kind, Launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_FP8 = (8, 9)  # older chips have no instruction that widens float8_e4m3fn
LOG2_E = 1.4426950408889634


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    """a · b + total, b in whatever it is stored in."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.to(a.dtype), total, input_precision="tf32x3")  # float32 keeps its precision on tensor cores


@triton.jit
def _load(base, offsets, dim_is_real, PADDED: tl.constexpr):
    """A tile whose rows all exist; its padded dims, if there are any, read as zeros."""
    if PADDED:
        return tl.load(base + offsets, mask=dim_is_real, other=0.0)
    return tl.load(base + offsets)


@triton.jit
def _attend(v, scores, v_scale, row_max, row_sum, total, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """One step of the online softmax in base 2: fade what is there, add this tile. Not every score may be −inf."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    fade = tl.exp2(row_max - new_max)
    row_sum = row_sum * fade + tl.sum(weights, 1)
    if v_scale is not None:
        weights = weights * v_scale
    total = _dot(weights.to(DTYPE), v, total * fade[:, None], UPCAST)
    return new_max, row_sum, total


# fmt: off
# Lengths, list widths and where a view starts change from chunk to chunk; unspecialised, they cost no compilation.
@triton.jit(do_not_specialize=[
    "q_blocks", "k_blocks", "width", "q_frame", "k_frame",
    "blocks_ptr", "counts_ptr", "k_scales_ptr", "v_scales_ptr", "bias_ptr",
])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, counts_ptr,
    k_scales_ptr, v_scales_ptr, k_means_ptr, v_means_ptr, bias_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    heads, q_blocks, k_blocks, width, q_frame, k_frame, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    q_block = tl.program_id(0) // (BLOCK_Q // TILE_Q)
    head_row = tl.program_id(1)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)

    q_per_frame = tl.cdiv(q_frame, BLOCK_Q)
    k_per_frame = tl.cdiv(k_frame, BLOCK_K)
    q_within = (q_block % q_per_frame) * BLOCK_Q + (tl.program_id(0) % (BLOCK_Q // TILE_Q)) * TILE_Q
    q_first = (q_block // q_per_frame).to(tl.int64) * q_frame + q_within

    if RAGGED_Q and TILE_Q != BLOCK_Q and q_within >= q_frame:
        return  # a tile of nothing but padding

    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    rows = tl.arange(0, TILE_Q)
    columns = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    dim_is_real = dims < HEAD_DIM
    row_is_real = q_within + rows < q_frame

    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + q_first * q_stride_l
    q_tile = q_base + rows[:, None] * q_stride_l + dims[None, :]
    if RAGGED_Q or PADDED:
        q = tl.load(q_tile, mask=row_is_real[:, None] & dim_is_real[None, :], other=0.0)
    else:
        q = tl.load(q_tile)

    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    k_offsets = columns[None, :] * k_stride_l + dims[:, None]
    v_offsets = columns[:, None] * v_stride_l + dims[None, :]

    list_row = head_row.to(tl.int64) * q_blocks + q_block
    if blocks_ptr is None:
        count = k_blocks
    else:
        list_ptr = blocks_ptr + list_row * width
        count = tl.load(counts_ptr + list_row)
        next_block = tl.load(list_ptr)
    if k_scales_ptr is not None:
        k_scale_ptr = k_scales_ptr + batch * k_blocks * heads + head
        v_scale_ptr = v_scales_ptr + batch * k_blocks * heads + head
    # Weights times values: 8-bit values fit bfloat16 exactly, and its range holds any weight times a block's scale.
    WEIGHTS: tl.constexpr = q.dtype if k_scales_ptr is None or q.dtype == tl.float32 else tl.bfloat16

    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    total = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    for i in range(count * SPLIT):
        if blocks_ptr is None:
            k_block = i // SPLIT
        else:  # the next entry is on its way while this block is worked on
            k_block = next_block
            next_block = tl.load(list_ptr + tl.minimum((i + 1) // SPLIT, width - 1))
        k_within = (k_block % k_per_frame) * BLOCK_K + (i % SPLIT) * TILE_K
        k_first = (k_block // k_per_frame).to(tl.int64) * k_frame + k_within
        if RAGGED_K:
            # Columns past the frame's end read its last token instead, which costs fewer registers than a mask.
            tokens = tl.minimum(columns, k_frame - 1 - k_within)
            k_offsets = tokens[None, :] * k_stride_l + dims[:, None]
            v_offsets = tokens[:, None] * v_stride_l + dims[None, :]
        k = _load(k_base + k_first * k_stride_l, k_offsets, dim_is_real[:, None], PADDED)
        v = _load(v_base + k_first * v_stride_l, v_offsets, dim_is_real[None, :], PADDED)
        v_scale = None
        scores = _dot(q, k, None, UPCAST)
        if k_scales_ptr is None:
            scores *= scale_log2
        else:
            scores *= scale_log2 * tl.load(k_scale_ptr + k_block * heads)
            v_scale = tl.load(v_scale_ptr + k_block * heads)
        if RAGGED_K:
            scores = tl.where((k_within + columns < k_frame)[None, :], scores, float("-inf"))
        # Every block's first tile holds a real key, so the running maximum is finite from there on.
        row_max, row_sum, total = _attend(v, scores, v_scale, row_max, row_sum, total, WEIGHTS, UPCAST)

    if bias_ptr is not None:
        # After the list: where it was not empty the maximum is finite, where it was every mean takes part.
        mean_stride = heads * HEAD_DIM
        mean_base = (batch * k_blocks * heads + head) * HEAD_DIM
        for first in tl.range(0, k_blocks, TILE_K, num_stages=2):
            ids = tl.minimum(first + columns, k_blocks - 1)
            k = _load(k_means_ptr + mean_base, ids[None, :] * mean_stride + dims[:, None], dim_is_real[:, None], PADDED)
            v = _load(v_means_ptr + mean_base, ids[:, None] * mean_stride + dims[None, :], dim_is_real[None, :], PADDED)
            bias = tl.load(bias_ptr + list_row * k_blocks + ids)
            bias = tl.where(first + columns < k_blocks, bias, float("-inf"))
            scores = _dot(q, k, None, UPCAST) * scale_log2 + bias[None, :]
            row_max, row_sum, total = _attend(v, scores, None, row_max, row_sum, total, v.dtype, UPCAST)

    # A query block that attends to nothing returns zeros.
    out = total / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_first = batch * (q_blocks // q_per_frame) * q_frame + q_first
    out_tile = out_ptr + (out_first * heads + head) * HEAD_DIM + rows[:, None] * (heads * HEAD_DIM) + dims[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    if RAGGED_Q or PADDED:
        tl.store(out_tile, out, mask=row_is_real[:, None] & dim_is_real[None, :])
    else:
        tl.store(out_tile, out)


@triton.jit(do_not_specialize=["k_blocks", "width", "blocks_ptr", "counts_ptr"])
def _tail_bias(
    bias_ptr, blocks_ptr, counts_ptr, k_blocks, width, tokens_per_frame, BLOCK_K: tl.constexpr, TILE: tl.constexpr
):
    """One row of the tail's bias: log2 of each block's real tokens, −inf for the blocks in the list."""
    row = tl.program_id(0).to(tl.int64)
    bias_row = bias_ptr + row * k_blocks
    per_frame = tl.cdiv(tokens_per_frame, BLOCK_K)
    for first in range(0, k_blocks, TILE):
        ids = first + tl.arange(0, TILE)
        tokens = tl.minimum(tokens_per_frame - (ids % per_frame) * BLOCK_K, BLOCK_K)
        tl.store(bias_row + ids, tl.log2(tokens.to(tl.float32)), mask=ids < k_blocks)
    tl.debug_barrier()  # what follows overwrites what other threads of this program stored
    count = tl.load(counts_ptr + row)
    for first in range(0, count, TILE):
        entries = first + tl.arange(0, TILE)
        ids = tl.load(blocks_ptr + row * width + entries, mask=entries < count, other=0)
        tl.store(bias_row + ids, tl.full([TILE], float("-inf"), tl.float32), mask=entries < count)


# Whether TRITON_INTERPRET was set when this module was imported: then the kernel runs on any device, slowly.
INTERPRETED = not isinstance(_forward, triton.JITFunction)

_launches: dict[tuple[Kind, torch.device], Launch] = {}  # what has been chosen on this process's devices


def why_not(q: Tensor, block: tuple[int, int], stored: torch.dtype | None = None) -> str | None:
    """Why this kernel cannot run on q [B, L, H, D] with (query, key) blocks of `block` tokens, or None.

    `stored` is the dtype of keys and values where it is not q's.
    """
    if q.dtype not in DTYPES:
        return f"the Triton kernel takes bfloat16, float16 or float32, not {q.dtype}"
    if stored not in (None, q.dtype, *EIGHT_BIT):
        return f"the Triton kernel reads keys and values in q's dtype, int8 or float8_e4m3fn, not {stored}"
    if not set(block) <= set(BLOCK_SIZES):
        return f"the Triton kernel takes blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the Triton kernel takes head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]}"
    if INTERPRETED:
        return None
    if q.device.type != "cuda" or torch.version.hip:
        return f"the Triton kernel runs on NVIDIA GPUs (or anywhere with TRITON_INTERPRET=1), not on {q.device.type}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < MIN_CAPABILITY:
        return f"the Triton kernel needs an sm_80 GPU or newer, this one is sm_{capability[0]}{capability[1]}"
    if stored == torch.float8_e4m3fn and capability < MIN_CAPABILITY_FP8:
        return f"Triton has no float8_e4m3fn on sm_{capability[0]}{capability[1]}; keep the cache in int8 there"
    return None


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    *,
    tokens_per_frame: int,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    tail: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of every query block over its listed key blocks only.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D], whole frames, any strides as long as D is contiguous. blocks: int32
    [B, H, q_blocks, width], of which the first `counts` (int32 [B, H, q_blocks]) entries of each row are read.
    `scale` multiplies the scores, 1/√D when None. scales: for int8 or float8_e4m3fn k and v their scales, float32
    [B, k_blocks, H] each. tail: the block means of k and v, [B, k_blocks, H, D] in q's dtype: each block that is not
    listed takes part once, as its mean with log(its real tokens) added to the score. Returns a contiguous
    [B, Lq, H, D] in q's dtype; a query block with an empty list and no tail gives zeros. Nothing waits on the device,
    except where launch parameters are timed on first use, see `tuning`.

    Raises ValueError when `why_not` gives a reason or a shape, dtype or stride is off.
    """
    if reason := why_not(q, (block_q, block_k), k.dtype):
        raise ValueError(reason)
    batch, q_tokens, heads, _ = q.shape
    q_blocks = q_tokens // tokens_per_frame * triton.cdiv(tokens_per_frame, block_q)
    if counts.shape != (batch, heads, q_blocks) or blocks.shape[:3] != counts.shape:
        raise ValueError(
            f"blocks {tuple(blocks.shape)} and counts {tuple(counts.shape)} do not describe "
            f"{(batch, heads, q_blocks)} = (batch, heads, query blocks)"
        )
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"blocks and counts must be int32, not {blocks.dtype} and {counts.dtype}")
    lists = blocks.contiguous(), counts.contiguous()
    return _run(q, k, v, lists, (tokens_per_frame, block_q, block_k), scale, scales, tail)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens_per_frame: int,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of every query over all keys with the same kernel; arguments as in `block_sparse_attention`."""
    if reason := why_not(q, (block_q, block_k), k.dtype):
        raise ValueError(reason)
    return _run(q, k, v, None, (tokens_per_frame, block_q, block_k), scale, scales, None)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, Tensor] | None,
    sizes: tuple[int, int, int],
    scale: float | None,
    scales: tuple[Tensor, Tensor] | None,
    tail: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Launch on q's device; `sizes` is (tokens per frame, block_q, block_k)."""
    tokens_per_frame, block_q, block_k = sizes
    k_blocks = k.shape[1] // tokens_per_frame * triton.cdiv(tokens_per_frame, block_k)
    _check_beside(q, k, v, k_blocks, scales, tail)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    ragged = tokens_per_frame % block_q != 0, tokens_per_frame % block_k != 0
    kind = Kind(block_q, block_k, q.shape[-1], q.dtype, k.dtype, ragged, tail is not None, lists is None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Triton launches on the current device, which need not be q's; the interpreter also takes CPU tensors.
    with torch.cuda.device(q.device if q.is_cuda else -1):
        scales = scales and (scales[0].contiguous(), scales[1].contiguous())
        tail_and_bias = None
        if tail is not None and lists is not None:
            bias = torch.empty(*lists[1].shape, k_blocks, dtype=torch.float32, device=q.device)
            sizes = k_blocks, lists[0].shape[-1], tokens_per_frame
            _tail_bias[(lists[1].numel(),)](bias, *lists, *sizes, BLOCK_K=block_k, TILE=128)
            tail_and_bias = tail[0].contiguous(), tail[1].contiguous(), bias

        def run(launch: Launch) -> None:
            shape = kind, launch, tokens_per_frame
            grid, given, constants = launch_arguments(*shape, (q, k, v, out), lists, scales, tail_and_bias, scale)
            _forward[grid](*given, **constants)

        run(_launch_for(kind, q, run))
    return out


def launch_arguments(
    kind: Kind,
    launch: Launch,
    tokens_per_frame: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor] | None,
    tail: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
) -> tuple[tuple[int, int], list[Any], dict[str, Any]]:
    """Grid, arguments and constants of one launch of the kernel; tensors are q, k, v and out, tail ends in its bias."""
    q, k, v, _ = tensors
    batch, q_tokens, heads, head_dim = q.shape
    # Without lists frames only matter where scales follow them: queries, and keys where they can, are one long frame.
    q_frame = q_tokens if kind.dense else tokens_per_frame
    k_frame = k.shape[1] if kind.dense and scales is None else tokens_per_frame
    q_blocks = q_tokens // q_frame * triton.cdiv(q_frame, kind.block_q)
    k_blocks = k.shape[1] // k_frame * triton.cdiv(k_frame, kind.block_k)
    arguments = [*tensors, *(lists or (None, None)), *(scales or (None, None)), *(tail or (None, None, None))]
    arguments += [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, q_blocks, k_blocks]
    arguments += [lists[0].shape[-1] if lists else 0, q_frame, k_frame, scale * LOG2_E]
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": tuning.padded(head_dim),
        "BLOCK_Q": kind.block_q,
        "BLOCK_K": kind.block_k,
        "TILE_Q": launch.tile_q,
        "TILE_K": launch.tile_k,
        "RAGGED_Q": kind.ragged[0],
        "RAGGED_K": kind.ragged[1],
        # The interpreter's tl.dot multiplies the raw bits of bfloat16.
        "UPCAST": INTERPRETED and (q.dtype == torch.bfloat16 or scales is not None),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    return (q_blocks * (kind.block_q // launch.tile_q), batch * heads), arguments, constants


def _launch_for(kind: Kind, q: Tensor, run: Callable[[Launch], None]) -> Launch:
    """Launch parameters: timed where there is a GPU to time and work to time it on, the defaults elsewhere."""
    default = tuning.default_launch(kind)
    if INTERPRETED or not q.is_cuda:
        return default
    if found := _launches.get((kind, q.device)):
        return found
    gpu = torch.cuda.get_device_properties(q.device)
    programs = q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], default.tile_q)
    key = f"{gpu.name} | triton {triton.__version__} | {_forward.cache_key[:16]} | {kind}"
    if programs < gpu.multi_processor_count or torch.cuda.is_current_stream_capturing():
        return tuning.known(key) or default

    def time(launch: Launch) -> float:
        return triton.testing.do_bench(lambda: run(launch), warmup=10, rep=40, return_mode="median")

    shared = triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"]
    _launches[kind, q.device] = tuning.fastest(key, tuning.candidates(kind, shared), time)
    return _launches[kind, q.device]


def _check_beside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_blocks: int,
    scales: tuple[Tensor, Tensor] | None,
    tail: tuple[Tensor, Tensor] | None,
) -> None:
    """ValueError unless scales and tail are there when they must be and have the shape that k's blocks ask for."""
    if (scales is not None) != (k.dtype in EIGHT_BIT) or v.dtype != k.dtype:
        raise ValueError(f"k is {k.dtype}, v is {v.dtype} and scales are {'given' if scales else 'missing'}")
    for name, pair, shape, dtype in (
        ("scales", scales, (k.shape[0], k_blocks, k.shape[2]), torch.float32),
        ("tail", tail, (k.shape[0], k_blocks, *k.shape[2:]), q.dtype),
    ):
        for x in pair or ():
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {tuple(shape)}, not {x.dtype} {tuple(x.shape)}")
