"""`bench step`: one forward of one chunk at real shapes with random weights, dense and sparse, stage by stage."""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch

from ..lightforcing_core.attention.blocks import FrameBlocks
from ..lightforcing_core.attention.dispatch import AttentionOptions, choose_backend
from ..lightforcing_core.attention.selection import SelectionPlan
from ..lightforcing_core.families import FAMILIES
from ..lightforcing_core.model import causal as causal_wan
from ..lightforcing_core.model import cuda_graph as step_graph
from ..lightforcing_core.model.causal import CausalState, forward
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict
from ..lightforcing_core.rollout.growth import chunk_sparsities
from .attention import CHUNKS, FRAMES
from .record import facts
from .timing import Samples, StageClock, ratio, take_turns, warm_up_rule

REAL_LAYERS = 30
TEXT_TOKENS = 512
REST = "linears, norms, RoPE"
STAGE_ROUNDS = 3


@dataclass(frozen=True)
class StepBench:
    """What is measured: one forward of chunk `chunk` (from 1) of the 81-frame short setting.

    dim, ffn_dim: Wan 2.1 1.3B's unless told otherwise. layers: the model has 30; with fewer the record also holds
    the time scaled to 30. height, width: video pixels. cuda_graph: also measure both arms as one CUDA graph each.
    """

    chunk: int = CHUNKS
    layers: int = REAL_LAYERS
    dim: int = 1536
    ffn_dim: int = 8960
    text_dim: int = 4096
    height: int = 512
    width: int = 768
    block: tuple[int, int] = (64, 64)
    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "bfloat16"
    repeats: int = 3
    seed: int = 0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graph and (reason := step_graph.CudaRecorder.why_not(torch.device(self.device))):
            raise ValueError(f"the forward cannot be recorded: {reason}; leave the graph out")
        if not 2 <= self.chunk <= CHUNKS:
            raise ValueError(f"chunk {self.chunk} is not one of 2 … {CHUNKS}; the first chunk is dense in both arms")

    @property
    def tokens_per_frame(self) -> int:
        return (self.height // 16) * (self.width // 16)


def run_step(bench: StepBench) -> dict[str, Any]:
    """Measure both arms on one model and one full cache; returns the record that `bench step` writes."""
    device, dtype = torch.device(bench.device), getattr(torch, bench.dtype)
    weights = random_state_dict(
        dim=bench.dim, ffn_dim=bench.ffn_dim, layers=bench.layers, text_dim=bench.text_dim, seed=bench.seed, dtype=dtype
    )
    dit = wan_from_state_dict(weights, device=device)
    generator = torch.Generator().manual_seed(bench.seed)
    sparse = _state_with_history(bench, generator, device, dtype)
    density = sparse.density
    dense = replace(sparse, plan=None)
    x = torch.randn(1, 16, FRAMES, bench.height // 8, bench.width // 8, generator=generator).to(device, dtype)
    context = torch.randn(1, TEXT_TOKENS, bench.text_dim, generator=generator).to(device, dtype)
    timestep = torch.full((1,), 937.5, device=device)

    def arm(state: CausalState) -> Any:
        return lambda: forward(dit, x, timestep, context, state)

    with torch.inference_mode():
        states = {"dense": dense, "sparse": sparse}
        arms = {name: arm(state) for name, state in states.items()}
        recorded = {}
        if bench.cuda_graph:
            recorded = {f"{name}, graph": arm(_recorded(state)) for name, state in states.items()}
        samples = take_turns(arms | recorded, repeats=bench.repeats, device=device)
        stages = _stages(arms, states, dit, device)
        q, k = (torch.empty(1, n, bench.dim // HEAD_DIM, HEAD_DIM, dtype=dtype, device=device) for n in _lengths(bench))
        chosen = choose_backend(q, k, k, block=bench.block, backend=bench.backend)
    return {
        "bench": "step",
        **facts(device, asdict(bench)),
        "warm_up": warm_up_rule(bench.repeats),
        "backend": chosen._asdict(),
        "queries": _lengths(bench)[0],
        "keys": _lengths(bench)[1],
        "density": density,
        "ratio": ratio(samples["dense"], samples["sparse"]),
        "graph_ratio": {name: ratio(samples[name], samples[f"{name}, graph"]) for name in arms if recorded},
        "arms": {name: arm.to_dict() for name, arm in samples.items()},
        "stages": stages,
        "scaled_to_30_layers": {name: _scaled(bench, samples[name], stages[name]) for name in arms},
    }


def _recorded(state: CausalState) -> CausalState:
    """The same open chunk, whose forward is recorded in the second of the two warm-up runs."""

    def stopped(reason: str) -> None:
        raise RuntimeError(reason)

    graph = step_graph.StepGraph(step_graph.CudaRecorder(state.cache.current_slots().device), stopped)
    return replace(state, graph=graph, steps=1 << 30)


def _lengths(bench: StepBench) -> tuple[int, int]:
    """Query and key tokens."""
    return FRAMES * bench.tokens_per_frame, bench.chunk * FRAMES * bench.tokens_per_frame


def _state_with_history(
    bench: StepBench, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> CausalState:
    """A state whose chunk is open behind random history, as full as it is in a real run."""
    heads, tokens = bench.dim // HEAD_DIM, bench.tokens_per_frame
    cache = KVCache(
        layers=bench.layers,
        batch=1,
        slots=bench.chunk * FRAMES,
        tokens_per_frame=tokens,
        heads=heads,
        head_dim=HEAD_DIM,
        block_k=bench.block[1],
        dtype=dtype,
        device=device,
    )
    family = FAMILIES["light_forcing_short"]
    options = AttentionOptions(bench.backend, bench.block, family.keep_frames, family.keep_sink, family.keep_near)
    state = CausalState(cache, options)
    for _ in range(bench.chunk - 1):
        state.open_chunk(FRAMES, 0.0, device)
        k, v = (torch.randn(1, FRAMES * tokens, heads, HEAD_DIM, generator=generator).to(device, dtype) for _ in "kv")
        for layer in range(bench.layers):
            cache.store(layer, k, v)
        cache.commit()
    growth = chunk_sparsities(CHUNKS * FRAMES, FRAMES, target=family.target, base=family.base)
    state.open_chunk(FRAMES, growth[bench.chunk - 1], device)
    return state


def _stages(
    arms: dict[str, Any], states: dict[str, CausalState], dit: Any, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median seconds of each stage per arm; stages need hooks, so the ratio is timed without them."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(STAGE_ROUNDS):
        for name, run in arms.items():
            clock, whole = StageClock(device), StageClock(device)
            with _hooked(clock, dit, states[name]), whole.stage("whole"):
                run()
            stages = clock.seconds()
            rounds[name].append({REST: whole.seconds()["whole"] - sum(stages.values()), **stages})
    return {
        name: {stage: statistics.median(one[stage] for one in seen) for stage in seen[0]}
        for name, seen in rounds.items()
    }


@contextmanager
def _hooked(clock: StageClock, dit: Any, state: CausalState) -> Iterator[None]:
    """Count the parts of the forward pass while the block runs."""
    with ExitStack() as stack:

        def hook(owner: Any, name: str, stage: str) -> None:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(stage, getattr(owner, name))))

        hook(state.cache, "store", "store and pool")
        hook(FrameBlocks, "block_means", "selection")
        hook(SelectionPlan, "select", "selection")
        hook(causal_wan, "sparse_attention", "attention")
        hook(state, "dense_attention", "attention")
        hook(causal_wan, "_cross_attention", "cross-attention")
        for block in dit.blocks:
            hook(block.ffn, "forward", "feed-forward")
        for module in (dit.patch_embedding, dit.time_embedding, dit.time_projection, dit.head.head):
            hook(module, "forward", "embedding and head")
        yield


def _scaled(bench: StepBench, samples: Samples, stages: dict[str, float]) -> float:
    """Seconds of all 30 layers: those measured, times 30 / layers, and what is outside layers once."""
    outside = stages.get("embedding and head", 0.0)
    return (samples.median - outside) * REAL_LAYERS / bench.layers + outside
