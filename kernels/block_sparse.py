"""Block-sparse attention in Triton: query blocks read the key blocks in a list.

One program owns up to 128 rows of one query block of one head and walks the block's list with an online softmax, as
FlashAttention does (arXiv 2205.14135, 2307.08691). Blocks are aligned to frames: block `b` of a side with `n` blocks
per frame starts at token `(b // n) · tokens_per_frame + (b % n) · block`, and a frame's last block may be ragged.

Variants of the same kernel: without a list every block is read (dense); keys and values may be int8 or fp8 with one
scale per block and head, converted tile by tile in registers; with a pooled tail every block that is not in the list
enters the softmax as its mean. Programs of one head are neighbours in the grid and share its blocks in L2.

How it is launched is chosen by measurement, see `tuning`: the tiles, the pipeline, whether key and value tiles come
through tensor descriptors (TMA, from sm_90 on), and whether the last wave's units are cut into parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import bound, device, tuning
from .attend import combine, forward, tail_bias
from .device import INTERPRETED
from .tuning import Kind, Launch

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 128
LOG2_E = 1.4426950408889634
COMBINED_ROWS = 16  # of a unit that was cut, per program that adds up its parts

TOLERANCE = 1e-2  # between the results of two launches in 16 bits
FULL_LIST = 64  # blocks that a query block reads of 21 frames at 480×832 and a sparsity of 88 %


class Work(NamedTuple):
    """The tensors of one call of the kernel, as in `block_sparse_attention`.

    lists: blocks and counts, None for dense. order: int32, rows of the lists in the order in which they start.
    tail: the means of k and v and the bias of their scores.
    """

    kind: Kind
    tokens_per_frame: int
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lists: tuple[Tensor, Tensor] | None = None
    order: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None
    tail: tuple[Tensor, Tensor, Tensor] | None = None


def why_not(q: Tensor, block: tuple[int, int], stored: torch.dtype | None = None) -> str | None:
    """Why this kernel cannot run on q [B, L, H, D] with these block sizes, or None.

    stored: the dtype of keys and values if it is not q's.
    """
    if stored not in (None, q.dtype, *EIGHT_BIT):
        return f"the Triton kernel reads keys and values in q's dtype, int8 or float8_e4m3fn, not {stored}"
    if not set(block) <= set(BLOCK_SIZES):
        return f"the Triton kernel takes blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the Triton kernel takes head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]}"
    return device.why_not("the attention kernel", q, float8=stored == torch.float8_e4m3fn)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    counts: Tensor | None,
    *,
    tokens_per_frame: int,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    tail: tuple[Tensor, Tensor] | None = None,
    uneven: bool = False,
    used: Tensor | None = None,
    machine: Any = None,
) -> Tensor:
    """Attention of every query block over its listed key blocks only, or over all.

    q [B, Lq, H, D], k, v [B, Lk, H, D]: whole frames, any strides if D is contiguous.
    blocks, counts: int32 [B, H, q_blocks, width] and, how many entries of each row are read, [B, H, q_blocks]; with
    both None every query attends to all keys.
    scale, scales, tail: as in `sparse_attention` of the core.
    uneven: counts differ; the longest lists then start first, which costs a sort of the counts.
    used: int32 [1], the key blocks that exist, the first of k's; None for all. Means of the others must be finite.
    machine: the core's module, which chooses launches by measurement; without it the defaults run.

    Returns a contiguous [B, Lq, H, D] in q's dtype. A query block with an empty list and no tail gives zeros. Nothing
    waits on the device, except if launches are measured.

    The caller has asked `why_not`. Raises ValueError if a shape or dtype is off.
    """
    lists = order = None
    if blocks is not None and counts is not None:
        batch, q_tokens, heads, _ = q.shape
        q_blocks = q_tokens // tokens_per_frame * bound.cdiv(tokens_per_frame, block_q)
        device.require("counts", counts, (batch, heads, q_blocks), torch.int32, q.device)
        device.require("blocks", blocks, (batch, heads, q_blocks, blocks.shape[-1]), torch.int32, q.device)
        order = counts.flatten().argsort(descending=True, stable=True).to(torch.int32) if uneven else None
        lists = blocks.contiguous(), counts.contiguous()
    tail = tail if lists else None  # dense skips no block
    k_blocks = k.shape[1] // tokens_per_frame * bound.cdiv(tokens_per_frame, block_k)
    if (scales is not None) != (k.dtype in EIGHT_BIT) or v.dtype != k.dtype:
        raise ValueError(f"k is {k.dtype}, v is {v.dtype} and scales are {'given' if scales else 'missing'}")
    for x in scales or ():
        device.require("scales", x, (k.shape[0], k_blocks, k.shape[2]), torch.float32, q.device)
    for x in tail or ():
        device.require("tail", x, (k.shape[0], k_blocks, *k.shape[2:]), q.dtype, q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    ragged = tokens_per_frame % block_q != 0, tokens_per_frame % block_k != 0
    kind = Kind(block_q, block_k, q.shape[-1], q.dtype, k.dtype, ragged, tail is not None, lists is None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # the kernel takes a row's maximum before it scales
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    scales = scales and (scales[0].contiguous(), scales[1].contiguous())
    tail_and_bias = None
    if tail and lists:
        bias = torch.empty(*lists[1].shape, k_blocks, dtype=torch.float32, device=q.device)
        lengths = k_blocks, lists[0].shape[-1], tokens_per_frame
        bound.launch(tail_bias, (lists[1].numel(),), bias, *lists, used, *lengths, BLOCK_K=block_k, TILE=128)
        tail_and_bias = tail[0].contiguous(), tail[1].contiguous(), bias
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    work = Work(kind, tokens_per_frame, scale, q, k, v, out, lists, order, scales, tail_and_bias)

    def run(launch: Launch, work: Work = work) -> Tensor:
        for kernel, grid, arguments, constants in prepared(work, launch, device.multiprocessors(q.device)):
            bound.launch(kernel, grid, *arguments, **constants)
        return work.out

    def result(launch: Launch) -> Tensor:
        return run(launch, work._replace(out=torch.empty_like(out), lists=lists and _lengthened(*lists)))

    return run(_launch_for(kind, q, result, machine))


def prepared(
    work: Work, launch: Launch, multiprocessors: int
) -> list[tuple[Any, tuple[int], list[Any], dict[str, Any]]]:
    """Kernel, grid, arguments and constants of each launch, with buffers for parts."""
    kind, q, k = work.kind, work.q, work.k
    batch, q_tokens, heads, head_dim = q.shape
    # Without lists frames matter only to scales: queries, and keys without scales, are one long frame.
    q_frame = q_tokens if kind.dense else work.tokens_per_frame
    k_frame = k.shape[1] if kind.dense and work.scales is None else work.tokens_per_frame
    q_blocks = q_tokens // q_frame * bound.cdiv(q_frame, kind.block_q)
    k_blocks = k.shape[1] // k_frame * bound.cdiv(k_frame, kind.block_k)
    width = work.lists[0].shape[-1] if work.lists else 0
    units = batch * heads * q_blocks * (kind.block_q // launch.tile_q)
    whole, parts = tuning.cut(units, launch.per_sm * multiprocessors, width or k_blocks)
    programs, padded = whole + (units - whole) * parts, tuning.padded(head_dim)
    buffers: list[Tensor | None] = [None, None, None]
    if parts > 1:
        rows = (programs - whole) * launch.tile_q
        buffers = [q.new_empty(rows, *dims, dtype=torch.float32) for dims in ((padded,), (), ())]

    keys = [k, work.v]
    described = launch.descriptors and all(map(_describable, keys))
    halves, pairs = launch.halves and padded >= 32 and not described, False
    if k.dtype in EIGHT_BIT and halves:
        halves = pairs = q.dtype == torch.bfloat16 and all(map(_paired, keys))
    if pairs:
        int8_scores = launch.narrow and k.dtype == torch.int8
        keys = [k if int8_scores else k.view(torch.int16), work.v.view(torch.int16)]
    strides = [stride for x in keys for stride in x.stride()[:3]]
    if described:
        keys = [_described(x, k_frame, launch.tile_k, padded) for x in keys]
    arguments = [q, *keys, work.out, *(work.lists or (None, None)), work.order]
    arguments += [*(work.scales or (None, None)), *(work.tail or (None, None, None)), *buffers]
    arguments += [*q.stride()[:3], *strides, heads, q_blocks, k_blocks]
    arguments += [width, q_frame, k_frame, whole, parts, work.scale * LOG2_E]
    common = {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "BLOCK_Q": kind.block_q, "TILE_Q": launch.tile_q}
    common["RAGGED_Q"] = kind.ragged[0]
    constants = {
        "BLOCK_K": kind.block_k,
        "TILE_K": launch.tile_k,
        "RAGGED_K": kind.ragged[1],
        "DESCRIPTORS": described,
        "HALVES": halves,
        "PAIRS": pairs,
        "FLOAT8": kind.stored == torch.float8_e4m3fn,
        "NARROW": launch.narrow,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    launches = [(forward, (programs,), arguments, common | constants)]
    if parts > 1:
        groups = (units - whole) * (launch.tile_q // COMBINED_ROWS)
        rest = [work.out, work.order, *buffers, heads, q_blocks, q_frame, whole, parts]
        launches.append((combine, (groups,), rest, common | {"ROWS": COMBINED_ROWS, "num_warps": 4}))
    return launches


def _lengthened(blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Lists that repeat their blocks up to the length of a full window's; the result stays the same."""
    width = blocks.shape[-1]
    times = triton.cdiv(FULL_LIST, max(width, 1))
    entries = torch.arange(width * times, device=blocks.device) % counts.clamp(min=1)[..., None]
    return blocks.gather(-1, entries), counts * times


def _paired(x: Tensor) -> bool:
    """Whether 8-bit x can be read as pairs."""
    return all(number % 2 == 0 for number in (x.storage_offset(), x.shape[-1], *x.stride()[:-1]))


def _describable(x: Tensor) -> bool:
    """Whether TMA can address x: its start and its steps are whole 16 bytes."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return all(step % 16 == 0 for step in steps) and min(x.stride()) > 0


def _described(x: Tensor, frame: int, rows: int, columns: int) -> Any:
    """A descriptor of x [B, L, H, D] as [batch, head, frame, token of the frame, dim], read in tiles [rows, columns].

    Frames are a dimension of their own, so that tokens past a frame's end read as zeros and not as the next frame.
    """
    batch, tokens, heads, dim = x.shape
    by_batch, by_token, by_head, _ = x.stride()
    shape, strides = [batch, heads, tokens // frame, frame, dim], [by_batch, by_head, frame * by_token, by_token, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, rows, columns])


def capability_of(x: Tensor) -> tuple[int, int]:
    """The compute capability of a tensor's GPU; for the interpreter that of a Hopper."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _launch_for(kind: Kind, q: Tensor, result: Callable[[Launch], Tensor], machine: Any) -> Launch:
    """Launch parameters: chosen on a GPU by measurement, given enough work to time, else the defaults."""
    capability = capability_of(q)
    best = tuning.default_launch(kind, capability)
    if INTERPRETED or not q.is_cuda or machine is None or machine.is_off():
        return best
    found: Launch | None = machine.settled.get((kind, q.device))
    if found is not None:
        return found
    units = q.shape[0] * q.shape[2] * bound.cdiv(q.shape[1], best.tile_q)
    if units < device.multiprocessors(q.device):
        return best
    captures = torch.cuda.is_current_stream_capturing()
    descriptors = TensorDescriptor is not None and capability[0] not in tuning.MMA_SYNC
    tolerance = TOLERANCE * {torch.int8: 2, torch.float8_e4m3fn: 4}.get(kind.stored, 1)
    for number, changes in enumerate(tuning.rounds(kind, capability, descriptors=descriptors)):
        launches = {str(launch): launch for launch in (best, *(best._replace(**change) for change in changes))}

        def by(name: str, launches: dict[str, Launch] = launches) -> Tensor:
            return result(launches[name])

        facts = {"incumbent": str(best), "tolerance": tolerance}
        best = launches[
            machine.choose(tuning.WORK, (number, kind), q.device, launches, None if captures else by, **facts)
        ]
    if not (captures or machine.is_trying()):
        machine.settled[kind, q.device] = best
    return best
