"""Fused kernels in the place of a layer's small operations, wherever they may stand there.

They may on a GPU, where a norm would do nothing but read its own weights: not under LoRA, offload or hooks. Anything
else runs the modules as they are. A kernel that fails goes out of use with one warning, and the modules take over.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.fast_path import is_recording, kernel_module
from .kv_cache import KVCache
from .rope import RopeTable
from .wan import EPS, RMSNorm

DEVICES = ("cuda",)  # where the kernels are taken; tests add the CPU, for Triton's interpreter

_log = logging.getLogger(__name__)
_failed: set[str] = set()


class Stored(NamedTuple):
    """What is left to do once keys and values are stored: q, normed and roped [B, L, H, D], and its block means."""

    q: Tensor | None
    q_means: Tensor | None


def norm_scale_shift(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) · (1 + scale) + shift; x [B, F · tokens, D], per-frame scale and shift [B, F or 1, D]."""
    if isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None and not _hooked(norm):
        fused = _attempt("modulation", x, "norm_scale_shift", x, scale, shift, norm.eps)
        if fused is not None:
            return fused
    framed = norm(x).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), framed, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y · gate; x, y [B, F · tokens, D], per-frame gate [B, F or 1, D]."""
    fused = _attempt("modulation", x, "gated_add", x, y, gate)
    if fused is not None:
        return fused
    framed = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, framed), y.unflatten(1, framed), gate.unsqueeze(2)).flatten(1, 2)


def store(
    attention: Any, x: Tensor, layer: int, cache: KVCache, rope: RopeTable, block_q: int, *, only_store: bool
) -> Stored:
    """Project x [B, L, D], norm and rotate q and k, write k and v into the open chunk's slots and pool.

    attention: a layer's self-attention module. only_store: q is not wanted. `q_means` is None where the modules ran.
    """
    if fused := _fused_store(attention, x, layer, cache, rope, block_q, only_store=only_store):
        return fused
    heads = (-1, cache.head_dim)
    k = rope.rotate(attention.norm_k(attention.k(x)).unflatten(-1, heads))
    cache.store(layer, k, attention.v(x).unflatten(-1, heads))
    if only_store:
        return Stored(None, None)
    return Stored(rope.rotate(attention.norm_q(attention.q(x)).unflatten(-1, heads)), None)


def _fused_store(
    attention: Any, x: Tensor, layer: int, cache: KVCache, rope: RopeTable, block_q: int, *, only_store: bool
) -> Stored | None:
    """The same in one launch behind the projections, or None where that cannot be."""
    kernel = kernel_module("store")
    q_norm, k_norm = (_plain_weight(norm, x) for norm in (attention.norm_q, attention.norm_k))
    if isinstance(kernel, str) or x.device.type not in DEVICES or q_norm is None or k_norm is None:
        return None
    tensors = cache.ring(layer)
    block = (block_q, cache.layout.block)
    if tensors is None or q_norm[1] != k_norm[1] or rope.cos.dtype != torch.float32:
        return None
    ring = kernel.Ring(**tensors)
    if kernel.why_not(x, cache.head_dim, block, ring.keys.dtype):
        return None
    stored = _attempt(
        "store",
        x,
        "fused_store",
        None if only_store else attention.q(x),
        attention.k(x),
        attention.v(x),
        q_weight=None if only_store else q_norm[0],
        k_weight=k_norm[0],
        eps=k_norm[1],
        cos=rope.cos,
        sin=rope.sin,
        ring=ring,
        slots=cache.current_slots(),
        tokens_per_frame=cache.layout.tokens_per_frame,
        head_dim=cache.head_dim,
        block=block,
    )
    if stored is None and ("store" in _failed or not only_store):
        return None
    cache.written(layer)
    return Stored(*stored) if stored else Stored(None, None)


def _attempt(name: str, x: Tensor, function: str, *arguments: Any, **options: Any) -> Any:
    """What a kernel's launcher gives, or None where it does not run: for x, here, or since it failed once."""
    if x.device.type not in DEVICES or name in _failed or (torch.is_grad_enabled() and x.requires_grad):
        return None
    kernel = kernel_module(name)
    if isinstance(kernel, str) or (name == "modulation" and kernel.why_not(x)):
        return None
    try:
        return getattr(kernel, function)(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_recording():
            raise
        _failed.add(name)
        line = (str(error).strip() or repr(error)).splitlines()[0]
        _log.warning("[Light Forcing] the fused %s failed (%s: %s); running modules", name, type(error).__name__, line)
        return None


def _plain_weight(norm: Any, x: Tensor) -> tuple[Tensor, float] | None:
    """(weight, eps) of an RMS norm whose forward would do nothing but read it as it lies, else None."""
    if not isinstance(norm, nn.RMSNorm | RMSNorm) or _hooked(norm):
        return None
    if getattr(norm, "weight_function", ()):  # the host's LoRA on an offloaded layer
        return None
    weight, eps = norm.weight, getattr(norm, "eps", EPS)
    resident = type(weight) is nn.Parameter and weight.device == x.device and weight.dtype == x.dtype
    return (weight, eps) if resident and eps is not None else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
