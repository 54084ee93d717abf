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

from ... import kernels as all_kernels
from ..attention.quantised import dequantise_blocks
from ..fast_path import FastPath, is_recording, kept_for_a_run, note, why_no_kernels
from ..parallel.shares import WHOLE, Shares
from ..pinned import parts_of
from .fp8 import as_input, product, quantised, takes_rows
from .kv_cache import KVCache
from .rope import RopeTable

DEVICES = ("cuda",)  # devices on which kernels run; tests add the CPU, for Triton's interpreter
EPILOGUES = ("cuda",)  # devices on which the GELU of a product's epilogue has the tanh form
INSTEAD = "running the modules"

_casts = kept_for_a_run()  # resident weights in x's dtype


def add_norm(
    norm: Any,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    readers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor]:
    """The sum x + y · gate, and norm(sum) · (1 + scale) + shift, or the norm by its own weights alone.

    x, y: [B, F · tokens, D]; gate, scale, shift: [B, F or 1, D]. Without y the sum is x, without a gate x + y.
    readers: the linears that read the norm; it is quantised for them if they all multiply in FP8.
    """
    kernels = _kernels_for(x)
    if kernels and _why_not_plain(norm, x, nn.LayerNorm) is None:
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        fits = (weight is None) == (bias is None) == (scale is not None)
        if fits and kernels.modulation.why_not(x) is None:
            by = (_cast(norm, weight, x), _cast(norm, bias, x)) if scale is None else (scale, shift)
            fp8 = takes_rows(readers, x)
            run = partial(kernels.modulation.add_norm, x, y, gate, *by, norm.eps, fp8=fp8)
            made = FastPath("fused modulation", x.device, x.dtype, detail=fp8).attempt(run, INSTEAD)
            if made is not None:
                return made[0], as_input(readers, made[1], x)
    if y is not None and gate is None:
        x = x + y
    elif y is not None and gate is not None:
        framed = (gate.shape[1], -1)
        x = torch.addcmul(x.unflatten(1, framed), y.unflatten(1, framed), gate.unsqueeze(2)).flatten(1, 2)
    normed: Tensor = norm(x)
    if scale is not None and shift is not None:
        by_frame = normed.unflatten(1, (scale.shape[1], -1))
        normed = torch.addcmul(shift.unsqueeze(2), by_frame, 1 + scale.unsqueeze(2)).flatten(1, 2)
    return x, normed


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """norm(x) for x [B, L, D], in one launch; a torch without a fused RMSNorm takes up to six."""
    kernels, weight, made = _kernels_for(x), norm._parameters.get("weight"), None
    is_plain = kernels and weight is not None and norm.eps is not None and _why_not_plain(norm, x, nn.RMSNorm) is None
    if is_plain and kernels.modulation.why_not(x) is None:
        run = partial(kernels.modulation.add_norm, x, None, None, _cast(norm, weight, x), None, norm.eps)
        made = FastPath("fused modulation", x.device, x.dtype, detail=False).attempt(run, INSTEAD)
    normed: Tensor = norm(x) if made is None else made[1]
    return normed


def store(
    attention: Any,
    x: Tensor,
    layer: int,
    cache: KVCache,
    rope: RopeTable,
    block_q: int,
    shares: Shares = WHOLE,
    *,
    with_q: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Project x [B, L, D], norm and rotate q and k, store and pool k and v.

    attention: a layer's self-attention module.
    block_q: query tokens per attention block.
    shares: x has this rank's tokens, and all else its heads.
    with_q: whether to compute queries too.

    Returns q [B, L, H, D], normed and roped, and its block means if the fused kernel made them.
    """
    heads = (-1, cache.shape.head_dim)
    if shares.size > 1:
        q_k = [(attention.norm_k, attention.k), (attention.norm_q, attention.q)][: 1 + with_q]
        sent = [rope.rotate(norm(linear(x)).unflatten(-1, heads)) for norm, linear in q_k]
        k, v, *q = shares.to_heads(sent[0], attention.v(x).unflatten(-1, heads), *sent[1:])
        cache.store(layer, k, v)
        return q[0] if q else None, None
    if kernels := _kernels_for(x):
        stored = _fused_store(kernels.store, attention, x, layer, cache, rope, block_q, with_q)
        if stored is not None:
            return stored
    # k and v have no names here, so that they are freed before q is made.
    cache.store(
        layer,
        rope.rotate(attention.norm_k(attention.k(x)).unflatten(-1, heads)),
        attention.v(x).unflatten(-1, heads),
    )
    return rope.rotate(attention.norm_q(attention.q(x)).unflatten(-1, heads)) if with_q else None, None


def feed_forward(ffn: Any, x: Tensor) -> Tensor:
    """ffn(x), with its GELU in the first product if both are plain, or with the FP8 rows of the second one's input."""
    is_gelu = len(ffn) == 3 and isinstance(ffn[1], nn.GELU) and ffn[1].approximate == "tanh"
    # ComfyUI's feed-forward is a subclass of nn.Sequential that computes the same.
    is_plain = is_gelu and not (_why_not_plain(ffn, x, type(ffn)) or _why_not_plain(ffn[1], x, nn.GELU))
    if is_plain and x.device.type in EPILOGUES and _kernels_for(x):
        first, _, second = ffn
        if takes_rows((second,), x):
            x = first(x)
            out: Tensor = second(as_input((second,), quantised(x.flatten(0, -2), gelu=True), x))
            return out
        if _why_not_plain(first, x) is None and first._parameters["bias"] is not None:
            run = partial(_product_gelu, x, first._parameters["weight"], first._parameters["bias"])
            y = FastPath("GELU in a product", x.device, x.dtype).attempt(run, INSTEAD)
            if y is not None:
                out = second(y)
                return out
    out = ffn(x)
    return out


def _product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x · weightᵀ + bias), tanh form, in one launch: x [B, L, in] → [B, L, out]."""
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], -1)


def _fused_store(
    kernel: Any, attention: Any, x: Tensor, layer: int, cache: KVCache, rope: RopeTable, block_q: int, with_q: bool
) -> tuple[Tensor | None, Tensor | None] | None:
    """Do the same in one launch after the projections; None if the kernel cannot run."""
    memory, head_dim, block = cache.storage.at(layer), cache.shape.head_dim, (block_q, cache.layout.block)
    norms = q_norm, k_norm = attention.norm_q, attention.norm_k
    reason = (
        next((f"a norm {why}" for norm in norms if (why := _why_not_plain(norm, x, nn.RMSNorm))), None)
        or (None if q_norm.eps == k_norm.eps is not None else "the norms of q and k differ")
        or ("its frames are also kept as first stored" if cache.keeps_originals else None)
        or (None if rope.cos.dtype == torch.float32 else f"RoPE is in {rope.cos.dtype}")
        or kernel.why_not(x, head_dim, block, memory.keys.dtype)
    )
    if reason:
        note("store", f"modules, because {reason}")
        return None
    q_weight, k_weight = (_cast(norm, norm._parameters["weight"], x) for norm in norms)

    def run() -> tuple[Tensor | None, Tensor | None]:
        q, k, v = project(attention, x, with_q=with_q)
        write = partial(
            kernel.fused_store,
            k=k,
            v=v,
            k_weight=k_weight,
            eps=k_norm.eps,
            cos=rope.cos,
            sin=rope.sin,
            ring=memory,
            slots=cache.current_slots(),
            tokens_per_frame=cache.layout.tokens_per_frame,
            rows_per_frame=cache.storage.layout.rows_per_frame,
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
        return write(q, q_weight=q_weight if with_q else None) or (None, None)

    stored = FastPath("fused store", x.device, x.dtype, block, head_dim, memory.keys.dtype).attempt(run, INSTEAD)
    if stored is not None:
        cache.written(layer)
    return stored


def project(attention: Any, x: Tensor, *, with_q: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """q (None unless `with_q`), k and v of x, [B, L, D] each: parts of one product if the linears are plain.

    x may be quantised, as `fp8.as_input` makes it.
    """
    linears = (attention.q, attention.k, attention.v)[0 if with_q else 1 :]
    rows, together = parts_of(x), None
    if len(rows) == 2 or all(_why_not_plain(linear, x) is None for linear in linears):
        weights = zip(*(parts_of(linear._parameters["weight"]) for linear in linears), strict=True)
        biases = [linear._parameters["bias"] for linear in linears]
        weight, *scales, bias = (_joined(parts, x.device) for parts in (*weights, biases))
        has_all = weight is not None and (bias is not None or biases == [None] * len(biases))
        if has_all and len(rows) == 2 and scales[0] is not None:
            together = product(rows[0], rows[1], weight, scales[0], bias, x.dtype).unflatten(0, x.shape[:-1])
        elif has_all and len(rows) < 2:
            together = nn.functional.linear(x, weight, bias)
    parts = [linear(x) for linear in linears] if together is None else together.chunk(len(linears), -1)
    return parts[0] if with_q else None, parts[-2], parts[-1]


def _joined(parts: Sequence[Any], device: torch.device) -> Any:
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


def _why_not_plain(module: Any, x: Tensor, kind: Any = nn.Linear) -> str | None:
    """Why a module does more than apply resident weights of x's dtype, or of one that ComfyUI casts, or None."""
    own: dict[str, Any] = module.__dict__
    found: Any = type(module)
    if not _computes_as(found, kind) or "forward" in own:
        return f"is a {found.__name__}" + (" with another forward" if "forward" in own else "")
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return "has a hook"
    if own.get("weight_function") or own.get("bias_function"):
        return "is changed by a LoRA while it is used"
    device, dtype = x.device, x.dtype
    for part in own["_parameters"].values():
        if part is None:
            continue
        if type(part) is not nn.Parameter or part.device != device:
            return f"has a {type(part).__name__} on {part.device}"
        if part.dtype != dtype and (kind is nn.Linear or not getattr(module, "comfy_cast_weights", False)):
            return f"is in {part.dtype} and x in {dtype}"  # it computes in the wider one
    return None


@functools.cache
def _computes_as(found: Any, kind: Any) -> bool:
    """Whether modules of a type compute what `kind` does: itself, or ComfyUI's form of it."""
    return issubclass(found, kind) and (found.forward is kind.forward or hasattr(found, "comfy_cast_weights"))


def _kernels_for(x: Tensor) -> Any:
    """The package of kernels with its modules if they can run for x, else None; they have no backward pass."""
    runs = x.device.type in DEVICES and not torch.is_grad_enabled() and why_no_kernels() is None
    return all_kernels if runs else None


def _cast(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A resident weight in x's dtype, as ComfyUI casts it, made once per run."""
    if weight.dtype == x.dtype:
        return weight
    key = id(norm), weight.data_ptr(), 0 if weight.is_inference() else weight._version, x.dtype
    cast: Tensor = _casts[key] if key in _casts else weight.to(x.dtype)
    if not is_recording():  # a graph frees what it makes
        _casts[key] = cast
    return cast
