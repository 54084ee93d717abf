"""Block-sparse attention in Triton: each query block reads only the key blocks in its list.

One program owns one query block of one head and walks its list with an online softmax, as FlashAttention does
(arXiv 2205.14135, 2307.08691). Blocks are aligned to frames: block `b` of a side with `n` blocks per frame starts
at token `(b // n) · tokens_per_frame + (b % n) · block`, and the last block of a frame may be ragged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")  # float32 inputs keep their precision on tensor cores


# Lengths and the list's width change from chunk to chunk; unspecialised, they cost no new compilation.
@triton.jit(do_not_specialize=["q_blocks", "width"])
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    blocks_ptr,
    counts_ptr,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    out_stride_b,
    out_stride_l,
    out_stride_h,
    heads,
    q_blocks,
    width,
    tokens_per_frame,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    q_block = tl.program_id(0)
    head_row = tl.program_id(1)
    batch = (head_row // heads).to(tl.int64)
    head = (head_row % heads).to(tl.int64)

    q_per_frame = tl.cdiv(tokens_per_frame, BLOCK_Q)
    k_per_frame = tl.cdiv(tokens_per_frame, BLOCK_K)
    q_within = (q_block % q_per_frame) * BLOCK_Q
    q_first = (q_block // q_per_frame).to(tl.int64) * tokens_per_frame + q_within

    rows = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    dims = tl.arange(0, PADDED_DIM)
    dim_is_real = dims < HEAD_DIM
    row_is_real = q_within + rows < tokens_per_frame

    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + q_first * q_stride_l
    q_tile = q_base + rows[:, None] * q_stride_l + dims[None, :]
    if RAGGED_Q or PADDED_DIM != HEAD_DIM:
        q = tl.load(q_tile, mask=row_is_real[:, None] & dim_is_real[None, :], other=0.0)
    else:
        q = tl.load(q_tile)

    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    k_offsets = columns[None, :] * k_stride_l + dims[:, None]
    v_offsets = columns[:, None] * v_stride_l + dims[None, :]

    list_row = head_row.to(tl.int64) * q_blocks + q_block
    list_ptr = blocks_ptr + list_row * width
    count = tl.load(counts_ptr + list_row)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    for i in range(count):
        k_block = tl.load(list_ptr + i)
        k_within = (k_block % k_per_frame) * BLOCK_K
        k_first = (k_block // k_per_frame).to(tl.int64) * tokens_per_frame + k_within
        column_is_real = k_within + columns < tokens_per_frame
        k_tile = k_base + k_first * k_stride_l + k_offsets
        v_tile = v_base + k_first * v_stride_l + v_offsets
        if RAGGED_K or PADDED_DIM != HEAD_DIM:
            k = tl.load(k_tile, mask=column_is_real[None, :] & dim_is_real[:, None], other=0.0)
            v = tl.load(v_tile, mask=column_is_real[:, None] & dim_is_real[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = _dot(q, k, None, UPCAST) * scale_log2
        if RAGGED_K:
            scores = tl.where(column_is_real[None, :], scores, float("-inf"))
        # Every block holds at least one real key, so the running maximum is finite from the first block on.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        fade = tl.exp2(row_max - new_max)
        row_sum = row_sum * fade + tl.sum(weights, 1)
        total = _dot(weights.to(v.dtype), v, total * fade[:, None], UPCAST)
        row_max = new_max

    # A query block with an empty list attends to nothing and returns zeros.
    out = total / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_base = out_ptr + batch * out_stride_b + head * out_stride_h + q_first * out_stride_l
    out_tile = out_base + rows[:, None] * out_stride_l + dims[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    if RAGGED_Q or PADDED_DIM != HEAD_DIM:
        tl.store(out_tile, out, mask=row_is_real[:, None] & dim_is_real[None, :])
    else:
        tl.store(out_tile, out)


# Whether TRITON_INTERPRET was set when this module was imported: then the kernel runs on any device, slowly.
INTERPRETED = not isinstance(_forward, triton.JITFunction)


def launch_options(block_q: int, block_k: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Warps and pipeline stages for one tile shape; `itemsize` is bytes per element.

    128 query rows need 8 warps to stay in registers. Stages are what fits beside the query tile in the 99 KB of
    shared memory that the smallest supported chips (sm_86, sm_89, sm_120) give one program.
    """
    dim = max(16, triton.next_power_of_2(head_dim))
    q_bytes = block_q * dim * itemsize
    stage_bytes = 2 * block_k * dim * itemsize
    stages = max(1, min(3, (96 * 1024 - q_bytes) // stage_bytes))
    return {"num_warps": 8 if block_q >= 128 else 4, "num_stages": stages}


def why_not(q: Tensor, block: tuple[int, int]) -> str | None:
    """The reason why this kernel cannot run on q [B, L, H, D] with (query, key) blocks of `block` tokens, or None."""
    if q.dtype not in DTYPES:
        return f"the Triton kernel takes bfloat16, float16 or float32, not {q.dtype}"
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
    if q.dtype == torch.float32 and max(block) * q.shape[-1] > 64 * 128:
        return f"float32 blocks of {max(block)} tokens overflow a GPU's shared memory; use blocks of 64 or bfloat16"
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
) -> Tensor:
    """Attention of every query block over its listed key blocks only.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D], whole frames, any strides as long as D is contiguous. blocks: int32
    [B, H, q_blocks, width], of which the first `counts` (int32 [B, H, q_blocks]) entries of each row are read.
    `scale` multiplies the scores, 1/√D when None. Returns a contiguous [B, Lq, H, D] in q's dtype; a query block
    with an empty list gives zeros. Nothing waits on the device.

    Raises ValueError when `why_not` gives a reason or a shape, dtype or stride is off.
    """
    if reason := why_not(q, (block_q, block_k)):
        raise ValueError(reason)
    batch, q_tokens, heads, head_dim = q.shape
    q_blocks = q_tokens // tokens_per_frame * triton.cdiv(tokens_per_frame, block_q)
    if counts.shape != (batch, heads, q_blocks) or blocks.shape[:3] != counts.shape:
        raise ValueError(
            f"blocks {tuple(blocks.shape)} and counts {tuple(counts.shape)} do not describe "
            f"{(batch, heads, q_blocks)} = (batch, heads, query blocks)"
        )
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"blocks and counts must be int32, not {blocks.dtype} and {counts.dtype}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks, counts = blocks.contiguous(), counts.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = head_dim**-0.5 if scale is None else scale

    # Triton launches on the current device, which need not be q's; the interpreter also takes CPU tensors.
    with torch.cuda.device(q.device if q.is_cuda else -1):
        _forward[(q_blocks, batch * heads)](
            q,
            k,
            v,
            out,
            blocks,
            counts,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            heads,
            q_blocks,
            blocks.shape[-1],
            tokens_per_frame,
            scale * 1.4426950408889634,  # exp(x) = exp2(x · log2 e)
            HEAD_DIM=head_dim,
            PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            RAGGED_Q=tokens_per_frame % block_q != 0,
            RAGGED_K=tokens_per_frame % block_k != 0,
            UPCAST=INTERPRETED and q.dtype == torch.bfloat16,  # its tl.dot multiplies the raw bits of bfloat16
            **launch_options(block_q, block_k, head_dim, q.element_size()),
        )
    return out
