"""Fused kernels that replace a layer's small operations when it is safe to.

That is on a GPU, if a norm is a plain module: without LoRA, offloading or hooks. Otherwise the modules run as they are.
"""

import contextlib
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.quantised import dequantise_blocks
from ..fast_path import FastPath, is_recording, kept_for_a_run, note, why_no_kernels
from ..pinned import parts_of
from .fp8 import as_input, product, quantised, takes_rows
from .kv_cache import KVCache
from .rope import RopeTable
from .wan import EPS, RMSNorm

DEVICES = ("cuda",)  # devices on which kernels run; tests add the CPU, for Triton's interpreter
EPILOGUES = ("cuda",)  # devices on which the GELU of a product's epilogue has the tanh form
INSTEAD = "running the modules"

_casts = kept_for_a_run()  # resident weights in x's dtype


def norm_scale_shift(norm: Any, x: Tensor, scale: Tensor, shift: Tensor, readers: Sequence[Any] = ()) -> Tensor:
    """norm(x) · (1 + scale) + shift; x [B, F · tokens, D], others [B, F or 1, D].

    readers: the linears that read the result; it is quantised for them if they all multiply in FP8.
    """
    fused: Tensor | tuple[Tensor, Tensor] | None = None
    if _is_plain_norm(norm, x, own=False):
        fused = _modulated("norm_scale_shift", x, scale, shift, norm.eps, fp8=takes_rows(readers, x))
    if fused is not None:
        made: Tensor = as_input(readers, fused, x)
        return made
    framed = norm(x).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), framed, 1 + scale.unsqueeze(2)).flatten(1, 2)


def add_norm(
    norm: Any,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    readers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor]:
    """x + y · gate, or x + y, and its norm, by scale and shift or by the norm's own weights.

    x, y: [B, F · tokens, D]; gate, scale, shift: [B, F or 1, D]. readers: of the norm, see `norm_scale_shift`.
    """
    fused: tuple[Tensor, Any] | None = None
    if _is_plain_norm(norm, x, own=scale is None):
        by = (scale, shift) if scale is not None else tuple(_cast(norm, part, x) for part in (norm.weight, norm.bias))
        fused = _modulated("add_norm", x, y, gate, *by, norm.eps, fp8=takes_rows(readers, x))
    if fused is not None:
        return fused[0], as_input(readers, fused[1], x)
    if gate is None:
        x = x + y
    else:
        framed = (gate.shape[1], -1)
        x = torch.addcmul(x.unflatten(1, framed), y.unflatten(1, framed), gate.unsqueeze(2)).flatten(1, 2)
    return x, norm(x) if scale is None or shift is None else norm_scale_shift(norm, x, scale, shift)


def store(
    attention: Any, x: Tensor, layer: int, cache: KVCache, rope: RopeTable, block_q: int, *, with_q: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Project x [B, L, D], norm and rotate q and k, store and pool k and v.

    attention: a layer's self-attention module.
    block_q: query tokens per attention block.
    with_q: whether to compute queries too.

    Returns q [B, L, H, D], normed and roped, and its block means if the fused kernel made them.
    """
    stored = _fused_store(attention, x, layer, cache, rope, block_q, with_q)
    if stored is not None:
        return stored
    heads = (-1, cache.shape.head_dim)
    # k and v have no names here, so that they are freed before q is made.
    cache.store(
        layer,
        rope.rotate(attention.norm_k(attention.k(x)).unflatten(-1, heads)),
        attention.v(x).unflatten(-1, heads),
    )
    return rope.rotate(attention.norm_q(attention.q(x)).unflatten(-1, heads)) if with_q else None, None


def feed_forward(ffn: Any, x: Tensor) -> Tensor:
    """ffn(x), with its GELU in the first product if both are plain, or with the FP8 rows of the second one's input."""
    if _hooked(ffn) or len(ffn) != 3 or x.device.type not in EPILOGUES or not _kernels_run(x):
        out: Tensor = ffn(x)
        return out
    first, activation, second = ffn
    is_gelu = type(activation) is nn.GELU and activation.approximate == "tanh" and not _hooked(activation)
    if is_gelu and takes_rows((second,), x):
        x = first(x)
        out = second(as_input((second,), quantised(x.flatten(0, -2), gelu=True), x))
        return out
    y: Tensor | None = None
    if is_gelu and _is_plain(first, x) and first.bias is not None:
        run = partial(_product_gelu, x, first.weight, first.bias)
        y = FastPath("GELU in a product", x.device, x.dtype).attempt(run, INSTEAD)
    out = second(activation(first(x)) if y is None else y)
    return out


def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x · weightᵀ + bias), tanh form, in one launch: x [B, L, in] → [B, L, out]."""
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


def _fused_store(
    attention: Any, x: Tensor, layer: int, cache: KVCache, rope: RopeTable, block_q: int, with_q: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """Do the same in one launch after the projections; None if the kernel cannot run."""
    q_norm, k_norm = (_plain_weight(norm, x) for norm in (attention.norm_q, attention.norm_k))
    if not _kernels_run(x) or (torch.is_grad_enabled() and _needs_grad(*attention.parameters())):
        return None
    from ...kernels import store as kernel

    memory, head_dim, block = cache.storage.at(layer), cache.shape.head_dim, (block_q, cache.layout.block)
    reason = (
        ("sinks that follow are rotated later" if cache.keeps_originals else None)
        or (None if rope.cos.dtype == torch.float32 else f"RoPE is in {rope.cos.dtype}")
        or kernel.why_not(x, head_dim, block, memory.keys.dtype)
    )
    if isinstance(q_norm, str) or isinstance(k_norm, str):
        reason = reason or (q_norm if isinstance(q_norm, str) else str(k_norm))
    elif q_norm[1] != k_norm[1]:
        reason = reason or "the norms of q and k differ"
    if reason or isinstance(q_norm, str) or isinstance(k_norm, str):
        note("store", f"modules, because {reason}")
        return None

    def run() -> tuple[Tensor | None, Tensor | None]:
        q, k, v = project(attention, x, with_q=with_q)
        write = partial(
            kernel.fused_store,
            k=k,
            v=v,
            k_weight=k_norm[0],
            eps=k_norm[1],
            cos=rope.cos,
            sin=rope.sin,
            ring=memory,
            slots=cache.current_slots(),
            tokens_per_frame=cache.layout.tokens_per_frame,
            rows_per_frame=cache.shape.memory_layout.rows_per_frame,
            head_dim=head_dim,
            block=block,
        )
        if cache.takes_mean:  # of the keys, which are first stored as they are
            assert memory.key_mean is not None
            memory.key_mean.zero_()
            write(None, q_weight=None)
            written = cache.visible(layer)
            assert written.key_scales is not None
            keys = dequantise_blocks(written.keys, written.key_scales, cache.layout, torch.float32)
            cache.take_mean(memory, keys)
        return write(q, q_weight=q_norm[0] if with_q else None) or (None, None)

    stored = FastPath("fused store", x.device, x.dtype, block, head_dim, memory.keys.dtype).attempt(run, INSTEAD)
    if stored is not None:
        cache.written(layer)
    return stored


def project(attention: Any, x: Tensor, *, with_q: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """q (None unless `with_q`), k and v of x, [B, L, D] each: parts of one product if the linears are plain.

    x may be quantised, as `fp8.as_input` makes it.
    """
    linears, rows = (attention.q, attention.k, attention.v), parts_of(x)
    is_fp8 = len(rows) == 2
    if is_fp8 or all(_is_plain(linear, x) for linear in linears):
        weights = zip(*(parts_of(linear._parameters["weight"]) for linear in linears), strict=True)
        biases = [linear._parameters["bias"] for linear in linears]
        found, bias = [_joined(parts, x.device) for parts in weights], _joined(biases, x.device)
        joined = [part for part in found if part is not None]
        if len(joined) == len(found) and (bias is not None or biases == [None, None, None]):
            width = len(joined[0]) // 3
            first = 0 if with_q else width
            weight, *scales = (part[first:] for part in joined)
            bias = None if bias is None else bias[first:]
            if is_fp8:
                y = product(rows[0], rows[1], weight, scales[0], bias, x.dtype).unflatten(0, x.shape[:-1])
            else:
                y = nn.functional.linear(x, weight, bias)
            *q, k, v = y.split(width, dim=-1)
            return q[0] if q else None, k, v
    return attention.q(x) if with_q else None, attention.k(x), attention.v(x)


def _joined(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Weights of one shape on `device` as one tensor along their first dimension, or None.

    If they do not lie side by side, they are moved into one memory, which only they keep: ComfyUI may move, patch or
    free any of them, and the next call joins them anew.
    """
    found = [part for part in parts if part is not None and part.device == device]
    if len(found) < len(parts):
        return None
    first, shape = found[0], found[0].shape
    whole = (len(parts) * shape[0], *shape[1:])
    size, place = first.nbytes, first.data_ptr()
    if [part.data_ptr() for part in found] == list(range(place, place + len(parts) * size, size)):
        with contextlib.suppress(RuntimeError):  # neighbours by chance, each with a memory of its own
            return first.as_strided(whole, first.stride())
    if len({(part.is_inference(), part.shape) for part in found}) > 1 or is_recording():
        return None  # a recording would move the weights again in every launch
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        for part, view in zip(found, torch.cat(found).chunk(len(found)), strict=True):
            part.data = view
    return first.as_strided(whole, first.stride())


def _is_plain(module: Any, x: Tensor, kind: Any = nn.Linear) -> bool:
    """Whether a module only applies its resident weights of x's dtype, without hooks or LoRA functions."""
    own: dict[str, Any] = module.__dict__
    found: Any = type(module)
    if not _computes_as(found, kind) or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if own.get("weight_function") or own.get("bias_function"):
        return False
    device, dtype = x.device, x.dtype
    casts = kind is nn.LayerNorm and getattr(module, "comfy_cast_weights", False)  # as `_cast` does
    for part in own["_parameters"].values():
        if part is not None and (type(part) is not nn.Parameter or part.device != device):
            return False
        if part is not None and part.dtype != dtype and not casts:
            return False
        if part is not None and _needs_grad(part):
            return False
    return True


@functools.cache
def _computes_as(found: Any, kind: Any) -> bool:
    """Whether modules of a type compute what `kind` does: itself, or ComfyUI's form of it."""
    return issubclass(found, kind) and (found.forward is kind.forward or hasattr(found, "comfy_cast_weights"))


def _is_plain_norm(norm: Any, x: Tensor, *, own: bool) -> bool:
    """Whether a LayerNorm does nothing else, with weights of its own or without any."""
    if not _is_plain(norm, x, nn.LayerNorm):
        return False
    parts = norm._parameters
    return (parts["weight"] is not None) == (parts["bias"] is not None) == own


def _modulated(kernel: str, x: Tensor, *arguments: Any, fp8: bool) -> Any:
    """The result of one of the modulation kernels for x, or None if it cannot run."""
    if not _kernels_run(x, *arguments):
        return None
    from ...kernels import modulation

    if modulation.why_not(x):
        return None
    run = partial(getattr(modulation, kernel), x, *arguments, fp8=fp8)
    return FastPath("fused modulation", x.device, x.dtype, detail=fp8).attempt(run, INSTEAD)


def _kernels_run(*tensors: Any) -> bool:
    """Whether kernels can run for these tensors at all; they have no backward pass."""
    return tensors[0].device.type in DEVICES and not _needs_grad(*tensors) and why_no_kernels() is None


def _needs_grad(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _plain_weight(norm: Any, x: Tensor) -> tuple[Tensor, float] | str:
    """(weight in x's dtype, eps) of an RMS norm that does nothing but read its weight, else the reason."""
    if not isinstance(norm, nn.RMSNorm | RMSNorm) or _hooked(norm):
        return "a norm has a hook" if _hooked(norm) else f"a norm is a {type(norm).__name__}"
    if getattr(norm, "weight_function", ()):
        return "a LoRA changes a norm while it is used"
    weight, eps = norm.weight, getattr(norm, "eps", EPS)
    if type(weight) is not nn.Parameter or weight.device != x.device or eps is None:
        return f"a norm's weight is a {type(weight).__name__} on {weight.device}"
    if weight.dtype != x.dtype and not getattr(norm, "comfy_cast_weights", False):
        return f"a norm's weight is {weight.dtype} and x is {x.dtype}"  # it computes in the wider one
    return _cast(norm, weight, x), eps


def _cast(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A resident weight in x's dtype, as ComfyUI casts it, made once per run."""
    if weight.dtype == x.dtype:
        return weight
    key = id(norm), weight.data_ptr(), 0 if weight.is_inference() else weight._version, x.dtype
    cast: Tensor = _casts[key] if key in _casts else weight.to(x.dtype)
    if not is_recording():  # a graph frees what it makes
        _casts[key] = cast
    return cast


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
