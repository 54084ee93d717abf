"""Sparse attention: check the input, choose a backend and run it, or the next one."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import fast_path, machine
from ..fast_path import raise_if_fatal
from .backends import BACKENDS, DENSE, REFERENCE, TRITON
from .backends.base import EIGHT_BIT, Backend, Call
from .blocks import FrameBlocks
from .options import check_backend, check_block
from .selection import BlockSelection

WORK = "attention of {1} queries to {4} keys, {0}×{2} heads of {3} in {5}, kept in {6}"
_BY_NAME: dict[str, Backend] = {backend.name: backend for backend in (*BACKENDS, DENSE)}


class BackendUnavailable(RuntimeError):
    """A named backend cannot run here; the message says why."""


class BackendChoice(NamedTuple):
    """The backend that will run, and the reason in one sentence."""

    name: str
    reason: str


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
) -> Tensor:
    """Softmax attention in which every query block reads only its own key blocks.

    q: [B, Lq, H, D].
    k, v: [B, Lk, H, D]; all in whole frames of `tokens_per_frame` tokens. k and v may be slices of a larger cache.
    mask: bool [B, H, q_blocks, k_blocks], or `selection`, its compact list form. Exactly one of them.
    block: (query, key) tokens per block; blocks are aligned to frames, see `FrameBlocks`.
    backend: one of `BACKEND_NAMES`, or "auto": the best that can run, and the next one, with a warning, if it fails.
    scale: multiplies the scores, 1/√D if None.
    scales: for int8 or float8_e4m3fn k and v, one float32 number per key block and head of each, [B, k_blocks, H];
    a value is its stored number times its block's scale. No wider copy of k and v is made.
    tail: the block means of k and of v, [B, k_blocks, H, D] in q's dtype. Every key block that a query block does
    not read enters its softmax once, as its mean with log(the block's real tokens) added to the score.

    Returns [B, Lq, H, D] in q's dtype. A query block with no key block gives zeros. On a device without a working
    sparse backend "auto" is dense attention. Raises ValueError for inputs that do not match and
    `BackendUnavailable` if a named backend cannot run. Block ids in `selection` are not checked: that would wait on
    the device.
    """
    check_backend(backend)
    check_block(block)
    _check_tensors(q, k, v, scales)
    q_layout, k_layout = (FrameBlocks(tokens_per_frame, size) for size in block)
    call = Call(q, k, v, q_layout, k_layout, None, scale, scales, tail, uneven=mask is not None)
    selection = _checked_selection(mask, selection, call)
    for name, pair, wanted in (
        ("scales", scales, ((q.shape[0], call.k_blocks, q.shape[2]), torch.float32)),
        ("tail", tail, ((q.shape[0], call.k_blocks, *q.shape[2:]), q.dtype)),
    ):
        for side, x in zip(("k", "v"), pair or (), strict=bool(pair)):
            _check(f"{name} of {side} are", x, *wanted, q.device)
    return attend(replace(call, selection=selection), choose(call, backend), backend)[0]


def choose_backend(
    q: Tensor,
    k: Tensor,
    *,
    tokens_per_frame: int,
    block: tuple[int, int] = (64, 64),
    backend: str = "auto",
    tail: bool = False,
) -> BackendChoice:
    """The backend that `sparse_attention` chooses for such tensors, and its reason.

    Of q and k, as they are stored, only shapes, dtypes and devices matter. tail: whether there is a pooled tail.
    Raises ValueError for an unknown backend and `BackendUnavailable` for a named one that cannot run.
    """
    check_backend(backend)
    q_layout, k_layout = (FrameBlocks(tokens_per_frame, size) for size in block)
    return choose(Call(q, k, k, q_layout, k_layout, tail=(k, k) if tail else None), backend)


def choose(call: Call, backend: str = "auto", run: Callable[[str], Tensor] | None = None) -> BackendChoice:
    """The backend for `call`; raises `BackendUnavailable` if a named one cannot run.

    run: runs such a call by the backend of a name, so that they can be measured.
    """
    if backend != "auto":
        if reason := _BY_NAME[backend].why_not(call):
            raise BackendUnavailable(f"attention backend {backend!r} cannot run: {reason}")
        return BackendChoice(backend, f"{backend} was asked for")
    last = REFERENCE if call.q.device.type == "cpu" else DENSE
    usual, declined, able = last.name, list[str](), [REFERENCE.name] if last is REFERENCE else []
    for one in reversed(BACKENDS[:-1]):
        reason = call.path(one.name).failure or one.why_not(call) or one.why_not_auto(call)
        if reason is None:
            able.append(one.name)
        if one.automatic:
            usual, declined = (usual, [reason, *declined]) if reason else (one.name, [])
    because = "; ".join(declined) or f"{usual} is the fastest backend here and can run"
    facts = (*call.q.shape, call.k.shape[1], call.q.dtype, call.k.dtype, *call.block, call.tail is not None)
    tolerance = machine.TOLERANCE[call.q.dtype.itemsize > 2]
    choice = machine.choose(WORK, facts, call.q.device, able, run, incumbent=usual, tolerance=tolerance)
    return BackendChoice(choice, because if choice == usual else f"it was measured to be faster than {usual}")


def attend(call: Call, choice: BackendChoice, backend: str = "auto") -> tuple[Tensor, BackendChoice]:
    """Run `call`; returns the result and the backend that computed it.

    backend: the requested one. With "auto" a backend that fails is replaced by the next one, with a warning.
    """
    while True:
        one = _BY_NAME[choice.name]
        if backend == "auto":
            announce(choice, call.q.device)
        if backend != "auto" or one in (REFERENCE, DENSE):  # nothing replaces it
            try:
                return one.run(call), choice
            except Exception as error:
                raise_if_fatal(error)
                raise
        result = call.path(one.name).attempt(partial(one.run, call), "running the next backend")
        if result is not None:
            return result, choice
        choice = choose(call)


def announce(choice: BackendChoice, device: torch.device) -> None:
    """Log a choice of "auto" once per run: a warning if sparse attention runs dense."""
    level, text = logging.INFO, f"{choice.name} ({choice.reason})"
    if choice.name == DENSE.name:
        level = logging.WARNING
        text = f"no sparse backend works on {device}, so everything runs dense ({choice.reason})"
    fast_path.say_once(level, f"[Light Forcing] attention: {text}", about=f"attention {choice.name}")


def dense_attention_8bit(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor], layout: FrameBlocks, backend: str = "auto"
) -> Tensor:
    """Attend to every key of an 8-bit cache, without a wider copy of it.

    Tensors as in `sparse_attention`, keys in the blocks of `layout`. The Triton kernel reads 8-bit tiles; if "auto"
    would not take it, or another backend is named, `Dense` dequantises one head at a time. Raises `BackendUnavailable`.
    """
    call = Call(q, k, v, FrameBlocks(layout.tokens_per_frame, 128), layout, scales=scales)
    if backend == TRITON.name:
        choose(call, backend)
        return TRITON.run(call)
    if backend == "auto" and not (TRITON.why_not(call) or TRITON.why_not_auto(call)):
        run = partial(TRITON.run, call)
        result = call.path(f"dense {TRITON.name}").attempt(run, "dequantising one head at a time")
        if result is not None:
            return result
    return DENSE.run(call)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; pass [B, L, H, D]")
    if not q.is_floating_point() or q.dtype.itemsize == 1:
        raise ValueError(f"q is {q.dtype}; attention needs queries in a floating-point dtype of 16 bits or more")
    if k.dtype in EIGHT_BIT and scales is None:
        raise ValueError(f"k and v are {k.dtype} without scales; pass scales=(k_scales, v_scales) or dequantise them")
    if k.dtype not in EIGHT_BIT and scales is not None:
        raise ValueError(f"scales are for int8 or float8_e4m3fn keys and values, and k is {k.dtype}; leave them out")
    shape, dtype = (q.shape[0], k.shape[1], *q.shape[2:]), q.dtype if scales is None else k.dtype
    for name, x in (("k is", k), ("v is", v)):
        _check(name, x, shape, dtype, q.device)


def _check(what: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise ValueError(f"{what} {x.dtype} {tuple(x.shape)} on {x.device}; expected {dtype} {shape} on {device}")


def _checked_selection(mask: Tensor | None, selection: BlockSelection | None, call: Call) -> BlockSelection:
    if (mask is None) == (selection is None):
        given = "neither" if mask is None else "both"
        raise ValueError(f"pass exactly one of mask and selection, not {given}")
    rows, device = (call.q.shape[0], call.q.shape[2], call.q_blocks), call.q.device
    if mask is not None:
        _check("mask is", mask, (*rows, call.k_blocks), torch.bool, device)
        return BlockSelection.from_mask(mask)
    assert selection is not None
    blocks, counts = selection
    width = min(max(1, blocks.shape[-1]), call.k_blocks)
    _check("selection.blocks is", blocks, (*rows, width), torch.int32, device)
    _check("selection.counts is", counts, rows, torch.int32, device)
    return selection
