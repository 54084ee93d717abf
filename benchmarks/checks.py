"""The stage "kernels": a layer's fast paths and a decoder, compared with float64.

Without a GPU the kernels run on tiny tensors in Triton's interpreter.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..lightforcing_core import fast_path
from ..lightforcing_core.attention import selection
from ..lightforcing_core.attention.backends.dense import dequantised
from ..lightforcing_core.attention.dispatch import BackendUnavailable
from ..lightforcing_core.attention.options import AttentionOptions, Pools
from ..lightforcing_core.attention.quantised import KVDtype
from ..lightforcing_core.model import fused
from ..lightforcing_core.model.causal import ModelState, predict
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.model.kv_storage import CacheShape, KVOptions
from ..lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .console import Put, Record
from .layer import LayerAttention
from .settings import GpuBench
from .stages import NotHere
from .step import operations

SEEDS = (0, 1), (0, 1, 2, 3), (0, 1, 2, 3)  # by level; seed 0 draws what is hard: rows of zeros, equal and loud ones
# Limits of errors, relative to the largest value, by the cache's dtype.
LIMITS: dict[KVDtype, float] = {"same": 2e-2, "int8": 3e-2, "fp8": 1e-1}
Run = Callable[[torch.dtype], tuple[Tensor, ...]]
Make = Callable[[int], Run]


class Size(NamedTuple):
    """The shapes of a check."""

    device: torch.device
    grids: tuple[tuple[int, int], tuple[int, int]]  # rows and columns of frames that blocks do not divide, and do
    heads: int
    dim: int
    block: int
    frames: int


def checks(size: Size, level: int) -> Iterator[tuple[str, Make, float]]:
    """The fast paths in variants that need other code, a covering set at level 0: kind, maker and limit.

    A maker draws inputs by a seed; the function that it returns computes, in float64 through plain PyTorch. The limit
    is of the error, relative to the largest value.
    """
    ways = "", "tail", "cut", "descriptors", "tail cut", "lse"
    variants: list[tuple[KVDtype, str]] = [
        (kv, f"{even}{way}") for kv in LIMITS for way in ways for even in ("", "even ")
    ]
    if not level:
        variants = [("same", ""), ("same", "even tail lse"), ("int8", "cut"), ("fp8", "tail"), ("same", "descriptors")]
    for kv, way in variants:
        yield (f"attention {kv} {way}".strip(), partial(_attention, size, kv, way), 1e-2)
    for kv, limit in LIMITS.items():
        yield (f"layer {kv}", partial(_layer, size, kv), limit)
    yield ("decode", partial(_decode, size), 5e-2)


def _draw(size: Size, seed: int, *shape: int) -> Tensor:
    """Normal numbers; with seed 0 some of the last dimension's rows are zeros, equal or loud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if seed == 0:
        kind = torch.randint(0, 12, (*shape[:-1], 1), generator=generator)
        x = torch.where(kind == 0, 0.0, torch.where(kind == 1, x[..., :1, :], torch.where(kind == 2, 16 * x, x)))
    return x.to(size.device, torch.bfloat16)


def _attention(size: Size, kv: KVDtype, way: str, seed: int) -> Run:
    """Sparse attention and the blocks that it reads. way: words of even (frames), tail, lse, cut and descriptors."""
    words, past = way.split(), 3 * size.frames
    tokens = math.prod(size.grids["even" in words])
    q, k, v = (
        _draw(size, seed * part, 1, frames * tokens, size.heads, size.dim)
        for part, frames in enumerate((size.frames, past, past), 1)
    )
    estimator, tail = "lse" if "lse" in words else "mean", "tail" in words
    options = AttentionOptions("reference", (size.block, size.block), keep_frames=3, estimator=estimator, tail=tail)
    make = partial(LayerAttention, grid=size.grids["even" in words], sparsity=0.6, kv=kv)
    layer = make(q, k, v, options=replace(options, backend="triton"))
    listed = layer.select()

    def run(kind: torch.dtype) -> tuple[Tensor, ...]:
        if kind is torch.float64:
            exact = make(q.double(), k.double(), v.double(), options=options)
            return exact.arm(listed)(), exact.select().blocks
        from ..kernels import block_sparse, tuning

        def launch(kind: Any, q: Tensor, *_: Any) -> tuning.Launch:
            found = tuning.default_launch(kind, block_sparse.capability_of(q))
            return found._replace(descriptors="descriptors" in words, per_sm=int("cut" in words))

        with mock.patch.object(block_sparse, "_launch_for", launch):
            return layer.arm(listed)(), layer.select().blocks

    return run


def _layer(size: Size, kv: KVDtype, seed: int) -> Run:
    """A dense layer: its flow and its share of the cache, dequantised, with all means."""
    rows, columns = size.grids[0]
    heads = max(1, size.heads * size.dim // HEAD_DIM)
    weights = random_state_dict(dim=heads * HEAD_DIM, ffn_dim=256, layers=1, text_dim=64, seed=seed)
    x = _draw(size, seed, 1, 16, size.frames, 2 * rows, 2 * columns)
    text, timestep = _draw(size, seed + 9, 1, 32, 64), torch.full((1,), 500.0, device=size.device)

    def run(kind: torch.dtype) -> tuple[Tensor, ...]:
        sizes = 1, 1, size.frames, (rows, columns), heads, HEAD_DIM, size.block
        shape = CacheShape(*sizes, pools=Pools(True, True, True), dtype=kind)
        cache = KVCache(shape, KVOptions("same" if kind is torch.float64 else kv), size.device)
        state = ModelState(cache, AttentionOptions(block=(size.block, size.block)))
        state.follow(text.to(kind))
        state.open_chunk(size.frames, 0.0, size.device)
        dit = wan_from_state_dict({name: x.bfloat16() for name, x in weights.items()}, dtype=kind, device=size.device)
        with torch.inference_mode():
            flow = predict(dit, x.to(kind), timestep, state)
        memory = cache.visible(0)
        keys, values = memory.keys, memory.values
        if memory.scales and memory.key_mean is not None:
            keys, values = dequantised(keys, values, memory.scales, cache.layout, slice(None), torch.float64)
            keys += memory.key_mean[:, None]
        return flow, keys, values, *memory._replace(key_mean=None).means

    return run


def _decode(size: Size, seed: int) -> Run:
    weights = random_vae_state_dict(dim=24 if size.device.type == "cuda" else 4, seed=seed)
    latents = _draw(size, seed + 1, 1, 16, 3, 6, 8)

    def run(kind: torch.dtype) -> tuple[Tensor, ...]:
        decoder = StreamingDecoder(vae_from_state_dict(weights, dtype=kind, device=size.device))
        return tuple(decoder.decode(part, trusted=True) for part in latents.split((1, 2), dim=2))

    return run


# ------------------------------------------------------------------------------------------------------- stages


@contextmanager
def _interpreting() -> Iterator[None]:
    """Let fast paths take CPU tensors."""
    exact = mock.patch.object(selection, "why_not_fused", lambda q, *_: "exact" if q.dtype == torch.float64 else None)
    with mock.patch.object(fused, "DEVICES", ("cpu", "cuda")), exact:
        yield


@contextmanager
def _launched() -> Iterator[list[Any]]:
    """The compiled kernels that are launched inside for the first time."""
    kernels: list[Any] = []
    from triton import JITFunction

    run = JITFunction.run

    def seen(self: Any, *arguments: Any, **rest: Any) -> Any:
        kernels.append(run(self, *arguments, **rest))
        return kernels[-1]

    with mock.patch.object(JITFunction, "run", seen):
        yield kernels


def kernels(bench: GpuBench, record: Record, put: Put) -> str | None:
    """Errors of every check against float64, from outputs that start as NaN; twice, for the same bits.

    On a GPU also what the compiler made of the kernels of each, and their milliseconds.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    if reason := fast_path.why_no_kernels():
        raise NotHere(reason)
    small = Size(torch.device("cpu"), ((5, 8), (4, 8)), 2, 32, 16, 1)
    # A chunk at 480×832, ragged in blocks of 64, and at 512×768.
    size = Size(torch.device("cuda"), ((30, 52), (32, 48)), 12, HEAD_DIM, 64, 3) if gpu else small
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    tried = {kind for kind, row in record["kernels"].items() if "verified" in row}  # before a crash
    with nullcontext() if gpu else _interpreting(), _launched() as launched:
        for kind, make, limit in checks(size, bench.level):
            if kind in tried:
                continue
            put("kernels", kind, {"verified": None})  # stays so if the process crashes
            before = len(launched)
            found = _verify(map(make, SEEDS[bench.level] if gpu else SEEDS[0][:1]), limit)
            put("kernels", kind, {"limit": limit} | found)
            if new := launched[before:]:
                put("kernels", kind, {"registers": max(one.n_regs or 0 for one in new)})
                put("kernels", kind, {"stack": 4 * max(one.n_spills or 0 for one in new)})
                put("kernels", kind, {"shared": max(one.metadata.shared for one in new)})
            if gpu and "error" in found:
                ms, names = operations(partial(make(1), torch.bfloat16), size.device), {one.name for one in launched}
                put("kernels", kind, {"ms": {name: ms[name] for name in sorted(names & ms.keys())}})
    return None if gpu else "no GPU: kernels ran on tiny tensors in Triton's interpreter, not compiled or timed"


def _verify(runs: Iterable[Run], limit: float) -> dict[str, Any]:
    fast_path.begin_run()
    errors, same = [], True
    try:
        for run in runs:
            got, again, exact = run(torch.bfloat16), run(torch.bfloat16), run(torch.float64)
            for x, y, z in zip(got, again, exact, strict=True):
                same &= torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
                errors.append(_error(x, z))
    except BackendUnavailable as reason:
        return {"verified": True, "not here": str(reason)}
    failed = list(fast_path._failures.values())
    verified = same and not failed and max(errors) <= limit
    return {"verified": verified, "error": max(errors), "same bits": same, "failed": failed}


def _error(got: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value, 1e9 for NaN; of lists, the share of other entries."""
    if got.dtype == torch.int32:
        return float((got.unsqueeze(-1) != exact.unsqueeze(-2)).all(-1).double().mean())
    worst = (got.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1e-30)
    return float(worst.nan_to_num(1e9, 1e9))
