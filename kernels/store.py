"""From projections to attention in one launch: norm, RoPE, ring, pooling, 8-bit.

One program owns one block of tokens of one part (q, k or v) and a group of its heads. The RMS of a token spans all
heads, so a q or k program first sums squares over whole rows and then walks its heads, one [tokens, head dim] tile
at a time: rows come from memory once and from L2 after, a tile stays in registers, nothing depends on the model's
width. Heads are split over just as many programs as fill the chip twice, because each split sums the squares again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .bound import cdiv, launch
from .layer_memory import LayerMemory
from .rounding import cast

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 128)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
# Parts of a key block that have means of their own, for selection that looks inside blocks.
SUB_BLOCKS = 4
PARTS = tl.constexpr(SUB_BLOCKS)  # for device code
PROGRAMS = 2  # per multiprocessor that a launch should have


@triton.jit
def _inverse_rms(tile, heads, row_is_real, eps, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """1 / √(mean(x²) + eps) of every row over all heads: float32 [BLOCK]."""
    squares = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for head in tl.range(heads, num_stages=STAGES):
        x = tl.load(tile + head * HEAD_DIM, mask=row_is_real[:, None], other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / (heads * HEAD_DIM) + eps)


@triton.jit
def _rotate(x, cos, sin, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Turn channels (2i, 2i + 1) of x by the angles of cos and sin [BLOCK, D/2]."""
    first, second = tl.split(tl.reshape(x, [BLOCK, HEAD_DIM // 2, 2]))
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(turned, [BLOCK, HEAD_DIM])


@triton.jit
def _write_part(
    program,
    x_ptr,
    x_row,
    out_ptr,
    heads,
    heads_per_program,
    frames,
    out_frames,
    out_rows,
    tokens_per_frame,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    weight_ptr=None,
    cos_ptr=None,
    sin_ptr=None,
    eps=None,
    slots_ptr=None,
    scales_ptr=None,
    means_ptr=None,
    frame_means_ptr=None,
    arrivals_ptr=None,
    sub_means_ptr=None,
    mean_ptr=None,
):
    """One program's share of q, k or v."""
    groups = tl.cdiv(heads, heads_per_program)
    per_frame = tl.cdiv(tokens_per_frame, BLOCK)
    group = program % groups  # neighbours share their rows
    block = program // groups % per_frame
    frame = program // groups // per_frame % frames
    batch = (program // groups // per_frame // frames).to(tl.int64)
    within = block * BLOCK
    x_frame = batch * frames + frame
    out_frame = batch * out_frames + (frame if slots_ptr is None else tl.load(slots_ptr + frame))
    out_block = out_frame * per_frame + block
    length = tl.minimum(BLOCK, tokens_per_frame - within)

    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    row_is_real = rows < length
    tile = x_ptr + (x_frame * tokens_per_frame + within) * x_row + rows[:, None] * x_row + dims[None, :]
    out_tile = out_ptr + (out_frame * out_rows + within + rows[:, None]) * heads * HEAD_DIM + dims[None, :]

    if weight_ptr is not None:
        inverse_rms = _inverse_rms(tile, heads, row_is_real, eps, HEAD_DIM, BLOCK, STAGES)
        tokens = frame * tokens_per_frame + within + rows
        pairs = tokens[:, None] * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None, :]
        cos = tl.load(cos_ptr + pairs, mask=row_is_real[:, None], other=0.0)
        sin = tl.load(sin_ptr + pairs, mask=row_is_real[:, None], other=0.0)

    first_head = group * heads_per_program
    last_head = tl.minimum(first_head + heads_per_program, heads)
    compute: tl.constexpr = x_ptr.dtype.element_ty
    largest: tl.constexpr = 127.0 if out_ptr.dtype.element_ty == tl.int8 else 448.0
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        x = tl.load(tile + head * HEAD_DIM, mask=row_is_real[:, None], other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + head * HEAD_DIM + dims).to(tl.float32)
            x = x.to(tl.float32) * inverse_rms[:, None] * weight[None, :]
            x = cast(x, compute).to(tl.float32)
            x = cast(_rotate(x, cos, sin, HEAD_DIM, BLOCK), compute)
        if sub_means_ptr is not None:
            size: tl.constexpr = BLOCK // PARTS
            total = tl.zeros([HEAD_DIM], tl.float32)
            for part in tl.static_range(PARTS):
                partial = tl.sum(tl.where((rows // size == part)[:, None], x.to(tl.float32), 0.0), 0)
                total += partial
                count = tl.minimum(length - part * size, size)
                if count > 0:
                    sub = out_frame * tl.cdiv(tokens_per_frame, size) + block * PARTS + part
                    mean = tl.div_rn(partial, count.to(tl.float32))
                    place = sub_means_ptr + (sub * heads + head) * HEAD_DIM + dims
                    tl.store(place, cast(mean, compute))
        elif means_ptr is not None:
            total = tl.sum(x.to(tl.float32), 0)
        if means_ptr is not None:
            mean = tl.div_rn(total, length.to(tl.float32))
            tl.store(means_ptr + (out_block * heads + head) * HEAD_DIM + dims, cast(mean, compute))
        if scales_ptr is not None:
            wide = x.to(tl.float32)
            if mean_ptr is not None:
                wide -= tl.load(mean_ptr + (batch * heads + head) * HEAD_DIM + dims)[None, :]
                wide = tl.where(row_is_real[:, None], wide, 0.0)
            scale = tl.div_rn(tl.max(tl.max(tl.abs(wide), 1), 0), largest)
            scale = tl.where(scale == 0.0, 1.0, scale)
            tl.store(scales_ptr + out_block * heads + head, scale)
            x = tl.clamp(tl.div_rn(wide, scale), -largest, largest)
            x = cast(x, out_ptr.dtype.element_ty)
        tl.store(out_tile + head * HEAD_DIM, x, mask=row_is_real[:, None])

    if frame_means_ptr is not None:
        # The program that finishes a frame's last block pools the frame, always in the order of its blocks: no result
        # depends on which program that is. The barrier puts all threads' means before the release of the count.
        tl.debug_barrier()
        arrivals = arrivals_ptr + (batch * frames + frame) * groups + group
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == per_frame - 1:
            tl.store(arrivals, 0)
            first_block = out_frame * per_frame
            for head in range(first_head, last_head):
                total = tl.zeros([HEAD_DIM], tl.float32)
                for start in range(0, per_frame, 32):
                    blocks = start + tl.arange(0, 32)
                    means = tl.load(
                        means_ptr + ((first_block + blocks[:, None]) * heads + head) * HEAD_DIM + dims[None, :],
                        mask=blocks[:, None] < per_frame,
                        other=0.0,
                        cache_modifier=".cg",  # other programs wrote them, so only L2 has the new values
                    )
                    lengths = tl.minimum(BLOCK, tokens_per_frame - blocks * BLOCK).to(tl.float32)
                    shares = tl.div_rn(lengths, tl.zeros([32], tl.float32) + tokens_per_frame)
                    total += tl.sum(means.to(tl.float32) * shares[:, None], 0)
                place = frame_means_ptr + (out_frame * heads + head) * HEAD_DIM + dims
                tl.store(place, cast(total, compute))


# Frames and the split over programs change from call to call; unspecialised, they cost no new compilation.
@triton.jit(do_not_specialize=["batch", "frames", "slots", "heads_per_program", "ring_rows", "tokens_per_frame"])
def _store(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_out_ptr,
    q_means_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    key_means_ptr,
    frame_means_ptr,
    arrivals_ptr,
    value_means_ptr,
    sub_means_ptr,
    key_mean_ptr,
    x_row,
    eps,
    batch,
    heads,
    heads_per_program,
    frames,
    slots,
    ring_rows,
    tokens_per_frame,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = batch * frames * tl.cdiv(heads, heads_per_program)
    q_programs = 0
    if q_ptr is not None:
        q_programs = lanes * tl.cdiv(tokens_per_frame, BLOCK_Q)
        if program < q_programs:
            _write_part(
                program,
                q_ptr,
                x_row,
                q_out_ptr,
                heads,
                heads_per_program,
                frames,
                frames,
                tokens_per_frame,
                tokens_per_frame,
                HEAD_DIM,
                BLOCK_Q,
                STAGES,
                q_weight_ptr,
                cos_ptr,
                sin_ptr,
                eps,
                means_ptr=q_means_ptr,
            )
    k_programs = lanes * tl.cdiv(tokens_per_frame, BLOCK_K)
    if (program >= q_programs) & (program < q_programs + k_programs):
        _write_part(
            program - q_programs,
            k_ptr,
            x_row,
            keys_ptr,
            heads,
            heads_per_program,
            frames,
            slots,
            ring_rows,
            tokens_per_frame,
            HEAD_DIM,
            BLOCK_K,
            STAGES,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            eps,
            slots_ptr,
            key_scales_ptr,
            key_means_ptr,
            frame_means_ptr,
            arrivals_ptr,
            sub_means_ptr,
            key_mean_ptr,
        )
    if program >= q_programs + k_programs:
        _write_part(
            program - q_programs - k_programs,
            v_ptr,
            x_row,
            values_ptr,
            heads,
            heads_per_program,
            frames,
            slots,
            ring_rows,
            tokens_per_frame,
            HEAD_DIM,
            BLOCK_K,
            STAGES,
            slots_ptr=slots_ptr,
            scales_ptr=value_scales_ptr,
            means_ptr=value_means_ptr,
        )


def launch_options(block_q: int, block_k: int, itemsize: int, sub_means: bool) -> dict[str, int]:
    """Warps, registers and load-ahead for the larger tile; `itemsize` is in bytes.

    Eight tokens a warp (four if parts of blocks are pooled too, which takes registers) and at most 128 registers
    a thread let 16 warps live on every multiprocessor. Parts of 128 tokens and float32 spill then: twice of both. Two
    tiles of 16 bits are loaded ahead of the one at work, 64 KB at most; float32 would not fit and loads none ahead.
    """
    larger, tokens_a_warp, most_warps, registers = max(block_q, block_k), 4 if sub_means else 8, 16, 128
    if itemsize == 4 or (sub_means and larger == 128):
        tokens_a_warp, most_warps, registers = 2 * tokens_a_warp, 8, 255
    warps = min(most_warps, max(4, larger // tokens_a_warp))
    return {"STAGES": 3 if itemsize == 2 else 1, "num_warps": warps, "maxnreg": registers}


def why_not(x: Tensor, head_dim: int, block: tuple[int, int], cache_dtype: torch.dtype | None = None) -> str | None:
    """Why this kernel cannot take a projection x [B, L, H · D], or None.

    block: (query, key) tokens per block. cache_dtype: of stored keys and values, x's dtype if None.
    """
    cache_dtype = cache_dtype or x.dtype
    if cache_dtype != x.dtype and cache_dtype not in EIGHT_BIT:
        return f"the fused store keeps {x.dtype} as it is, as int8 or as float8_e4m3fn, not as {cache_dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the fused store takes head dims of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if not set(block) <= set(BLOCK_SIZES):
        return f"the fused store takes blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block}"
    return device.why_not("the fused store", x, float8=cache_dtype == torch.float8_e4m3fn)


def fused_store(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    ring: LayerMemory,
    slots: Tensor,
    tokens_per_frame: int,
    head_dim: int,
    block: tuple[int, int],
    rows_per_frame: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Norm and rotate q and k, pool all three, and write k and v, in one launch.

    q, k, v: raw projections [B, L, H · D] of whole frames, also as parts of one product's rows; q may be None.
    q_weight, k_weight: [H · D], of the RMS norms over the full width, with `eps`.
    cos, sin: float32, L · D/2 values in the order of `RopeTable`'s.
    ring: as `KVStorage` in the core makes it. slots: int32 [frames] on the device, the slot of `ring` that each frame
    goes to, no two the same; the caller vouches for their range.
    block: (query, key) tokens per block; the last block of a frame may be ragged.
    rows_per_frame: of the ring's keys and values, tokens_per_frame if None; rows past a frame's tokens are not written.

    Returns q normed and rotated, [B, L, H, D], and its block means [B, frames · query blocks per frame, H, D]; None
    without q. All other rows of the ring keep their bits. Nothing waits on the device, and neither slots nor the
    number of frames compile anew. Launches that share `ring.arrivals` must follow one another on one stream.

    The mathematics and its roundings are the unfused ones: statistics, weight and rotation in float32, rounded to
    the projections' dtype after the norm and after the rotation; means are float32 sums of those rounded values,
    divided and rounded; frame means weigh the rounded block means. An 8-bit ring gets value / scale rounded half to
    even with scale = largest / 127 or / 448 of each block and head (1 if all is zero), of keys less
    `ring.key_mean`; means stay unquantised.

    The caller has asked `why_not`, and has all tensors of one layer. Raises ValueError for projections that are not
    whole frames or not alike, and for norms of another width.
    """
    batch, tokens, width = k.shape
    frames, heads = tokens // tokens_per_frame, width // head_dim
    if tokens % tokens_per_frame or width % head_dim or not frames:
        raise ValueError(f"{tuple(k.shape)} is not [B, frames · {tokens_per_frame} tokens, heads · {head_dim}]")
    for x in (v,) if q is None else (q, v):
        device.require("q, k and v", x, tuple(k.shape), k.dtype, k.device)
    for name, weight in {"k": k_weight, **({} if q is None else {"q": q_weight})}.items():
        if weight is None or weight.shape != (width,) or not weight.is_contiguous():
            raise ValueError(f"the norm of {name} needs a contiguous weight of {width} values")
    ring_rows = rows_per_frame or tokens_per_frame
    ring_slots = ring.keys.shape[1] // ring_rows
    out = means = None
    q_blocks, k_blocks = (frames * cdiv(tokens_per_frame, size) for size in block)
    blocks = 2 * batch * k_blocks
    if q is not None:
        out = torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=q.device)
        means = torch.empty(batch, q_blocks, heads, head_dim, dtype=q.dtype, device=q.device)
        blocks += batch * q_blocks
    heads_per_program = cdiv(heads, min(heads, cdiv(PROGRAMS * device.multiprocessors(k.device), blocks)))
    row = k.stride(1)
    if any(x is not None and x.stride() != (tokens * row, row, 1) for x in (q, k, v)):
        q, k, v, row = None if q is None else q.contiguous(), k.contiguous(), v.contiguous(), width
    q_weight = None if q is None else q_weight
    arguments: list[Any] = [q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous()]
    arguments += [slots, out, means, *ring]
    arguments += [row, eps, batch, heads, heads_per_program, frames, ring_slots, ring_rows, tokens_per_frame]
    launch(
        _store,
        (blocks * cdiv(heads, heads_per_program),),
        *arguments,
        HEAD_DIM=head_dim,
        BLOCK_Q=block[0],
        BLOCK_K=block[1],
        **launch_options(*block, k.element_size(), ring.sub_means is not None),
    )
    return None if out is None or means is None else (out, means)
