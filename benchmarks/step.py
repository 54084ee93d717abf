"""`bench step`: one forward of one chunk, dense and sparse, and its operations."""

import copy
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..lightforcing_core import machine
from ..lightforcing_core.attention.chunk import ChunkAttention
from ..lightforcing_core.model import cuda_graph
from ..lightforcing_core.model.causal import ModelState, run_pass
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.model.fp8 import (
    LAYER_LINEARS,
    MULTIPLE,
    SCALED,
    SCALED_AFTER,
    product,
    quantised,
    quantize_rows,
    why_not_scaled_mm,
)
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.model.kv_storage import CacheShape
from ..lightforcing_core.model.wan import HEAD_DIM, Wan, random_state_dict, wan_from_state_dict
from ..lightforcing_core.pinned import Weights, indexed
from .console import Put
from .layer import FRAMES, SPARSITIES, check_chunk, published
from .settings import REAL_LAYERS, Model, Say, StepBench
from .timing import describe, ratio, spread, take_turns

TEXT_TOKENS, TEXT_DIM = 512, 4096
OPERATIONS = 12  # that are listed


def measure(bench: StepBench, put: Put, say: Say = str) -> None:
    """Measure all arms on one model and one full cache."""
    check_chunk(bench.chunk)
    device, dtype = bench.place.prepare()
    describe(put, device, "step", bench)
    dit = random_wan(bench.model, device, dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    sparse = _state_with_history(bench, len(dit.blocks), random, device, dtype)
    x, timestep = random(1, 16, FRAMES, *bench.picture.latent), torch.full((1,), 937.5, device=device)
    sparse.follow(random(1, TEXT_TOKENS, TEXT_DIM))
    dense = replace(sparse, chunk=replace(sparse.chunk, attention=ChunkAttention()))
    arms: dict[str, Callable[[], object]] = {
        "dense": partial(run_pass, dit, x, timestep, dense),
        "sparse": partial(run_pass, dit, x, timestep, sparse),
    }
    reasons = [why_not_scaled_mm(device, way, MULTIPLE, MULTIPLE, MULTIPLE) for way in (SCALED, SCALED_AFTER)]
    if bench.fp8 and all(reasons):
        put("not here", "fp8", reasons[0])
    elif bench.fp8:
        in_fp8 = copy.deepcopy(dit)
        quantize_linears(in_fp8)
        arms["fp8"] = partial(run_pass, in_fp8, x, timestep, sparse)
    plain = dict(arms)
    recorder = cuda_graph.StepGraph(Weights(dit, indexed(device)), print)
    if bench.cuda_graph and (reason := CudaRecorder.why_not(device)):
        put("not here", "graph", reason)
    elif bench.cuda_graph:
        arms["dense graph"] = partial(recorder, dit, x, timestep, dense, None)
        arms["sparse graph"] = partial(recorder, dit, x, timestep, sparse, None)
    with torch.inference_mode(), recorder.held():
        say(f"timing {', '.join(arms)}")
        taken = take_turns(arms, bench.repeats, device, put)
        for name, run in plain.items():
            for operation, spent in operations(run, device).items():
                put("operations", operation, {f"{name} ms": spent})
        host = []
        for _ in range(bench.repeats):
            machine.seconds_of(lambda: None, device)  # waits, so that launches find an empty queue
            host.append(1e3 * machine.seconds_of(arms["sparse"], torch.device("cpu")))
    for name, ms in taken.items():
        compared = {"sparse": "dense", "fp8": "sparse"}.get(name, name.removesuffix(" graph"))
        speed = {} if name == "dense" else {"times as fast": ratio(taken[compared], ms), "as": compared}
        put("forward", name, {"ms": spread(ms), **speed})
        put("ms", "forward", {name: ms})
    attention, host_ms = sparse.chunk.attention, statistics.median(host)
    put("forward", "sparse", {"host ms": host_ms, "density": attention.density})
    put("forward", "sparse", {"attention": attention.choice.name if attention.choice else attention.why_dense})
    if device.type == "cuda":
        put("forward", "sparse", {"launch bound": host_ms > statistics.median(taken["sparse"])})


def random_wan(model: Model, device: torch.device, dtype: torch.dtype) -> Wan:
    layers = model.layers or (REAL_LAYERS if device.type == "cuda" else 2)
    sizes = asdict(model) | {"layers": layers, "text_dim": TEXT_DIM}
    return wan_from_state_dict(random_state_dict(**sizes, dtype=dtype), device=device)


def _state_with_history(
    bench: StepBench, layers: int, random: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> ModelState:
    """A state with an open chunk after as much random history as a real run has."""
    rows, columns = bench.picture.grid
    heads, frames = bench.model.dim // HEAD_DIM, FRAMES * bench.chunk
    shape = CacheShape(layers, 1, frames, (rows, columns), heads, HEAD_DIM, block_k=bench.picture.block[1], dtype=dtype)
    state = ModelState(KVCache(shape, device=device), published(bench.backend, bench.picture.block))
    past = frames - FRAMES
    state.open_chunk(past, 0.0, device)
    for layer in range(layers):
        state.cache.store(layer, *(random(1, past * rows * columns, heads, HEAD_DIM) for _ in "kv"))
    state.cache.commit()
    state.open_chunk(FRAMES, SPARSITIES[bench.chunk - 1], device, steps=1 << 30)  # so that recording always pays
    return state


def operations(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of the operations, on a GPU the kernels, that take the most time in a call, by torch's profiler."""
    kinds = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines about its start and end
    with profile(activities=kinds) as seen:
        run()
    field = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    ms = {one.key: getattr(one, field) / 1e3 for one in seen.key_averages()}
    return dict(sorted(ms.items(), key=lambda pair: -pair[1])[:OPERATIONS])


class FP8Linear(nn.Module):
    """`linear` with a weight in e4m3, a scale per output channel, and activations quantised token by token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight, self._scales = quantize_rows(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        rows = quantised(x.flatten(0, -2))
        return product(*rows, self._weight, self._scales, self._bias, x.dtype).unflatten(0, x.shape[:-1])


def quantize_linears(dit: nn.Module) -> None:
    """Replace the matrices of every layer by FP8 ones, in place: q, k, v, o of both attentions and the feed-forward."""
    blocks: Any = dit.blocks
    for block in blocks:
        for name in LAYER_LINEARS:
            block.set_submodule(name, FP8Linear(block.get_submodule(name)))
