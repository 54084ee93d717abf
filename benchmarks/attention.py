"""`bench attention`: dense attentions against sparse backends, chunk by chunk.

The shapes are one layer's self-attention of the 81-frame short setting (chunks of 3 latent frames, target 0.88,
base 0.98): q [1, 3 · tokens, H, 128] against k, v [1, 6 … 21 frames · tokens, H, 128].
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..lightforcing_core.attention.backends import BACKEND_NAMES
from ..lightforcing_core.attention.backends.dense import sdpa
from ..lightforcing_core.attention.dispatch import BackendUnavailable, choose_backend
from ..lightforcing_core.attention.selection import BlockSelection
from .layer import CHUNKS, FRAMES, HEAD_DIM, SPARSITIES, LayerAttention, check_chunk, published
from .record import facts
from .settings import AttentionBench, Say
from .timing import ratio, samples_of, take_turns, warm_up_rule

Arm = Callable[[], Tensor]


def run_attention(bench: AttentionBench, say: Say) -> dict[str, Any]:
    """Measure every chunk; returns the record of `bench attention`.

    Raises ValueError for unknown chunks and backends or if a named one cannot run, RuntimeError if a result is wrong.
    """
    for chunk in bench.chunks:
        check_chunk(chunk)
    device, dtype = bench.place.prepare()
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHUNKS * FRAMES * bench.tokens_per_frame, bench.heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    absent: dict[str, str] = {}
    rows = []
    with torch.inference_mode():
        for chunk in bench.chunks:
            tokens = chunk * FRAMES * bench.tokens_per_frame
            layer = LayerAttention(
                q[:, : FRAMES * bench.tokens_per_frame],
                k[:, :tokens],
                v[:, :tokens],
                tokens_per_frame=bench.tokens_per_frame,
                sparsity=SPARSITIES[chunk - 1] if bench.sparsity is None else bench.sparsity,
                options=replace(published("auto", bench.block), estimator=bench.estimator, tail=bench.tail),
                kv=bench.kv,
            )
            rows.append(_chunk_row(bench, chunk, layer, absent))
            say(f"chunk {chunk} done")
    return {
        "bench": "attention",
        **facts(device, bench),
        "warm_up": warm_up_rule(bench.repeats),
        "not_here": absent,
        "chunks": rows,
    }


def flat_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of plain numbers for each chunk and backend."""
    rows = []
    for row in result["chunks"]:
        arms = {name: 1e3 * arm["median"] for name, arm in row["arms"].items()}
        share, best = row["selection_share_of_dense"], row["best_dense"]
        for name, ratios in row["ratios"].items():
            found = {"kernel ×": ratios["kernel"]["median"], "whole ×": ratios["with_selection"]["median"]}
            found |= {"ideal ×": row["ideal_ratio"], "selection": share, "error": row["largest_error"][name]}
            found |= {"ms": arms[f"kernel {name}"], "whole ms": arms[f"whole {name}"], "dense": best}
            found |= {"dense ms": arms[f"dense {best}"]}
            rows.append({"chunk": row["chunk"], "backend": name} | found)
    return rows


def _chunk_row(bench: AttentionBench, chunk: int, layer: LayerAttention, absent: dict[str, str]) -> dict[str, Any]:
    """Time the arms of one chunk, interleaved."""
    q, k, v = layer.tensors
    selection = layer.select()
    dense = dense_arms(q, k, v, absent)
    sparse = _sparse_backends(bench, q, layer.stored[0], absent)
    errors = {name: _check(layer.attend(selection, name), layer, selection) for name in sparse}
    arms: dict[str, Callable[[], object]] = {f"dense {name}": arm for name, arm in dense.items()}
    arms["selection"] = layer.select
    for name in sparse:
        arms[f"kernel {name}"] = partial(layer.attend, selection, name)
        arms[f"whole {name}"] = partial(layer, name)
    samples = take_turns(arms, repeats=bench.repeats, device=q.device)
    kept, all_blocks = layer.plan.kept, layer.k_means.shape[1]
    best = min((f"dense {name}" for name in dense), key=lambda name: statistics.median(samples[name]))
    return {
        "chunk": chunk,
        "queries": q.shape[1],
        "keys": k.shape[1],
        "kept_blocks": kept,
        "key_blocks": all_blocks,
        "ideal_ratio": all_blocks / kept,
        "best_dense": best.removeprefix("dense "),
        "selection_share_of_dense": ratio(samples["selection"], samples[best])["median"],
        "ratios": {
            name: {
                "kernel": ratio(samples[best], samples[f"kernel {name}"]),
                "with_selection": ratio(samples[best], samples[f"whole {name}"]),
            }
            for name in sparse
        },
        "largest_error": errors,
        "arms": samples_of(samples),
    }


def dense_arms(q: Tensor, k: Tensor, v: Tensor, absent: dict[str, str]) -> dict[str, Arm]:
    """Dense attentions that run here, by name; `absent` gets reasons of the others."""
    if q.device.type != "cuda":
        return {"sdpa": partial(sdpa, q, k, v)}
    arms: dict[str, Arm] = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = kernel.name.removesuffix("_ATTENTION").lower()
        arms[f"sdpa {name}"] = sdpa_kernel(kernel)(partial(sdpa, q, k, v))
    for name, module in {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}.items():
        if find_spec(module) is None:
            absent[name] = f"{module} is not installed"
        else:
            arms[name] = partial(import_module(module).flash_attn_func, q, k, v)
    for name in list(arms):
        try:
            arms[name]()
            torch.cuda.synchronize(q.device)
        except RuntimeError as error:
            absent[name] = str(error).strip().splitlines()[0]
            del arms[name]
    return arms


def _sparse_backends(bench: AttentionBench, q: Tensor, k: Tensor, absent: dict[str, str]) -> list[str]:
    """The backends to time; `absent` gets reasons of others. A named one must run."""
    choose = partial(choose_backend, q, k, tokens_per_frame=bench.tokens_per_frame, block=bench.block, tail=bench.tail)
    if bench.backend:
        return [choose(backend=name).name for name in bench.backend]
    able = []
    for name in BACKEND_NAMES[:-1]:
        try:
            choose(backend=name)
            if name == "triton" and q.device.type != "cuda":
                raise BackendUnavailable("Triton's interpreter is only for tests")
            able.append(name)
        except BackendUnavailable as error:
            absent[name] = str(error)
    return able or [BACKEND_NAMES[-1]]


def _check(out: Tensor, layer: LayerAttention, selection: BlockSelection) -> float:
    """Largest relative difference to the reference in the first frame and head; RuntimeError above 5 %."""
    expected = layer.exact(selection, frames=1, heads=1)
    worst = float((out[:, : expected.shape[1], :1] - expected).abs().max() / expected.abs().max())
    if not worst < 0.05:
        raise RuntimeError(f"a sparse arm differs from the reference by {worst:.1%} of the largest value; report a bug")
    return worst
