"""Hierarchical block selection in Triton: from means to lists in two launches.

The first launch multiplies query means with key and frame means, or with the means of parts of blocks, whose
log-sum-exp are the scores of blocks and frames then. In the second, one program owns one query block:
it holds the row's scores in registers and searches, bit by bit, for the highest threshold that still leaves as many
candidates as needed. Nothing is sorted; prefix sums resolve ties, and the list is written in id order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .bound import cdiv, launch
from .device import IS_INTERPRETED

MAX_BLOCKS = 16384
MAX_FRAMES = 4096

LOWEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).min)
HIGHEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)
LOWEST_INT = tl.constexpr(-(2**31))  # below the order of any score: not eligible
HIGHEST_INT = tl.constexpr(2**31 - 1)  # higher than the order of any score: a threshold that nothing reaches


class Parts(NamedTuple):
    """Means of parts of key blocks, [B, frames · parts per frame, H, D], and sizes.

    A frame of `tokens_per_frame` tokens is cut into parts of `tokens`, the last one ragged, and `per_block` parts
    (a power of two) make a block, fewer at a frame's end.
    """

    means: Tensor
    tokens_per_frame: int
    tokens: int
    per_block: int


@triton.jit
def _add_products(scores, q_tile, k_tile, q_is_real, k_is_real, HEAD_DIM: tl.constexpr, TILE_DIM: tl.constexpr):
    """scores + q · k, of rows and columns whose first values are at q_tile and k_tile."""
    for start in range(0, HEAD_DIM, TILE_DIM):
        dims = start + tl.arange(0, TILE_DIM)
        q = tl.load(q_tile + dims[None, :], mask=q_is_real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        k = tl.load(k_tile + dims[:, None], mask=k_is_real[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        if IS_INTERPRETED:  # its tl.dot multiplies the raw bits of bfloat16
            q, k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.dot(q, k, scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "frames"])
def _score(
    q_ptr,
    k_ptr,
    frame_ptr,
    scores_ptr,
    k_stride_b,
    frame_stride_b,
    heads,
    q_blocks,
    k_blocks,
    frames,
    HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """One tile of q_means · [k_means, frame_means]; a row's blocks come first."""
    tile = tl.program_id(0)
    head_row = tl.program_id(2)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)
    k_tiles = tl.cdiv(k_blocks, TILE_K)
    if tile < k_tiles:
        base = k_ptr + batch * k_stride_b
        first = tile * TILE_K
        length = k_blocks
        column = first
    else:
        base = frame_ptr + batch * frame_stride_b
        first = (tile - k_tiles) * TILE_K
        length = frames
        column = k_blocks + first

    rows = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    columns = tl.arange(0, TILE_K)
    row_is_real = rows < q_blocks
    column_is_real = first + columns < length
    q_tile = (q_ptr + ((batch * q_blocks + rows) * heads + head) * HEAD_DIM)[:, None]
    k_tile = (base + ((first + columns).to(tl.int64) * heads + head) * HEAD_DIM)[None, :]
    scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
    scores = _add_products(scores, q_tile, k_tile, row_is_real, column_is_real, HEAD_DIM, TILE_DIM)
    row_ptr = scores_ptr + (head_row.to(tl.int64) * q_blocks + rows) * (k_blocks + frames) + column
    tl.store(row_ptr[:, None] + columns[None, :], scores, mask=row_is_real[:, None] & column_is_real[None, :])


@triton.jit
def _shifted(largest):
    """The number to subtract from scores before exp: the largest, or 0 if infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit(do_not_specialize=["q_blocks", "frames", "per_frame", "parts_per_frame", "tokens_per_frame"])
def _score_parts(
    q_ptr,
    parts_ptr,
    scores_ptr,
    part_stride_b,
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
    q_tile = (q_ptr + ((batch * q_blocks + rows) * heads + head) * HEAD_DIM)[:, None]
    base = parts_ptr + batch * part_stride_b + (frame.to(tl.int64) * parts_per_frame * heads + head) * HEAD_DIM
    row_ptr = scores_ptr + (head_row.to(tl.int64) * q_blocks + rows) * (frames * per_frame + frames)

    frame_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    frame_sum = tl.zeros([TILE_Q], tl.float32)
    for first in range(0, per_frame, TILE_K // PER_BLOCK):
        parts = first * PER_BLOCK + columns
        is_real = parts < parts_per_frame
        k_tile = (base + parts.to(tl.int64) * heads * HEAD_DIM)[None, :]
        scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
        scores = _add_products(scores, q_tile, k_tile, row_is_real, is_real, HEAD_DIM, TILE_DIM)
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


@triton.jit
def _order(score):
    """int32 that compare as the scores do; NaN counts as the lowest finite score, infinities as the nearest one."""
    score = tl.where(score != score, LOWEST_FLOAT, score)
    score = tl.minimum(tl.maximum(score, LOWEST_FLOAT), HIGHEST_FLOAT)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # −0 equals 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(keys, wanted, start, BITS: tl.constexpr):
    """The highest int32 from `start` to start + 2^BITS − 1 that at least `wanted` keys reach, as `start` itself is."""
    threshold = start
    for i in range(BITS):
        higher = threshold + (1 << (BITS - 1 - i))
        threshold = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= wanted, higher, threshold)
    return threshold


@triton.jit
def _signed_threshold(keys, wanted):
    """The highest int32 that at least `wanted` of the keys reach."""
    return _threshold(keys, wanted, tl.where(tl.sum((keys >= 0).to(tl.int32)) >= wanted, 0, LOWEST_INT), 31)


@triton.jit(do_not_specialize=["k_blocks", "frames", "per_frame", "choose", "kept", "width"])
def _select(
    scores_ptr,
    ranks_ptr,
    numbers_ptr,
    blocks_ptr,
    counts_ptr,
    k_blocks,
    frames,
    per_frame,
    choose,
    kept,
    width,
    COLUMNS: tl.constexpr,
    FRAMES: tl.constexpr,
    FRAME_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * (k_blocks + frames)
    if numbers_ptr is not None:
        choose = tl.load(numbers_ptr)
        kept = tl.load(numbers_ptr + 1)

    # A competing frame is chosen if its score is above the threshold, or equals it and its rank is at most `last_rank`.
    frame_threshold = tl.full((), HIGHEST_INT, tl.int32)
    last_rank = tl.full((), -1, tl.int32)
    if choose > 0:
        slots = tl.arange(0, FRAMES)
        slot_rank = tl.load(ranks_ptr + slots, mask=slots < frames, other=-1)
        frame_keys = _order(tl.load(row_ptr + k_blocks + slots, mask=slots < frames, other=0.0))
        frame_keys = tl.where(slot_rank >= 0, frame_keys, LOWEST_INT)
        frame_threshold = _signed_threshold(frame_keys, choose)
        missing = choose - tl.sum((frame_keys > frame_threshold).to(tl.int32))
        backwards = tl.where(frame_keys == frame_threshold, FRAMES - 1 - slot_rank, -1)
        last_rank = FRAMES - 1 - _threshold(backwards, missing, tl.full((), 0, tl.int32), FRAME_BITS)

    ids = tl.arange(0, COLUMNS)
    is_real = ids < k_blocks
    slot = ids // per_frame
    rank = tl.load(ranks_ptr + slot, mask=is_real, other=-2)
    # If no frame is chosen, their scores were never written; nothing reaches the threshold then.
    frame_key = _order(tl.load(row_ptr + k_blocks + slot, mask=is_real & (rank >= 0), other=0.0))
    chosen = (frame_key > frame_threshold) | ((frame_key == frame_threshold) & (rank <= last_rank))
    eligible = (rank == -1) | ((rank >= 0) & chosen)
    keys = tl.where(eligible, _order(tl.load(row_ptr + ids, mask=is_real, other=0.0)), LOWEST_INT)

    threshold = _signed_threshold(keys, kept)
    above = (keys > threshold).to(tl.int32)
    tied = (keys == threshold).to(tl.int32)
    missing = kept - tl.sum(above)
    # Both prefix sums in one scan: `above` in the low half of each int, `tied` in the high half.
    sums = tl.cumsum(above + (tied << 16), 0)
    above_so_far = sums & 0xFFFF
    tied_so_far = sums >> 16
    picked = (above == 1) | ((tied == 1) & (tied_so_far <= missing))
    place = above_so_far + tl.minimum(tied_so_far, missing) - 1
    tl.store(blocks_ptr + row * width + place, ids, mask=picked)
    tl.store(blocks_ptr + row * width + ids, tl.zeros([COLUMNS], tl.int32), mask=(ids >= kept) & (ids < width))
    tl.store(counts_ptr + row, kept)


def why_not(q_means: Tensor, k_blocks: int, frames: int) -> str | None:
    """Why these kernels cannot select for q_means [B, q_blocks, H, D], or None."""
    if k_blocks > MAX_BLOCKS:
        return f"the selection kernel holds up to {MAX_BLOCKS:,} key blocks in registers, not {k_blocks:,}"
    if frames > MAX_FRAMES:
        return f"the selection kernel holds up to {MAX_FRAMES:,} frames in registers, not {frames:,}"
    return device.why_not("the selection kernel", q_means)


def select_blocks(
    q_means: Tensor,
    k_means: Tensor,
    frame_means: Tensor,
    frame_ranks: Tensor,
    *,
    choose: int,
    kept: int,
    parts: Parts | None = None,
    numbers: Tensor | None = None,
    width: int = 0,
) -> tuple[Tensor, Tensor]:
    """Select for each query block the `kept` best key blocks of eligible frames.

    q_means [B, q_blocks, H, D], k_means [B, k_blocks, H, D], frame_means [B, frames, H, D]: one dtype; scores are
    inner products in float32. frame_ranks: int32 [frames], −1 for a frame that is always eligible, −2 for one that
    never is, otherwise its rank, unique and below `frames`, among those that compete for `choose` places; the lowest
    rank wins a tie. Of equal blocks the lowest id wins. NaN counts as the lowest finite score, an infinite score as the
    nearest finite one. At least `choose` frames must compete and `kept` blocks be eligible.
    parts: score by log-sum-exp over parts of blocks, with products scaled by 1/√D; of k_means and frame_means only the
    shapes are used then. Blocks of the same parts in the same order tie, in another order up to rounding.
    numbers: int32 on the device, first `choose` and `kept`, which the kernel then reads from there; the caller vouches
    for their range.
    width: entries of a list, `kept` or more; 0 is `kept`.

    Returns int32 ids [B, H, q_blocks, width], of which `kept` are ascending and the rest 0, and int32 counts
    [B, H, q_blocks]. Nothing waits on the device; lengths and counts are runtime values. Raises ValueError when
    `why_not` gives a reason or a shape or dtype is off.
    """
    batch, q_blocks, heads, head_dim = q_means.shape
    k_blocks, frames = k_means.shape[1], frame_means.shape[1]
    if reason := why_not(q_means, k_blocks, frames):
        raise ValueError(reason)
    for name, means in (("k_means", k_means), ("frame_means", frame_means), ("parts", parts and parts.means)):
        if means is not None:
            device.require(name, means, (batch, means.shape[1], heads, head_dim), q_means.dtype, q_means.device)
    if parts is not None:
        per_frame = cdiv(parts.tokens_per_frame, parts.tokens)
        if parts.means.shape[1] != frames * per_frame or k_blocks != frames * cdiv(per_frame, parts.per_block):
            raise ValueError(
                f"parts {tuple(parts.means.shape)} of {parts.tokens} tokens, {parts.per_block} to a block, are not "
                f"those of {k_blocks} key blocks in {frames} frames of {parts.tokens_per_frame} tokens"
            )
    device.require("frame_ranks", frame_ranks, (frames,), torch.int32, q_means.device)
    if k_blocks % frames:
        raise ValueError(f"{k_blocks} key blocks do not fit {frames} frames; pass whole frames of blocks")
    width = width or kept
    if not (1 <= kept <= width <= k_blocks and 0 <= choose <= frames):
        problem = f"keep {kept} of {k_blocks} key blocks in lists of {width} and choose {choose} of {frames} frames"
        raise ValueError(f"cannot {problem}")
    if numbers is not None:
        device.require("numbers", numbers, (len(numbers),), torch.int32, q_means.device)
    scores = torch.empty(batch, heads, q_blocks, k_blocks + frames, dtype=torch.float32, device=q_means.device)
    blocks = torch.empty(batch, heads, q_blocks, width, dtype=torch.int32, device=q_means.device)
    counts = torch.empty(batch, heads, q_blocks, dtype=torch.int32, device=q_means.device)
    # Coarse powers of two, so that a growing cache rarely compiles.
    columns, padded_frames = max(512, 1 << (k_blocks - 1).bit_length()), max(32, 1 << (frames - 1).bit_length())
    with_frames = choose > 0 or numbers is not None
    _write_scores(q_means, k_means, frame_means, scores, parts, with_frames=with_frames)
    launch(
        _select,
        (batch * heads * q_blocks,),
        scores,
        frame_ranks.contiguous(),
        numbers,
        blocks,
        counts,
        *(k_blocks, frames, k_blocks // frames, choose, kept, width),
        COLUMNS=columns,
        FRAMES=padded_frames,
        FRAME_BITS=padded_frames.bit_length() - 1,
        num_warps=min(16, columns // 512),  # scores of a row in registers: 16 per thread, 32 in the longest rows
    )
    return blocks, counts


def _write_scores(
    q_means: Tensor, k_means: Tensor, frame_means: Tensor, scores: Tensor, parts: Parts | None, *, with_frames: bool
) -> None:
    """The first launch; with_frames: whether the scores of frames are read."""
    batch, q_blocks, heads, head_dim = q_means.shape
    k_blocks, frames, wide = k_means.shape[1], frame_means.shape[1], q_means.element_size() == 4
    # float32 runs on plain multiply-adds, which the compiler unrolls: larger tiles would spill registers.
    constants = {"HEAD_DIM": head_dim, "TILE_Q": 64, "TILE_K": 64, "TILE_DIM": 32 if wide else 64}
    numbers: list[float] = [heads, q_blocks]
    if parts is None:
        kernel, means = _score, [q_means.contiguous(), k_means, frame_means]
        tiles = cdiv(k_blocks, 64) + (cdiv(frames, 64) if with_frames else 0)
        numbers += [k_blocks, frames]
    else:
        kernel, means, tiles = _score_parts, [q_means.contiguous(), parts.means], frames
        constants |= {"TILE_Q": 32 if wide else 64, "TOKENS": parts.tokens, "PER_BLOCK": parts.per_block}
        parts_per_frame = cdiv(parts.tokens_per_frame, parts.tokens)
        numbers += [frames, k_blocks // frames, parts_per_frame, parts.tokens_per_frame, head_dim**-0.5]
    # Of a cache that is not full each sample is contiguous.
    means = [x if x.stride()[1:] == (heads * head_dim, head_dim, 1) else x.contiguous() for x in means]
    launch(
        kernel,
        (tiles, cdiv(q_blocks, constants["TILE_Q"]), batch * heads),
        *means,
        scores,
        *(x.stride(0) for x in means[1:]),
        *numbers,
        **constants,
        num_warps=4,
        num_stages=2,
    )
