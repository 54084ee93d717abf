"""The device code of block-sparse attention: one program's work on its rows.

A unit of work is up to TILE_Q rows of one query block of one head. Most units are one program each; those that would
leave the last wave half empty are cut into parts, programs of their own that each walk a share of the list and leave
their sums for `combine`, which adds the parts up in their order.
"""

import triton
import triton.language as tl

from .device import IS_INTERPRETED
from .rounding import cast

LOWEST = tl.constexpr(-1e30)  # below any score, and finite

# Two pairs of 8-bit numbers in $2 as bfloat16: the low bytes in $0, the high ones in $1. For float8_e4m3fn sign,
# exponent and mantissa move to their places, and 2^120 makes up for the smaller bias. For int8 the low 7 bits become
# 128 + x, of which 128 or, for the negative, 256 is subtracted.
_FLOAT8 = """and.b32 s, {0}, 0x80008000; shr.u32 m, {0}, 4; lop3.b32 m, m, 0x07f007f0, s, 0xea;
mov.b32 f, 0x7b807b80; mov.b32 s, 0x80008000; fma.rn.bf16x2 {1}, m, f, s;"""
_INT8 = """lop3.b32 m, {0}, 0x007f007f, 0x43004300, 0xea; lop3.b32 s, {0}, 0x00800080, 0xc300c300, 0xea;
mov.b32 f, 0x3f803f80; fma.rn.bf16x2 {1}, m, f, s;"""
_ASM = "{{.reg .b32 x, m, s, f; {}}}"
FLOAT8_PAIRS = tl.constexpr(_ASM.format("shl.b32 x, $2, 8;" + _FLOAT8.format("x", "$0") + _FLOAT8.format("$2", "$1")))
INT8_PAIRS = tl.constexpr(_ASM.format(_INT8.format("$2", "$0") + "shr.u32 x, $2, 8;" + _INT8.format("x", "$1")))
# Four float8_e4m3fn in $2 as bfloat16 in $0 and $1.
_FOUR = "prmt.b32 x, $2, 0, 0x1404;", _FLOAT8.format("x", "$0"), "prmt.b32 x, $2, 0, 0x3424;", _FLOAT8.format("x", "$1")
FLOAT8_FOUR = tl.constexpr(_ASM.format("".join(_FOUR)))
# Four pairs in $2 and $3: the low bytes in $0, the high ones in $1.
APART = tl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")
# e4m3 numbers end at 448. Weights are at most 1, and those below 2^-18 become 0.
WEIGHT_ONE = tl.constexpr(256.0)


@triton.jit
def _dot(a, b, total):
    """a · b + total; b may be stored in any dtype."""
    if IS_INTERPRETED:  # its tl.dot multiplies the raw bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif b.dtype == tl.float8e4nv:  # noqa: SIM102
        if a.dtype == tl.bfloat16:  # the compiler's own conversion takes as long as the product
            b = tl.inline_asm_elementwise(FLOAT8_FOUR, "=r,=r,r", [b], tl.bfloat16, True, 4)
    # float32 keeps its precision on tensor cores. Triton before 3.4 takes no None for a total.
    if total is None:
        return tl.dot(a, b.to(a.dtype), input_precision="tf32x3")
    else:
        return tl.dot(a, b.to(a.dtype), total, input_precision="tf32x3")


@triton.jit
def _pairs(x, FLOAT8: tl.constexpr, STAY: tl.constexpr = False):
    """The 8-bit numbers in the low and in the high bytes of int16 x, as bfloat16, or as they are if they STAY."""
    if IS_INTERPRETED:
        low, high = x.to(tl.int8).to(tl.int32), x.to(tl.int32) >> 8
        if FLOAT8:
            low = (((low & 0x80) << 24) | ((low & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
            high = (((high & 0x80) << 24) | ((high & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
        return low, high
    elif STAY:
        return tl.inline_asm_elementwise(APART, "=r,=r,r,r", [x], (tl.float8e4nv, tl.float8e4nv), True, 4)
    elif FLOAT8:
        return tl.inline_asm_elementwise(FLOAT8_PAIRS, "=r,=r,r", [x], (tl.bfloat16, tl.bfloat16), True, 2)
    else:
        return tl.inline_asm_elementwise(INT8_PAIRS, "=r,=r,r", [x], (tl.bfloat16, tl.bfloat16), True, 2)


@triton.jit
def _load(base, offsets, dim_is_real, PADDED: tl.constexpr):
    """A tile whose rows all exist; padded dims read as zeros."""
    if PADDED:
        return tl.load(base + offsets, mask=dim_is_real, other=0.0)
    return tl.load(base + offsets)


@triton.jit
def _values(base, offsets, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PADDED: tl.constexpr, HALVES: tl.constexpr):
    """A tile of values: all DIMS of them twice, or the first DIMS and the rest."""
    dims = tl.arange(0, DIMS)
    v = _load(base, offsets + dims[None, :], (dims < HEAD_DIM)[None, :], PADDED)
    rest = v
    if HALVES:
        rest = _load(base + DIMS, offsets + dims[None, :], (DIMS + dims < HEAD_DIM)[None, :], PADDED)
    return v, rest


@triton.jit
def _attend(
    v, v_rest, scores, factor, v_scale, row_max, row_sum, total, rest,
    dtype: tl.constexpr, HALVES: tl.constexpr, BY_ROW: tl.constexpr = False,
):  # fmt: skip
    """One step of the online softmax in base 2: rescale the sums so far and add this tile. Some score must exceed −inf.

    Scores are still to be multiplied by `factor`, which is positive; in the exponent's subtraction this costs nothing.
    HALVES: `v_rest` and `rest` are the second half of the dims; else they are not used. BY_ROW: each row has a factor.
    v_scale: of the values; if dtype is float8_e4m3fn, that of the tile before over this one's, see `forward`.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    if BY_ROW:
        factor = factor[:, None]
    weights = tl.exp2(scores * factor - new_max[:, None])
    fade = tl.exp2(row_max - new_max)
    row_sum = row_sum * fade + tl.sum(weights, 1)
    if dtype == tl.float8e4nv:
        weights = weights * WEIGHT_ONE
        fade = fade * v_scale
    elif v_scale is not None:
        weights = weights * v_scale
    weights = cast(weights, dtype)
    total = _dot(weights, v, total * fade[:, None])
    if HALVES:
        rest = _dot(weights, v_rest, rest * fade[:, None])
    return new_max, row_sum, total, rest


@triton.jit
def _place(unit, heads, q_blocks, q_frame, order_ptr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr):
    """A unit's list row, batch, head, first token, and the token's place in its frame."""
    list_row = unit // (BLOCK_Q // TILE_Q)
    if order_ptr is not None:
        list_row = tl.load(order_ptr + list_row)
    q_block = list_row % q_blocks
    per_frame = tl.cdiv(q_frame, BLOCK_Q)
    within = (q_block % per_frame) * BLOCK_Q + (unit % (BLOCK_Q // TILE_Q)) * TILE_Q
    first = (q_block // per_frame) * q_frame + within
    head_row = list_row // q_blocks
    return list_row, head_row // heads, head_row % heads, first, within


@triton.jit
def _write(
    out_ptr, total, row_sum, batch, head, first, within, rows, heads, q_blocks, q_frame,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, RAGGED_Q: tl.constexpr,
):  # fmt: skip
    """Store output rows; the first is token `first`, number `within` of its frame."""
    dims = tl.arange(0, PADDED_DIM)
    # A query block that attends to nothing returns zeros.
    out = total / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    q_tokens = q_blocks // tl.cdiv(q_frame, BLOCK_Q) * q_frame
    row = (batch.to(tl.int64) * q_tokens + first) * heads + head
    tile = out_ptr + row * HEAD_DIM + rows[:, None] * (heads * HEAD_DIM) + dims[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    if RAGGED_Q or PADDED_DIM != HEAD_DIM:
        tl.store(tile, out, mask=(within + rows < q_frame)[:, None] & (dims < HEAD_DIM)[None, :])
    else:
        tl.store(tile, out)


# fmt: off
# Lengths, list widths and the start of a view change from chunk to chunk; unspecialised, they cost no compilation.
@triton.jit(do_not_specialize=[
    "q_blocks", "k_blocks", "width", "q_frame", "k_frame", "whole", "parts",
    "blocks_ptr", "counts_ptr", "order_ptr", "k_scales_ptr", "v_scales_ptr", "bias_ptr",
])
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, counts_ptr, order_ptr,
    k_scales_ptr, v_scales_ptr, k_means_ptr, v_means_ptr, bias_ptr, totals_ptr, maxima_ptr, sums_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    heads, q_blocks, k_blocks, width, q_frame, k_frame, whole, parts, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr,
    PAIRS: tl.constexpr, FLOAT8: tl.constexpr, NARROW: tl.constexpr,
):
    """Attention of one unit, or of one part of it.

    Units from `whole` on are cut into `parts` if totals_ptr, maxima_ptr and sums_ptr are given. With DESCRIPTORS
    k_ptr and v_ptr are tensor descriptors of [batch, head, frame, token of the frame, dim]: tokens past a frame's end
    read as zeros. With HALVES values and their sums are two tiles of half the dims: Triton splits the warps of chained
    mma.sync products over columns if a product is wider than high, and every row's maximum then crosses warps. With
    PAIRS the halves are the even and the odd dims, and k_ptr and v_ptr are int16 pointers to two 8-bit numbers, which
    take matrix loads that 8-bit values do not have.

    With NARROW int8 keys are multiplied by queries in int8, or float8_e4m3fn values by weights in float8_e4m3fn. The
    sums of the latter are in units of the last tile's scale, which is neither in the weights nor in the values.
    """
    # fmt: on
    program = tl.program_id(0)
    unit = program
    part = 0
    pieces = 1
    if totals_ptr is not None:  # noqa: SIM102 (Triton before 3.4 evaluates both sides of `and`)
        if program >= whole:
            unit = whole + (program - whole) // parts
            part = (program - whole) % parts
            pieces = parts
    list_row, batch, head, q_first, q_within = _place(unit, heads, q_blocks, q_frame, order_ptr, BLOCK_Q, TILE_Q)
    if RAGGED_Q and TILE_Q != BLOCK_Q:  # noqa: SIM102
        if q_within >= q_frame:
            return  # a tile of padding alone

    PADDED: tl.constexpr = PADDED_DIM != HEAD_DIM
    V_DIMS: tl.constexpr = PADDED_DIM // 2 if HALVES else PADDED_DIM
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    k_per_frame = tl.cdiv(k_frame, BLOCK_K)
    rows = tl.arange(0, TILE_Q)
    columns = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    dim_is_real = dims < HEAD_DIM
    V_LANES: tl.constexpr = 2 if PAIRS else 1
    INT8_SCORES: tl.constexpr = NARROW and not FLOAT8
    FLOAT8_WEIGHTS: tl.constexpr = NARROW and FLOAT8
    K_LANES: tl.constexpr = 1 if INT8_SCORES else V_LANES
    k_dims = tl.arange(0, PADDED_DIM // K_LANES)
    k_dim_is_real = (k_dims < HEAD_DIM // K_LANES)[:, None]

    # 32 bits hold any number of tokens, blocks or rows; offsets take 64.
    q_base = q_ptr + batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q_base += q_first.to(tl.int64) * q_stride_l
    q_tile = q_base + rows[:, None] * q_stride_l + dims[None, :]
    if RAGGED_Q or PADDED:
        q = tl.load(q_tile, mask=(q_within + rows < q_frame)[:, None] & dim_is_real[None, :], other=0.0)
    else:
        q = tl.load(q_tile)
    if INT8_SCORES:
        q_scale = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1) / 127, 1e-30)
        q_narrow = cast(q.to(tl.float32) / q_scale[:, None], tl.int8)
    elif PAIRS:
        q_even, q_odd = tl.split(tl.reshape(q, [TILE_Q, V_DIMS, 2]))

    if not DESCRIPTORS:
        k_base = k_ptr + batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v_base = v_ptr + batch.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
        k_offsets = columns[None, :] * k_stride_l + k_dims[:, None]
        v_offsets = columns[:, None] * v_stride_l

    end = k_blocks
    if blocks_ptr is not None:
        list_ptr = blocks_ptr + list_row.to(tl.int64) * width
        end = tl.load(counts_ptr + list_row)
    start = end * part // pieces  # parts begin and end with a block, whose first key is real
    end = end * (part + 1) // pieces
    if blocks_ptr is not None:
        next_block = tl.load(list_ptr + tl.minimum(start, width - 1))
    if k_scales_ptr is not None:
        k_scale_ptr = k_scales_ptr + batch.to(tl.int64) * k_blocks * heads + head
        v_scale_ptr = v_scales_ptr + batch.to(tl.int64) * k_blocks * heads + head
    # Weights times values: 8-bit values fit bfloat16 exactly, and its range holds any weight times a block's scale.
    WIDE: tl.constexpr = q.dtype if k_scales_ptr is None or q.dtype == tl.float32 else tl.bfloat16
    WEIGHTS: tl.constexpr = tl.float8e4nv if FLOAT8_WEIGHTS else WIDE

    BRANCHES: tl.constexpr = k_scales_ptr is None and TILE_Q <= 64

    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    total = tl.zeros([TILE_Q, V_DIMS], tl.float32)
    rest = total
    unit_scale = tl.full([], 1.0, tl.float32)
    for i in range(start * SPLIT, end * SPLIT):
        if blocks_ptr is None:
            k_block = i // SPLIT
        else:  # load the next entry while this block is computed
            k_block = next_block
            next_block = tl.load(list_ptr + tl.minimum((i + 1) // SPLIT, width - 1))
        k_within = (k_block % k_per_frame) * BLOCK_K + (i % SPLIT) * TILE_K
        if DESCRIPTORS:
            at = [batch, head, k_block // k_per_frame, k_within, 0]
            k = tl.reshape(k_ptr.load(at), [TILE_K, PADDED_DIM]).T
            v = tl.reshape(v_ptr.load(at), [TILE_K, PADDED_DIM])
            v_rest = v
        else:
            k_first = (k_block // k_per_frame).to(tl.int64) * k_frame + k_within
            if RAGGED_K:
                # Columns past the frame's end read its last token instead, which costs fewer registers than a mask.
                tokens = tl.minimum(columns, k_frame - 1 - k_within)
                k_offsets = tokens[None, :] * k_stride_l + k_dims[:, None]
                v_offsets = tokens[:, None] * v_stride_l
            k = _load(k_base + k_first * k_stride_l, k_offsets, k_dim_is_real, PADDED)
            v, v_rest = _values(
                v_base + k_first * v_stride_l, v_offsets, HEAD_DIM // V_LANES, V_DIMS, PADDED, HALVES and not PAIRS
            )
        v_scale = None
        factor = scale_log2
        if PAIRS:
            v, v_rest = _pairs(v, FLOAT8, FLOAT8_WEIGHTS)
        if INT8_SCORES:
            scores = tl.dot(q_narrow, k).to(tl.float32)
            factor *= q_scale
        elif PAIRS:
            k, k_odd = _pairs(k, FLOAT8)
            scores = _dot(q_odd, k_odd, _dot(q_even, k, None))
        else:
            scores = _dot(q, k, None)
        if k_scales_ptr is not None:
            factor *= tl.load(k_scale_ptr + k_block * heads)
            v_scale = tl.load(v_scale_ptr + k_block * heads)
            if FLOAT8_WEIGHTS:
                unit_scale, v_scale = v_scale, unit_scale / v_scale
        if RAGGED_K:  # noqa: SIM102 (one is known when it is compiled)
            # One tile of a frame is ragged. A branch around the mask in all others takes registers, if there are any.
            if not BRANCHES or k_within + TILE_K > k_frame:
                scores = tl.where((k_within + columns < k_frame)[None, :], scores, float("-inf"))
        # Every block's first tile holds a real key, so the running maximum is finite from there on.
        row_max, row_sum, total, rest = _attend(
            v, v_rest, scores, factor, v_scale, row_max, row_sum, total, rest, WEIGHTS, HALVES, INT8_SCORES
        )

    if FLOAT8_WEIGHTS:
        total, rest = total * (unit_scale / WEIGHT_ONE), rest * (unit_scale / WEIGHT_ONE)
    if PAIRS:  # from even and odd dims to all of them, and to the halves of the means
        total = tl.reshape(tl.join(total, rest), [TILE_Q, PADDED_DIM])
        total, rest = tl.split(tl.permute(tl.reshape(total, [TILE_Q, 2, V_DIMS]), [0, 2, 1]))
    if bias_ptr is not None:
        # A whole unit's maximum is finite here, or its list was empty and every mean takes part. A part may have seen
        # no key so far and meet only listed blocks.
        if totals_ptr is not None:
            row_max = tl.maximum(row_max, LOWEST)
        mean_stride = heads * HEAD_DIM
        mean_base = (batch.to(tl.int64) * k_blocks * heads + head) * HEAD_DIM
        tiles = tl.cdiv(k_blocks, TILE_K)
        for tile in tl.range(tiles * part // pieces, tiles * (part + 1) // pieces, num_stages=2):
            first = tile * TILE_K
            ids = tl.minimum(first + columns, k_blocks - 1)
            k = _load(k_means_ptr + mean_base, ids[None, :] * mean_stride + dims[:, None], dim_is_real[:, None], PADDED)
            v, v_rest = _values(
                v_means_ptr + mean_base, ids[:, None] * mean_stride, HEAD_DIM, V_DIMS, PADDED, HALVES
            )
            bias = tl.load(bias_ptr + list_row.to(tl.int64) * k_blocks + ids)
            bias = tl.where(first + columns < k_blocks, bias, float("-inf"))
            scores = _dot(q, k, None) * scale_log2 + bias[None, :]
            row_max, row_sum, total, rest = _attend(
                v, v_rest, scores, 1.0, None, row_max, row_sum, total, rest, v.dtype, HALVES
            )

    if HALVES:
        total = tl.reshape(tl.permute(tl.join(total, rest), 0, 2, 1), [TILE_Q, PADDED_DIM])
    if totals_ptr is not None:  # noqa: SIM102
        if program >= whole:
            at = (program - whole).to(tl.int64) * TILE_Q + rows
            tl.store(maxima_ptr + at, row_max)
            tl.store(sums_ptr + at, row_sum)
            tl.store(totals_ptr + at[:, None] * PADDED_DIM + dims[None, :], total)
            return
    _write(
        out_ptr, total, row_sum, batch, head, q_first, q_within, rows, heads, q_blocks, q_frame,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, RAGGED_Q,
    )  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=["q_blocks", "q_frame", "whole", "parts", "order_ptr"])
def combine(
    out_ptr, order_ptr, totals_ptr, maxima_ptr, sums_ptr, heads, q_blocks, q_frame, whole, parts,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
    ROWS: tl.constexpr, RAGGED_Q: tl.constexpr,
):
    """ROWS rows of a cut unit: the softmax over its parts, always added in one order."""
    # fmt: on
    cut = tl.program_id(0) // (TILE_Q // ROWS)
    _, batch, head, q_first, q_within = _place(whole + cut, heads, q_blocks, q_frame, order_ptr, BLOCK_Q, TILE_Q)
    if RAGGED_Q and TILE_Q != BLOCK_Q:  # noqa: SIM102
        if q_within >= q_frame:
            return  # its parts stored nothing
    rows = (tl.program_id(0) % (TILE_Q // ROWS)) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    at = cut.to(tl.int64) * parts * TILE_Q + rows
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(parts):
        row_max = tl.maximum(row_max, tl.load(maxima_ptr + at + part * TILE_Q))
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # no part found a key: all sums are 0
    row_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for part in range(parts):
        here = at + part * TILE_Q
        share = tl.exp2(tl.load(maxima_ptr + here) - row_max)
        row_sum += share * tl.load(sums_ptr + here)
        total += share[:, None] * tl.load(totals_ptr + here[:, None] * PADDED_DIM + dims[None, :])
    _write(
        out_ptr, total, row_sum, batch, head, q_first, q_within, rows, heads, q_blocks, q_frame,
        HEAD_DIM, PADDED_DIM, BLOCK_Q, RAGGED_Q,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k_blocks", "width", "blocks_ptr", "counts_ptr"])
def tail_bias(
    bias_ptr, blocks_ptr, counts_ptr, used_ptr, k_blocks, width, tokens_per_frame,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row of the tail's bias: log2 of a block's real tokens, −inf if it is listed or not in use."""
    row = tl.program_id(0).to(tl.int64)
    bias_row = bias_ptr + row * k_blocks
    per_frame = tl.cdiv(tokens_per_frame, BLOCK_K)
    used = k_blocks
    if used_ptr is not None:
        used = tl.load(used_ptr)
    for first in range(0, k_blocks, TILE):
        ids = first + tl.arange(0, TILE)
        tokens = tl.minimum(tokens_per_frame - (ids % per_frame) * BLOCK_K, BLOCK_K)
        bias = tl.where(ids < used, tl.log2(tokens.to(tl.float32)), float("-inf"))
        tl.store(bias_row + ids, bias, mask=ids < k_blocks)
    tl.debug_barrier()  # the next stores overwrite values that other threads of this program stored
    count = tl.load(counts_ptr + row)
    for first in range(0, count, TILE):
        entries = first + tl.arange(0, TILE)
        ids = tl.load(blocks_ptr + row * width + entries, mask=entries < count, other=0)
        tl.store(bias_row + ids, tl.full([TILE], float("-inf"), tl.float32), mask=entries < count)
