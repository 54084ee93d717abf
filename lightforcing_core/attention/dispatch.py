"""The front door for block-sparse attention: picks a backend, says why, and runs it.

Backends, in the order in which `auto` falls through:

- `triton`: our kernel; NVIDIA GPUs from sm_80 on (or the Triton interpreter, only when named).
- `flex`: `torch.nn.attention.flex_attention`, compiled; any GPU with Triton, x86 CPUs with a C++ compiler.
- `flash4`: FlashAttention-4's block-sparse kernel on sm_90 and sm_100, only when named: nobody has measured it here.
- `reference`: plain PyTorch, everywhere, computed in float32 or wider. The truth that the others are tested against.

On CPU `auto` gives small problems to the reference, because compiling flex takes seconds (`FLEX_MIN_SCORES`).
"""

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import attention_backends as backends
from .attention_backends import REFERENCE_CHUNK, Attention, Request, widens_on_cpu
from .blocks import FrameBlocks, block_pair
from .fast_path import is_recording
from .quantised import STORED
from .selection import ESTIMATORS, BlockSelection, check_frame_budget

__all__ = [
    "BACKENDS",
    "FLEX_MIN_SCORES",
    "REFERENCE_CHUNK",
    "AttentionOptions",
    "BackendChoice",
    "BackendUnavailable",
    "choose_backend",
    "dense_attention_8bit",
    "sparse_attention",
    "widens_on_cpu",
]

BACKENDS = ("triton", "flex", "flash4", "reference")
ONLY_NAMED = ("flash4",)
EIGHT_BIT = tuple(STORED.values())

# Query-key pairs, B · H · Lq · Lk, from which on a CPU a compiled flex pays for its compilation. Measured on two
# busy cores at 12 % density: compiling takes 4 to 20 s once; at this size the reference took 0.6 s per call, flex
# 0.2 s, so the compiler is paid back after some ten to fifty calls, less than one clip.
FLEX_MIN_SCORES = 1 << 24

_log = logging.getLogger(__name__)
_announced: set[str] = set()
_failures: dict[tuple[object, ...], str] = {}


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
    them are the first and the nearest ones.

    Options beyond the published method: estimator "lse" scores a block by its parts, see `SelectionPlan.select`;
    tail: skipped blocks enter the softmax as their mean; tiles: blocks are compact patches of the picture instead of
    runs of its rows; reuse_steps: a selection serves that many denoising steps of a chunk, the clean pass never.

    Raises ValueError with the way out for anything else.
    """

    backend: str = "auto"
    block: tuple[int, int] = (64, 64)
    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2
    estimator: str = "mean"
    tail: bool = False
    tiles: bool = False
    reuse_steps: int = 1

    def __post_init__(self) -> None:
        _check_backend(self.backend)
        _check_block(self.block)
        check_frame_budget(self.keep_frames, self.sink_frames, self.near_frames)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator {self.estimator!r} is not known; use one of {', '.join(ESTIMATORS)}")
        if self.reuse_steps < 1:
            raise ValueError(f"reuse_steps {self.reuse_steps} is less than 1; 1 selects anew in every step")


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    selection: BlockSelection | None = ...,
    tokens_per_frame: int,
    block: tuple[int, int] = ...,
    backend: str = ...,
    scale: float | None = ...,
    scales: tuple[Tensor, Tensor] | None = ...,
    tail: tuple[Tensor, Tensor] | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    selection: BlockSelection | None = ...,
    tokens_per_frame: int,
    block: tuple[int, int] = ...,
    backend: str = ...,
    scale: float | None = ...,
    scales: tuple[Tensor, Tensor] | None = ...,
    tail: tuple[Tensor, Tensor] | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    scales: tuple[Tensor, Tensor] | None = None,
    tail: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every query block reads only its own key blocks.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D], in whole frames of `tokens_per_frame` tokens; k and v may be slices of a
    larger cache. Exactly one of `mask`, bool [B, H, q_blocks, k_blocks], and `selection`, its compact list form.
    `block` is (query, key) tokens per block; blocks are aligned to frames, see `FrameBlocks`. `scale` multiplies
    the scores, 1/√D when None. Returns [B, Lq, H, D] in q's dtype. A query block with no key block gives zeros.

    scales: for int8 or float8_e4m3fn k and v, one float32 number per key block and head of each, [B, k_blocks, H];
    a value is its stored number times its block's scale. No wider copy of k and v is made.
    tail: the block means of k and of v, [B, k_blocks, H, D] in q's dtype. Every key block that a query block does
    not read enters its softmax once, as its mean with log(the block's real tokens) added to the score.
    return_lse: return the output and lse, the natural log of the sum of each query's exponentiated scores, a tail's
    included: [B, Lq, H] in float32 (float64 for queries in float64), −inf for a query without keys. By it attention
    over disjoint keys, on two devices say, adds up: out = Σ exp(lseᵢ − lse) · outᵢ with lse = log Σ exp(lseᵢ).

    With backend "auto" the best backend that can run is taken, and a backend that fails while it compiles or runs
    is replaced by the next one with a warning. Raises ValueError for input that does not fit together and
    BackendUnavailable when a named backend cannot run. Block ids in `selection` are not checked: that would
    wait on the device.
    """
    _check_backend(backend)
    _check_block(block)
    q_layout, k_layout = FrameBlocks(tokens_per_frame, block[0]), FrameBlocks(tokens_per_frame, block[1])
    _check_inputs(q, k, v, scales)
    rows = (q.shape[0], q.shape[2], q_layout.frames(q.shape[1]) * q_layout.per_frame)
    k_blocks = k_layout.frames(k.shape[1]) * k_layout.per_frame
    selection = _checked_selection(mask, selection, rows, k_blocks, q.device)
    _check_beside("scales", scales, (q.shape[0], k_blocks, q.shape[2]), torch.float32, q.device)
    _check_beside("tail", tail, (q.shape[0], k_blocks, *q.shape[2:]), q.dtype, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Attention(q, k, v, selection, q_layout, k_layout, scale, scales, tail, mask is not None, return_lse)
    out, lse = _run_auto(call) if backend == "auto" else backends.RUN[_choose(call, backend).name](call)
    return out if lse is None else (out, lse)


def _run_auto(call: Attention) -> backends.Result:
    """Run the first backend that can, and the next ones where it fails."""
    while True:
        choice = _choose(call, "auto")
        _announce(choice)
        try:
            return backends.RUN[choice.name](call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if choice.name == BACKENDS[-1] or is_recording():
                raise
            _remember_failure(choice.name, call.q, call.k, error, tail=call.tail is not None, lse=call.lse)


def _choose(call: Attention, backend: str) -> BackendChoice:
    return choose_backend(
        call.q,
        call.k,
        call.v,
        block=(call.q_layout.block, call.k_layout.block),
        backend=backend,
        tail=call.tail is not None,
        tokens_per_frame=call.q_layout.tokens_per_frame,
        lse=call.lse,
    )


def dense_attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor],
    *,
    tokens_per_frame: int,
    block_k: int,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over all keys of an 8-bit cache, without a wider copy of that cache.

    q: [B, Lq, H, D]; k, v: int8 or float8_e4m3fn [B, Lk, H, D]; scales: as in `sparse_attention`, for key blocks of
    `block_k` tokens. Returns [B, Lq, H, D] in q's dtype. The Triton kernel reads 8-bit tiles; wherever `auto` would
    not take it, and with any other backend named, one head at a time is dequantised and attended to by PyTorch's
    own attention. Raises as `sparse_attention` does.
    """
    _check_backend(backend)
    _check_block((64, block_k))
    layout = FrameBlocks(tokens_per_frame, block_k)
    if scales is None:
        raise ValueError(f"scales are missing: {k.dtype} keys and values of full width need ordinary dense attention")
    _check_inputs(q, k, v, scales)
    blocks = layout.frames(k.shape[1]) * layout.per_frame
    _check_beside("scales", scales, (q.shape[0], blocks, q.shape[2]), torch.float32, q.device)
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda"):
        request = Request(q, k, (64, block_k), _needs_grad(q))
        reason = backends.WHY_NOT["triton"](request)
        if backend == "triton" and reason:
            raise BackendUnavailable(f"attention backend 'triton' cannot run: {reason}")
        if not (reason or _failures.get(_failure_key("triton", q, k))):
            try:
                return backends.dense_triton(q, k, v, scales, layout)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if backend == "triton" or is_recording():
                    raise
                _remember_failure("triton", q, k, error)
    return backends.dense_by_head(q, k, v, scales, layout)


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    block: tuple[int, int] = (64, 64),
    backend: str = "auto",
    tail: bool = False,
    tokens_per_frame: int | None = None,
    lse: bool = False,
) -> BackendChoice:
    """The backend that `sparse_attention` takes for these tensors, with one sentence of why.

    q: [B, Lq, H, D]; k, v: [B, Lk, H, D]; only shapes, dtypes and devices are looked at. `tail` and `lse` are whether
    a pooled tail and a log-sum-exp are asked for; `tokens_per_frame` matters only to flash4, which takes no ragged
    frames. Raises ValueError for an unknown backend and BackendUnavailable for a named one that cannot run.
    """
    _check_backend(backend)
    request = Request(q, k, block, _needs_grad(q, k, v), tail, tokens_per_frame, lse)
    if backend != "auto":
        if reason := backends.WHY_NOT[backend](request):
            raise BackendUnavailable(f"attention backend {backend!r} cannot run: {reason}")
        return BackendChoice(backend, f"{backend} was asked for")
    declined: list[str] = []
    for name in BACKENDS:
        if name in ONLY_NAMED:
            continue
        reason = _failures.get(_failure_key(name, q, k, tail, lse)) or backends.WHY_NOT[name](request)
        if reason is None and name == "triton" and q.device.type != "cuda":
            reason = "Triton's interpreter is only for tests and must be named"
        if reason is None and name == "flex" and q.device.type == "cpu":
            reason = _too_small_to_compile(q, k)
        if reason is None:
            return BackendChoice(name, "; ".join(declined) or f"{name} is the fastest here and can run")
        declined.append(reason)
    raise AssertionError("the reference backend runs everywhere")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _too_small_to_compile(q: Tensor, k: Tensor) -> str | None:
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if scores >= FLEX_MIN_SCORES:
        return None
    return f"{scores:,} query-key pairs on CPU are fewer than {FLEX_MIN_SCORES:,}, too few to wait for a compiler"


def _failure_key(name: str, q: Tensor, k: Tensor, tail: bool = False, lse: bool = False) -> tuple[object, ...]:
    return name, q.device.type, q.dtype, k.dtype, tail, lse


def _remember_failure(
    name: str, q: Tensor, k: Tensor, error: Exception, *, tail: bool = False, lse: bool = False
) -> None:
    """Warn, and do not try this backend again on this kind of tensors."""
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    reason = f"{name} failed on {q.device.type} in {q.dtype}: {type(error).__name__}: {first_line}"
    _failures[_failure_key(name, q, k, tail, lse)] = reason
    _log.warning("[Light Forcing] attention: %s; trying the next backend", reason)


def _announce(choice: BackendChoice) -> None:
    """Log a choice of `auto` once per sentence."""
    line = f"[Light Forcing] attention: {choice.name} ({choice.reason})"
    if line not in _announced:
        _announced.add(line)
        _log.info("%s", line)


# ---------------------------------------------------------------------------------------------------- validation


def _check_backend(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use 'auto', {', '.join(map(repr, BACKENDS))}")


def _check_block(block: tuple[int, int]) -> None:
    for side, size in zip(("query", "key"), block_pair(block), strict=True):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{side} block of {size} tokens is not a power of two from 16 on; use 64 or 128")


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; "
            f"pass [B, L, H, D] with the same B, H and D, and k and v of one length"
        )
    if not q.is_floating_point() or q.dtype.itemsize == 1:
        raise ValueError(f"q is {q.dtype}; attention needs queries in a floating-point dtype of 16 bits or more")
    if k.dtype in EIGHT_BIT and scales is None:
        raise ValueError(f"k and v are {k.dtype} without scales; pass scales=(k_scales, v_scales) or dequantise them")
    if k.dtype not in EIGHT_BIT and scales is not None:
        raise ValueError(f"scales are for int8 or float8_e4m3fn keys and values, and k is {k.dtype}; leave them out")
    wanted = q.dtype if scales is None else k.dtype
    for name, x in (("k", k), ("v", v)):
        if x.dtype != wanted or x.device != q.device:
            other = f"q is {q.dtype}" if scales is None else f"k is {k.dtype} and q"
            raise ValueError(f"{name} is {x.dtype} on {x.device} but {other} on {q.device}; move or cast one of them")


def _check_beside(
    name: str, pair: tuple[Tensor, Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """ValueError unless both tensors of a pair that is given have this shape, dtype and device."""
    for side, x in zip(("k", "v"), pair or (), strict=bool(pair)):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{name} of {side} are {x.dtype} {tuple(x.shape)} on {x.device}; these tensors and blocks need "
                f"{dtype} {shape} on {device}"
            )


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
