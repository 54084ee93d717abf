"""The front door for block-sparse attention: picks a backend, says why, and runs it.

Backends, in the order in which `auto` falls through:

- `triton`: our kernel; NVIDIA GPUs from sm_80 on (or the Triton interpreter, only when named).
- `flex`: `torch.nn.attention.flex_attention`, compiled; any GPU with Triton, x86 CPUs with a C++ compiler.
- `reference`: plain PyTorch, everywhere, computed in float32 or wider. The truth that the others are tested against.

On CPU `auto` gives small problems to the reference, because compiling flex takes seconds (`FLEX_MIN_SCORES`).
"""

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import FrameBlocks, block_pair
from .selection import BlockSelection, check_frame_budget

BACKENDS = ("triton", "flex", "reference")

# Query-key pairs, B · H · Lq · Lk, from which on a CPU a compiled flex pays for its compilation. Measured on two
# busy cores at 12 % density: compiling takes 4 to 20 s once; at this size the reference took 0.6 s per call, flex
# 0.2 s, so the compiler is paid back after some ten to fifty calls, less than one clip.
FLEX_MIN_SCORES = 1 << 24

# Elements that the reference may gather at once.
REFERENCE_CHUNK = 1 << 24

_log = logging.getLogger(__name__)
_announced: set[str] = set()
_failures: dict[tuple[str, str, torch.dtype], str] = {}


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run here; the message says why or what to install."""


class BackendChoice(NamedTuple):
    """The backend that will run, and one sentence of why."""

    name: str
    reason: str


@dataclass(frozen=True)
class AttentionOptions:
    """How sparse attention is done during a rollout.

    backend: "auto" or one of BACKENDS. block: (query, key) tokens per block, powers of two from 16 on.
    keep_frames, sink_frames, near_frames: the past latent frames that stay eligible for selection, and how many of
    them are the first and the nearest ones. Raises ValueError with the way out for anything else.
    """

    backend: str = "auto"
    block: tuple[int, int] = (64, 64)
    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2

    def __post_init__(self) -> None:
        _check_backend(self.backend)
        _check_block(self.block)
        check_frame_budget(self.keep_frames, self.sink_frames, self.near_frames)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    selection: BlockSelection | None = None,
    tokens_per_frame: int,
    block: tuple[int, int] = (64, 64),
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Softmax attention in which every query block reads only its own key blocks.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D], in whole frames of `tokens_per_frame` tokens; k and v may be slices of a
    larger cache. Exactly one of `mask`, bool [B, H, q_blocks, k_blocks], and `selection`, its compact list form.
    `block` is (query, key) tokens per block; blocks are aligned to frames, see `FrameBlocks`. `scale` multiplies
    the scores, 1/√D when None. Returns [B, Lq, H, D] in q's dtype. A query block with no key block gives zeros.

    With backend "auto" the best backend that can run is taken, and a backend that fails while it compiles or runs
    is replaced by the next one with a warning. Raises ValueError for input that does not fit together and
    BackendUnavailable when a named backend cannot run. Block ids in `selection` are not checked: that would
    wait on the device.
    """
    _check_backend(backend)
    _check_block(block)
    q_layout, k_layout = FrameBlocks(tokens_per_frame, block[0]), FrameBlocks(tokens_per_frame, block[1])
    _check_inputs(q, k, v)
    q_frames, k_frames = q_layout.frames(q.shape[1]), k_layout.frames(k.shape[1])
    rows = (q.shape[0], q.shape[2], q_frames * q_layout.per_frame)
    selection = _checked_selection(mask, selection, rows, k_frames * k_layout.per_frame, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if backend != "auto":
        choice = choose_backend(q, k, v, block=block, backend=backend)
        return _RUN[choice.name](q, k, v, selection, q_layout, k_layout, scale)
    while True:
        choice = choose_backend(q, k, v, block=block)
        _announce(choice)
        try:
            return _RUN[choice.name](q, k, v, selection, q_layout, k_layout, scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if choice.name == BACKENDS[-1]:
                raise
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            reason = f"{choice.name} failed on {q.device.type} in {q.dtype}: {type(error).__name__}: {first_line}"
            _failures[choice.name, q.device.type, q.dtype] = reason
            _log.warning("[Light Forcing] attention: %s; trying the next backend", reason)


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor | None = None, *, block: tuple[int, int] = (64, 64), backend: str = "auto"
) -> BackendChoice:
    """The backend that `sparse_attention` takes for these tensors, with one sentence of why.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D]; only shapes, dtypes and devices are looked at. Raises ValueError for an
    unknown backend and BackendUnavailable for a named one that cannot run.
    """
    _check_backend(backend)
    tensors = [x for x in (q, k, v) if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if backend != "auto":
        if reason := _WHY_NOT[backend](q, block, needs_grad):
            raise BackendUnavailable(f"attention backend {backend!r} cannot run: {reason}")
        return BackendChoice(backend, f"{backend} was asked for")
    declined: list[str] = []
    for name in BACKENDS:
        reason = _failures.get((name, q.device.type, q.dtype)) or _WHY_NOT[name](q, block, needs_grad)
        if reason is None and name == "triton" and q.device.type != "cuda":
            reason = "Triton's interpreter is only for tests and must be named"
        if reason is None and name == "flex" and q.device.type == "cpu":
            reason = _too_small_to_compile(q, k)
        if reason is None:
            return BackendChoice(name, "; ".join(declined) or f"{name} is the fastest here and can run")
        declined.append(reason)
    raise AssertionError("the reference backend runs everywhere")


def _announce(choice: BackendChoice) -> None:
    """Log a choice of `auto` once per sentence."""
    line = f"[Light Forcing] attention: {choice.name} ({choice.reason})"
    if line not in _announced:
        _announced.add(line)
        _log.info("%s", line)


# ---------------------------------------------------------------------------------------------- can it run here?


@functools.cache
def _triton_kernel() -> ModuleType | str:
    """Our Triton kernel module, or the reason why it cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install triton` (Linux) or `pip install triton-windows`"
    try:
        from ..kernels import block_sparse
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a triton that is broken or too old
        return f"triton is installed but does not import ({type(error).__name__}: {error}); reinstall it"
    return block_sparse


@functools.cache
def _cpp_compiler() -> str | None:
    """A C++ compiler that torch.compile can call, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if (found := shutil.which(name or ""))), None
    )


def _why_not_triton(q: Tensor, block: tuple[int, int], needs_grad: bool) -> str | None:
    kernel = _triton_kernel()
    if isinstance(kernel, str):
        return kernel
    if needs_grad:
        return "the Triton kernel has no backward pass; run under torch.no_grad()"
    return kernel.why_not(q, block)


def _why_not_flex(q: Tensor, block: tuple[int, int], needs_grad: bool) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"flex_attention takes bfloat16, float16 or float32, not {q.dtype}"
    if needs_grad:
        return "flex is set up for inference; run under torch.no_grad()"
    if q.device.type == "cpu":
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return "flex_attention on CPU needs an x86 CPU with AVX2"
        if _cpp_compiler() is None:
            return "flex_attention on CPU needs a C++ compiler; install g++ or clang++, or set CXX"
        return None
    if q.device.type not in ("cuda", "xpu"):
        return f"flex_attention is not used on {q.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "flex_attention on a GPU is compiled by triton, which is not installed"
    if q.shape[-1] < 16:
        return f"flex_attention on a GPU needs a head dim of 16 or more, not {q.shape[-1]}"
    return None


def _why_not_reference(q: Tensor, block: tuple[int, int], needs_grad: bool) -> str | None:
    return None


def _too_small_to_compile(q: Tensor, k: Tensor) -> str | None:
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if scores >= FLEX_MIN_SCORES:
        return None
    return f"{scores:,} query-key pairs on CPU are fewer than {FLEX_MIN_SCORES:,}, too few to wait for a compiler"


# -------------------------------------------------------------------------------------------------- the backends


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    q_layout: FrameBlocks,
    k_layout: FrameBlocks,
    scale: float,
) -> Tensor:
    kernel = _triton_kernel()
    assert isinstance(kernel, ModuleType)
    return kernel.block_sparse_attention(
        q,
        k,
        v,
        *selection,
        tokens_per_frame=q_layout.tokens_per_frame,
        block_q=q_layout.block,
        block_k=k_layout.block,
        scale=scale,
    )


def _run_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    q_layout: FrameBlocks,
    k_layout: FrameBlocks,
    scale: float,
) -> Tensor:
    """Frames are padded to whole blocks; only a frame's ragged last key block is masked token by token."""
    from torch.nn.attention.flex_attention import BlockMask

    dtype = q.dtype
    if q.device.type == "cpu" and widens_on_cpu(dtype):
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = q_layout.pad(q), k_layout.pad(k), k_layout.pad(v)
    k_blocks = k.shape[1] // k_layout.block
    whole, ragged = _split_ragged(selection, k_layout, k_blocks)
    block_mask = BlockMask.from_kv_blocks(
        ragged.counts,
        ragged.blocks,
        whole.counts,
        whole.blocks,
        BLOCK_SIZE=(q_layout.block, k_layout.block),
        mask_mod=_inside_frame(k_layout.tokens_per_frame, k_layout.padded_tokens_per_frame),
        seq_lengths=(q.shape[1], k.shape[1]),
        compute_q_blocks=False,
    )
    tiles = None
    if q.device.type != "cpu":  # a GPU tile must divide a block
        tiles = {"BLOCK_M": min(64, q_layout.block), "BLOCK_N": min(64, k_layout.block)}
    attend = _compiled_flex(q.device.type, q.dtype, q.shape[-1], q_layout.block, k_layout.block, k_layout.ragged)
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask, scale, tiles)
    return q_layout.unpad(out.transpose(1, 2)).to(dtype)


def widens_on_cpu(dtype: torch.dtype) -> bool:
    """Whether flex runs in float32 for narrower input: CPUs without AMX tiles multiply bfloat16 more slowly."""
    return dtype.itemsize < 4 and not torch.cpu._is_amx_tile_supported()


def _split_ragged(
    selection: BlockSelection, layout: FrameBlocks, k_blocks: int
) -> tuple[BlockSelection, BlockSelection]:
    """The listed blocks that are full, and those that are a frame's ragged last one, each k_blocks wide."""
    blocks, counts = selection
    if not layout.ragged:
        # flex on CPU insists on lists as wide as there are key blocks; it reads only `counts` of them.
        wide = torch.nn.functional.pad(blocks, (0, k_blocks - blocks.shape[-1]))
        return BlockSelection(wide, counts), BlockSelection(torch.zeros_like(wide), torch.zeros_like(counts))
    mask = selection.to_mask(k_blocks)
    is_ragged = torch.arange(k_blocks, device=blocks.device) % layout.per_frame == layout.per_frame - 1
    return BlockSelection.from_mask(mask & ~is_ragged), BlockSelection.from_mask(mask & is_ragged)


@functools.lru_cache(maxsize=64)
def _inside_frame(tokens_per_frame: int, padded: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A flex mask_mod that is true for real key tokens; cached because torch.compile guards on its identity."""

    def inside_frame(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        return k_token % padded < tokens_per_frame

    return inside_frame


@functools.lru_cache(maxsize=64)
def _compiled_flex(*kind: object) -> Callable[..., Tensor]:
    """flex_attention compiled once for all lengths; `kind` is whatever makes code of its own necessary.

    torch.compile counts recompilations per code object and past a small limit falls back to a dense, uncompiled
    flex. So each kind gets its own code object, and fullgraph turns that fallback into an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, tiles: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, kernel_options=tiles)

    attend.__code__ = attend.__code__.replace(co_name=f"attend_{'_'.join(map(str, kind))}")
    return torch.compile(attend, dynamic=True, fullgraph=True)


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    q_layout: FrameBlocks,
    k_layout: FrameBlocks,
    scale: float,
) -> Tensor:
    """Gather each query block's keys and values and attend to them densely, a few query blocks at a time."""
    batch, _, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks, counts = selection
    width, q_blocks = blocks.shape[-1], counts.shape[-1]
    lengths = k_layout.block_lengths(k.shape[1] // k_layout.tokens_per_frame, q.device)
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(k_layout.block, device=q.device)
    listed = torch.arange(width, device=q.device) < counts[..., None]
    queries = q_layout.pad(q).unflatten(1, (q_blocks, q_layout.block))
    out = torch.zeros_like(queries)
    step = max(1, REFERENCE_CHUNK // (width * k_layout.block * (2 * dim + 2 * q_layout.block)))
    for b in range(batch):
        for h in range(heads):
            for first in range(0, q_blocks, step):
                part = slice(first, first + step)
                ids = blocks[b, h, part].long()
                real = ((within < lengths[ids, None]) & listed[b, h, part, :, None]).flatten(1)
                tokens = (starts[ids, None] + within).flatten(1).masked_fill(~real, 0)
                keys = k[b, :, h][tokens].to(wide).masked_fill(~real[..., None], 0)
                values = v[b, :, h][tokens].to(wide).masked_fill(~real[..., None], 0)
                scores = (queries[b, part, :, h].to(wide) * scale) @ keys.mT
                weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
                # A softmax over nothing is NaN; an empty list gives zeros instead.
                weights = weights.masked_fill((counts[b, h, part] == 0)[:, None, None], 0)
                out[b, part, :, h] = (weights @ values).to(q.dtype)
    return q_layout.unpad(out.flatten(1, 2))


_RUN = {"triton": _run_triton, "flex": _run_flex, "reference": _run_reference}
_WHY_NOT = {"triton": _why_not_triton, "flex": _why_not_flex, "reference": _why_not_reference}


# ---------------------------------------------------------------------------------------------------- validation


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use 'auto', {', '.join(map(repr, BACKENDS))}")


def _check_block(block: tuple[int, int]) -> None:
    for side, size in zip(("query", "key"), block_pair(block), strict=True):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{side} block of {size} tokens is not a power of two from 16 on; use 64 or 128")


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; "
            f"pass [B, L, H, D] with the same B, H and D, and k and v of one length"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; move or cast one of them"
            )
    if not q.is_floating_point():
        raise ValueError(f"q, k and v are {q.dtype}; attention needs a floating-point dtype")


def _checked_selection(
    mask: Tensor | None,
    selection: BlockSelection | None,
    rows: tuple[int, int, int],
    k_blocks: int,
    device: torch.device,
) -> BlockSelection:
    """The selection, from whichever form was given; `rows` is (B, H, q_blocks)."""
    if (mask is None) == (selection is None):
        given = "neither" if mask is None else "both"
        raise ValueError(f"pass exactly one of mask and selection, not {given}")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != (*rows, k_blocks) or mask.device != device:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; these tensors and blocks need "
                f"torch.bool {(*rows, k_blocks)} on {device}"
            )
        return BlockSelection.from_mask(mask)
    assert selection is not None
    blocks, counts = selection
    if counts.shape != rows or blocks.shape[:-1] != rows or not 1 <= blocks.shape[-1] <= k_blocks:
        raise ValueError(
            f"selection has blocks {tuple(blocks.shape)} and counts {tuple(counts.shape)}; these tensors and blocks "
            f"need {rows} (B, H, q_blocks) and at most {k_blocks} key blocks per row"
        )
    for name, x in (("blocks", blocks), ("counts", counts)):
        if x.dtype != torch.int32 or x.device != device:
            raise ValueError(f"selection.{name} is {x.dtype} on {x.device}; it must be torch.int32 on {device}")
    return selection
