"""`bench step`: one forward of one chunk, dense and sparse, and its operations."""

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..lightforcing_core import machine
from ..lightforcing_core.attention.chunk import ChunkAttention
from ..lightforcing_core.model import cuda_graph
from ..lightforcing_core.model.causal import ModelState, Run, run_pass
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.model.kv_storage import CacheShape
from ..lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict
from ..lightforcing_core.pinned import Weights, indexed
from .layer import FRAMES, SPARSITIES, check_chunk, published
from .record import facts
from .settings import REAL_LAYERS, StepBench
from .timing import ratio, samples_of, take_turns, warm_up_rule

TEXT_TOKENS, TEXT_DIM = 512, 4096
OPERATIONS = 12  # that are listed


def run_step(bench: StepBench) -> dict[str, Any]:
    """Measure both arms on one model and one full cache; returns the record."""
    check_chunk(bench.chunk)
    device, dtype = bench.place.prepare()
    if bench.cuda_graph and (reason := CudaRecorder.why_not(device)):
        raise ValueError(f"the forward cannot be recorded as a CUDA graph: {reason}; leave out --cuda-graph")
    layers = bench.model.layers or (REAL_LAYERS if device.type == "cuda" else 2)
    sizes = asdict(bench.model) | {"layers": layers, "text_dim": TEXT_DIM}
    dit = wan_from_state_dict(random_state_dict(**sizes, dtype=dtype), device=device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, columns = bench.picture.grid
    queries, keys = FRAMES * rows * columns, bench.chunk * FRAMES * rows * columns
    shape = CacheShape(
        layers=layers,
        batch=1,
        slots=bench.chunk * FRAMES,
        tokens_per_frame=rows * columns,
        heads=bench.model.dim // HEAD_DIM,
        head_dim=HEAD_DIM,
        block_k=bench.picture.block[1],
        dtype=dtype,
    )
    sparse = _state_with_history(bench, KVCache(shape, device=device), random, device)
    x = random(1, 16, FRAMES, *bench.picture.latent)
    sparse.follow(random(1, TEXT_TOKENS, TEXT_DIM))
    dense = replace(sparse, chunk=replace(sparse.chunk, attention=ChunkAttention()))
    states = {"dense": dense, "sparse": sparse}
    timestep = torch.full((1,), 937.5, device=device)

    def arm(state: ModelState, run: Run = run_pass) -> Callable[[], object]:
        return lambda: run(dit, x, timestep, state, None)

    arms = {name: arm(state) for name, state in states.items()}
    graphs = states if bench.cuda_graph else {}
    recorder = cuda_graph.StepGraph(Weights(dit, indexed(device)), print)
    recorded = {f"{name}, graph": arm(state, recorder) for name, state in graphs.items()}
    with torch.inference_mode(), recorder.held():
        samples = take_turns(arms | recorded, repeats=bench.repeats, device=device)
        stages = {name: _operations(run, device) for name, run in arms.items()}
        host = []
        for _ in range(bench.repeats):
            machine.seconds_of(lambda: None, device)  # waits, so that launches find an empty queue
            host.append(machine.seconds_of(arms["sparse"], torch.device("cpu")))
    attention = sparse.chunk.attention
    return {
        "bench": "step",
        **facts(device, bench),
        "layers": layers,
        "warm_up": warm_up_rule(bench.repeats),
        "backend": attention.choice._asdict() if attention.choice else attention.why_dense,
        "queries": queries,
        "keys": keys,
        "density": attention.density,
        "ratio": ratio(samples["dense"], samples["sparse"]),
        "graph_ratio": {name: ratio(samples[name], samples[f"{name}, graph"]) for name in graphs},
        "arms": samples_of(samples),
        "host_ms": 1e3 * statistics.median(host),
        "stages": stages,
    }


def _state_with_history(
    bench: StepBench, cache: KVCache, random: Callable[..., torch.Tensor], device: torch.device
) -> ModelState:
    """A state with an open chunk after as much random history as a real run has."""
    state = ModelState(cache, published(bench.backend, bench.picture.block))
    rows, columns = bench.picture.grid
    for _ in range(bench.chunk - 1):
        state.open_chunk(FRAMES, 0.0, device)
        k, v = (random(1, FRAMES * rows * columns, bench.model.dim // HEAD_DIM, HEAD_DIM) for _ in "kv")
        for layer in range(cache.shape.layers):
            cache.store(layer, k, v)
        cache.commit()
    state.open_chunk(FRAMES, SPARSITIES[bench.chunk - 1], device, steps=1 << 30)  # so that recording always pays
    return state


def _operations(arm: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of the operations that take the most time in a forward, by torch's profiler."""
    kinds = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines about its start and end
    with profile(activities=kinds) as seen:
        arm()
    field = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    seconds = {one.key: getattr(one, field) / 1e6 for one in seen.key_averages()}
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1])[:OPERATIONS])
