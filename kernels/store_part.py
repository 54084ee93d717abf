"""The device code of the fused store: what one program does to one block of tokens of q, k or v."""

import triton
import triton.language as tl

from .rounding import cast


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
    """Each pair of channels (2i, 2i + 1) of x [BLOCK, HEAD_DIM] turned by the angles of cos, sin [BLOCK, D/2]."""
    first, second = tl.split(tl.reshape(x, [BLOCK, HEAD_DIM // 2, 2]))
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(turned, [BLOCK, HEAD_DIM])


@triton.jit
def write_part(
    program,
    x_ptr,
    stride_b,
    stride_l,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    slots_ptr,
    out_ptr,
    scales_ptr,
    means_ptr,
    frame_means_ptr,
    arrivals_ptr,
    sub_means_ptr,
    heads,
    heads_per_program,
    frames,
    out_frames,
    tokens_per_frame,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SUB_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program's share of q, k or v; the pointers of what a part does not have are None."""
    groups = tl.cdiv(heads, heads_per_program)
    per_frame = tl.cdiv(tokens_per_frame, BLOCK)
    group = program % groups  # neighbours share their rows
    block = program // groups % per_frame
    frame = program // groups // per_frame % frames
    batch = (program // groups // per_frame // frames).to(tl.int64)
    within = block * BLOCK
    out_frame = batch * out_frames + (frame if slots_ptr is None else tl.load(slots_ptr + frame))
    out_block = out_frame * per_frame + block
    length = tl.minimum(BLOCK, tokens_per_frame - within)

    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    row_is_real = rows < length
    token = frame.to(tl.int64) * tokens_per_frame + within
    tile = x_ptr + batch * stride_b + token * stride_l + rows[:, None] * stride_l + dims[None, :]
    out_row = (out_frame * tokens_per_frame + within) * heads
    out_tile = out_ptr + out_row * HEAD_DIM + rows[:, None] * (heads * HEAD_DIM) + dims[None, :]

    if weight_ptr is not None:
        inverse_rms = _inverse_rms(tile, heads, row_is_real, eps, HEAD_DIM, BLOCK, STAGES)
        pairs = rows[:, None] * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None, :]
        pairs += token.to(tl.int32) * (HEAD_DIM // 2)
        cos = tl.load(cos_ptr + pairs, mask=row_is_real[:, None], other=0.0)
        sin = tl.load(sin_ptr + pairs, mask=row_is_real[:, None], other=0.0)

    first_head = group * heads_per_program
    last_head = tl.minimum(first_head + heads_per_program, heads)
    compute: tl.constexpr = x_ptr.dtype.element_ty
    for head in tl.range(first_head, last_head, num_stages=STAGES):
        x = tl.load(tile + head * HEAD_DIM, mask=row_is_real[:, None], other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + head * HEAD_DIM + dims).to(tl.float32)
            x = x.to(tl.float32) * inverse_rms[:, None] * weight[None, :]
            x = cast(x, compute, INTERPRETED).to(tl.float32)
            x = cast(_rotate(x, cos, sin, HEAD_DIM, BLOCK), compute, INTERPRETED)
        if sub_means_ptr is not None:
            size: tl.constexpr = BLOCK // SUB_BLOCKS
            total = tl.zeros([HEAD_DIM], tl.float32)
            for part in tl.static_range(SUB_BLOCKS):
                partial = tl.sum(tl.where((rows // size == part)[:, None], x.to(tl.float32), 0.0), 0)
                total += partial
                count = tl.minimum(length - part * size, size)
                if count > 0:
                    sub = out_frame * tl.cdiv(tokens_per_frame, size) + block * SUB_BLOCKS + part
                    mean = tl.div_rn(partial, count.to(tl.float32))
                    place = sub_means_ptr + (sub * heads + head) * HEAD_DIM + dims
                    tl.store(place, cast(mean, compute, INTERPRETED))
        elif means_ptr is not None:
            total = tl.sum(x.to(tl.float32), 0)
        if means_ptr is not None:
            mean = tl.div_rn(total, length.to(tl.float32))
            tl.store(means_ptr + (out_block * heads + head) * HEAD_DIM + dims, cast(mean, compute, INTERPRETED))
        if scales_ptr is not None:
            wide = x.to(tl.float32)
            scale = tl.div_rn(tl.max(tl.max(tl.abs(wide), 1), 0), LARGEST * 1.0)
            scale = tl.where(scale == 0.0, 1.0, scale)
            tl.store(scales_ptr + out_block * heads + head, scale)
            x = tl.clamp(tl.div_rn(wide, scale), -LARGEST * 1.0, LARGEST * 1.0)
            x = cast(x, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_tile + head * HEAD_DIM, x, mask=row_is_real[:, None])

    if frame_means_ptr is not None:
        # Whoever finishes a frame's last block pools the frame, always in the order of its blocks: no result
        # depends on who that is. The barrier puts all threads' means before the release of the count.
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
                        cache_modifier=".cg",  # other programs wrote them, and only L2 has seen that
                    )
                    lengths = tl.minimum(BLOCK, tokens_per_frame - blocks * BLOCK).to(tl.float32)
                    shares = tl.div_rn(lengths, tl.zeros([32], tl.float32) + tokens_per_frame)
                    total += tl.sum(means.to(tl.float32) * shares[:, None], 0)
                place = frame_means_ptr + (out_frame * heads + head) * HEAD_DIM + dims
                tl.store(place, cast(total, compute, INTERPRETED))
