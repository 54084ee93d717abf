"""`bench attention`: dense attentions against sparse backends, chunk by chunk.

The shapes are one layer's self-attention of the 81-frame short setting (chunks of 3 latent frames, target 0.88,
base 0.98): q [1, 3 · tokens, H, 128] against k, v [1, 6 … 21 frames · tokens, H, 128].
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..lightforcing_core.attention.backends import BACKEND_NAMES, REFERENCE
from ..lightforcing_core.attention.backends.dense import ONLY_CUDA, TORCH_WAYS
from ..lightforcing_core.attention.dispatch import BackendUnavailable
from ..lightforcing_core.attention.selection import BlockSelection
from .console import Put
from .layer import CHUNKS, FRAMES, HEAD_DIM, SPARSITIES, LayerAttention, check_chunk, published
from .settings import AttentionBench, Say
from .timing import describe, ratio, take_turns


def measure(bench: AttentionBench, put: Put, say: Say = str) -> None:
    """Measure every chunk.

    Raises ValueError for unknown chunks and backends or if a named one cannot run, RuntimeError if a result is wrong.
    """
    for chunk in bench.chunks:
        check_chunk(chunk)
    device, dtype = bench.place.prepare()
    describe(put, device, "attention", bench)
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHUNKS * FRAMES * bench.tokens_per_frame, bench.heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    for chunk in bench.chunks:
        own, seen = (frames * bench.tokens_per_frame for frames in (FRAMES, chunk * FRAMES))
        for sparsity in bench.sparsity or (SPARSITIES[chunk - 1],):
            say(f"chunk {chunk}, {sparsity:.0%}")
            make = partial(LayerAttention, grid=(1, bench.tokens_per_frame), sparsity=sparsity, kv=bench.kv)
            with torch.inference_mode():
                _measure_chunk(
                    bench, f"chunk {chunk}, {sparsity:.0%}", make, (q[:, :own], k[:, :seen], v[:, :seen]), put
                )


def _measure_chunk(
    bench: AttentionBench, chunk: str, make: Callable[..., LayerAttention], qkv: tuple[Tensor, ...], put: Put
) -> None:
    """Time the arms of one chunk, interleaved, and put a row for each backend."""
    options = replace(published("reference", bench.block), estimator=bench.estimator, tail=bench.tail)
    layers: dict[str, LayerAttention] = {}
    for name in bench.backend or (BACKEND_NAMES[:-1] if qkv[0].is_cuda else ("flex",)):
        try:
            layers[name] = make(*qkv, options=replace(options, backend=name))
        except BackendUnavailable as error:
            if bench.backend:
                raise ValueError(str(error)) from error
            put("not here", name, str(error))
    layers = layers or {REFERENCE.name: make(*qkv, options=options)}
    selection = next(iter(layers.values())).select()
    errors = _errors(layers, selection, make(*(x[:, :, :1].double() for x in qkv), options=options))
    arms: dict[str, Callable[[], object]] = {}
    for name, way in TORCH_WAYS.items():
        if qkv[0].is_cuda or name not in ONLY_CUDA:
            arms[f"dense {name}"] = partial(way, *qkv)
    if qkv[0].is_cuda:
        arms["dense flash-attn 3"] = lambda: import_module("flash_attn_interface").flash_attn_func(*qkv)
    for name, layer in layers.items():
        arms |= {
            f"kernel {name}": layer.arm(selection),
            f"whole {name}": layer.arm(),
            f"selection {name}": layer.select,
        }
    taken = take_turns(arms, bench.repeats, qkv[0].device, put)
    put("ms", chunk, taken)
    ms = {name: statistics.median(times) for name, times in taken.items()}
    best = min((name for name in taken if name.startswith("dense")), key=ms.__getitem__)
    for name, layer in layers.items():
        kernel, whole, density = taken[f"kernel {name}"], taken[f"whole {name}"], layer.state.chunk.attention.density
        row: dict[str, Any] = {"kernel ×": ratio(taken[best], kernel), "whole ×": ratio(taken[best], whole)}
        row |= {"ideal ×": 1 / density, "selection": ms[f"selection {name}"] / ms[best], "error": errors[name]}
        products = 4e-9 * density * qkv[0].shape[1] * qkv[1].numel()
        row |= {"ms": ms[f"kernel {name}"], "TFLOPS": products / ms[f"kernel {name}"]}
        put("attention", f"{chunk}, {name}", row | {"dense": best.removeprefix("dense "), "dense ms": ms[best]})


def _errors(layers: Mapping[str, LayerAttention], selection: BlockSelection, exact: LayerAttention) -> dict[str, float]:
    """Largest relative differences to float64 in the first frame and head; RuntimeError above 5 %."""
    frame, blocks = exact.q.shape[1] // FRAMES, selection.counts.shape[2] // FRAMES
    exact.q = exact.q[:, :frame]
    expected = exact.arm(BlockSelection(*(x[:, :1, :blocks] for x in selection)))()
    errors = {}
    for name, layer in layers.items():
        apart = layer.arm(selection)()[:, :frame, :1] - expected
        errors[name] = float(apart.abs().max() / expected.abs().max())
        if not errors[name] < 0.05:
            raise RuntimeError(f"{name} differs from float64 by {errors[name]:.1%} of the largest value; report a bug")
    return errors
