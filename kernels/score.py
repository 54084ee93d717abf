"""Scores of key blocks and frames for every query block: the first of selection's two launches.

A score is the product of means, or the log-sum-exp over the means of a block's parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import INTERPRETED


class Parts(NamedTuple):
    """Means of parts of key blocks, [B, frames · parts per frame, H, D], and how they tile frames.

    A frame of `tokens_per_frame` tokens is cut into parts of `tokens`, the last one ragged, and `per_block` parts
    (a power of two) make a block, fewer at a frame's end.
    """

    means: Tensor
    tokens_per_frame: int
    tokens: int
    per_block: int


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "frames"])
def _score(
    q_ptr,
    k_ptr,
    frame_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    frame_stride_b,
    frame_stride_l,
    frame_stride_h,
    heads,
    q_blocks,
    k_blocks,
    frames,
    HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of q_means · [k_means, frame_means]; a row of scores holds the k_blocks and then the frames."""
    tile = tl.program_id(0)
    head_row = tl.program_id(2)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    k_tiles = tl.cdiv(k_blocks, TILE_K)
    if tile < k_tiles:
        base = k_ptr + batch * k_stride_b + head * k_stride_h
        stride = k_stride_l
        first = tile * TILE_K
        length = k_blocks
        column = first
    else:
        base = frame_ptr + batch * frame_stride_b + head * frame_stride_h
        stride = frame_stride_l
        first = (tile - k_tiles) * TILE_K
        length = frames
        column = k_blocks + first

    rows = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    columns = tl.arange(0, TILE_K)
    row_is_real = rows < q_blocks
    column_is_real = first + columns < length
    q_tile = (q_ptr + batch * q_stride_b + head * q_stride_h + rows.to(tl.int64) * q_stride_l)[:, None]
    k_tile = (base + (first + columns).to(tl.int64) * stride)[None, :]
    scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for start in range(0, HEAD_DIM, TILE_DIM):
        dims = start + tl.arange(0, TILE_DIM)
        q = tl.load(q_tile + dims[None, :], mask=row_is_real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        k = tl.load(k_tile + dims[:, None], mask=column_is_real[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        if UPCAST:
            q, k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.dot(q, k, scores, input_precision="ieee")
    row_ptr = scores_ptr + (head_row.to(tl.int64) * q_blocks + rows) * (k_blocks + frames) + column
    tl.store(row_ptr[:, None] + columns[None, :], scores, mask=row_is_real[:, None] & column_is_real[None, :])


@triton.jit
def _shifted(largest):
    """The number subtracted from scores before exp: the largest of them, or 0 if that is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit(do_not_specialize=["q_blocks", "frames", "per_frame", "parts_per_frame", "tokens_per_frame"])
def _score_parts(
    q_ptr,
    parts_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    part_stride_b,
    part_stride_l,
    part_stride_h,
    heads,
    q_blocks,
    frames,
    per_frame,
    parts_per_frame,
    tokens_per_frame,
    scale,
    TOKENS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One frame's scores in rows like those of `_score`.

    A block's is the log-sum-exp over its parts of scale · q·k + log(tokens of the part), a frame's that of its blocks.
    """
    frame = tl.program_id(0)
    head_row = tl.program_id(2)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    rows = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    columns = tl.arange(0, TILE_K)
    blocks = tl.arange(0, TILE_K // PER_BLOCK)
    row_is_real = rows < q_blocks
    q_tile = (q_ptr + batch * q_stride_b + head * q_stride_h + rows.to(tl.int64) * q_stride_l)[:, None]
    base = parts_ptr + batch * part_stride_b + head * part_stride_h
    base += frame.to(tl.int64) * parts_per_frame * part_stride_l
    row_ptr = scores_ptr + (head_row.to(tl.int64) * q_blocks + rows) * (frames * per_frame + frames)

    frame_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    frame_sum = tl.zeros([TILE_Q], tl.float32)
    for first in range(0, per_frame, TILE_K // PER_BLOCK):
        parts = first * PER_BLOCK + columns
        is_real = parts < parts_per_frame
        k_tile = (base + parts.to(tl.int64) * part_stride_l)[None, :]
        scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
        for start in range(0, HEAD_DIM, TILE_DIM):
            dims = start + tl.arange(0, TILE_DIM)
            q = tl.load(q_tile + dims[None, :], mask=row_is_real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
            k = tl.load(k_tile + dims[:, None], mask=is_real[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
            if UPCAST:
                q, k = q.to(tl.float32), k.to(tl.float32)
            scores = tl.dot(q, k, scores, input_precision="ieee")
        tokens = tl.maximum(tl.minimum(tokens_per_frame - parts * TOKENS, TOKENS), 1).to(tl.float32)
        scores = tl.where(is_real[None, :], scores * scale + tl.log(tokens)[None, :], float("-inf"))
        scores = tl.reshape(scores, [TILE_Q, TILE_K // PER_BLOCK, PER_BLOCK])
        shift = _shifted(tl.max(scores, 2))
        block_scores = tl.log(tl.sum(tl.exp(scores - shift[:, :, None]), 2)) + shift
        place = row_ptr[:, None] + (frame * per_frame + first + blocks)[None, :]
        tl.store(place, block_scores, mask=row_is_real[:, None] & (first + blocks < per_frame)[None, :])
        new_max = tl.maximum(frame_max, tl.max(block_scores, 1))
        shift = _shifted(new_max)
        frame_sum = frame_sum * tl.exp(frame_max - shift) + tl.sum(tl.exp(block_scores - shift[:, None]), 1)
        frame_max = new_max
    tl.store(row_ptr + frames * per_frame + frame, tl.log(frame_sum) + _shifted(frame_max), mask=row_is_real)


def score_constants(head_dim: int, itemsize: int) -> dict[str, int]:
    """Compile-time constants of the first launch, without the interpreter's; `itemsize` is bytes per element."""
    # float32 runs on plain multiply-adds, which the compiler unrolls: longer steps would spill registers.
    return {"HEAD_DIM": head_dim, "TILE_Q": 64, "TILE_K": 64, "TILE_DIM": 32 if itemsize == 4 else 64}


def part_constants(head_dim: int, itemsize: int, parts: Parts) -> dict[str, int]:
    """Compile-time constants to score parts: half the rows in float32, which would spill registers too."""
    tile_q = 32 if itemsize == 4 else 64
    own = {"TILE_Q": tile_q, "TOKENS": parts.tokens, "PER_BLOCK": parts.per_block}
    return score_constants(head_dim, itemsize) | own


def score_means(q_means: Tensor, k_means: Tensor, frame_means: Tensor, scores: Tensor, *, with_frames: bool) -> None:
    q_means, k_means, frame_means = map(_dim_last, (q_means, k_means, frame_means))
    batch, q_blocks, heads, head_dim = q_means.shape
    k_blocks, frames = k_means.shape[1], frame_means.shape[1]
    tile = score_constants(head_dim, q_means.element_size())
    tiles = triton.cdiv(k_blocks, tile["TILE_K"]) + (triton.cdiv(frames, tile["TILE_K"]) if with_frames else 0)
    _score[(tiles, triton.cdiv(q_blocks, tile["TILE_Q"]), batch * heads)](
        q_means,
        k_means,
        frame_means,
        scores,
        *q_means.stride()[:3],
        *k_means.stride()[:3],
        *frame_means.stride()[:3],
        heads,
        q_blocks,
        k_blocks,
        frames,
        **tile,
        UPCAST=INTERPRETED and q_means.dtype == torch.bfloat16,  # its tl.dot multiplies the raw bits of bfloat16
        num_warps=4,
        num_stages=2,
    )


def score_parts(q_means: Tensor, parts: Parts, scores: Tensor, per_frame: int) -> None:
    q_means, means = map(_dim_last, (q_means, parts.means))
    batch, q_blocks, heads, head_dim = q_means.shape
    parts_per_frame = triton.cdiv(parts.tokens_per_frame, parts.tokens)
    frames = means.shape[1] // parts_per_frame
    tile = part_constants(head_dim, q_means.element_size(), parts)
    _score_parts[(frames, triton.cdiv(q_blocks, tile["TILE_Q"]), batch * heads)](
        q_means,
        means,
        scores,
        *q_means.stride()[:3],
        *means.stride()[:3],
        heads,
        q_blocks,
        frames,
        per_frame,
        parts_per_frame,
        parts.tokens_per_frame,
        head_dim**-0.5,
        **tile,
        UPCAST=INTERPRETED and q_means.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=2,
    )


def _dim_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def check_parts(parts: Parts, k_blocks: int, frames: int) -> None:
    """ValueError unless the parts are those of this many blocks and frames."""
    per_frame = triton.cdiv(parts.tokens_per_frame, parts.tokens)
    if parts.means.shape[1] != frames * per_frame or k_blocks != frames * triton.cdiv(per_frame, parts.per_block):
        raise ValueError(
            f"parts {tuple(parts.means.shape)} of {parts.tokens} tokens, {parts.per_block} to a block, are not those "
            f"of {k_blocks} key blocks in {frames} frames of {parts.tokens_per_frame} tokens"
        )
