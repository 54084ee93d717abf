"""The memory estimate before a run against the measured peak: python -m laboratory.memory.

The peak is that of torch's allocator: its statistics on a GPU, its profiler's allocation events on a CPU. Both are
exact; resident memory is not.
"""

import gc
import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from lightforcing.benchmarks.console import Out, Put, carry_out, with_options
from lightforcing.benchmarks.settings import REAL_LAYERS, Model, Picture, Place, Say
from lightforcing.benchmarks.timing import describe
from lightforcing.lightforcing_core.attention.dispatch import choose_backend
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.memory.estimate import MemoryEstimate, decode_bytes, estimate, meta_wan, size_of
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Guidance, Recipe, few_step_sigmas
from lightforcing.lightforcing_core.rollout.runtime import Runtime
from lightforcing.lightforcing_core.rollout.schedule import Schedule
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.tiled import TiledDecoder
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

SMALL = Model(256, 1536, 4)


@dataclass(frozen=True)
class MemoryCase:
    """One run to estimate and measure; `schedule` is long enough to fill the cache."""

    name: str
    schedule: Schedule
    picture: Picture
    model: Model = SMALL
    text_tokens: int = 512
    text_dim: int = 4096
    vae_dim: int | None = None
    batch: int = 1
    cfg: float = 1.0
    backend: str = "auto"
    kv: KVOptions = field(default_factory=KVOptions)
    decode_tiles: int = 1

    @property
    def sizes(self) -> dict[str, Any]:
        return asdict(self.model) | {"text_dim": self.text_dim}

    def recipe(self, schedule: Schedule, dtype: torch.dtype, device: torch.device | str) -> Recipe:
        """The run of `schedule` at this case's size, with empty prompts on `device`."""
        text = torch.zeros(1, self.text_tokens, self.text_dim, dtype=dtype, device=device)
        return Recipe(
            latent_shape=(self.batch, 16, schedule.latent_frames, *self.picture.latent),
            sigmas=few_step_sigmas((1000, 500)),
            context=text,
            guidance=Guidance(self.cfg, text.clone() if self.cfg != 1.0 else None),
            attention=AttentionOptions(backend=self.backend),
            **schedule.arguments(),
        )


_short = partial(Schedule, target=0.88, base=0.98)
_long = partial(Schedule, target=0.85, base=0.95, window=12, sink_frames=1, sink_rope="follow")

# Small enough for two cores; in each case another part needs the most memory.
CPU_CASES = (
    MemoryCase("dense, mostly KV cache", Schedule(21), Picture(192, 320), Model(256, 1536, 8)),
    MemoryCase("sparse, attention's own copies", _short(12), Picture(240, 416), backend="flex"),
    MemoryCase("long video, sinks follow", _long(18), Picture(192, 320), Model(256, 1536, 6), backend="flex"),
    MemoryCase("mostly decode", _short(6), Picture(256, 384), Model(128, 512, 2), vae_dim=24),
    MemoryCase("guided batch of two", _short(9), Picture(128, 192), batch=2, cfg=3.0),
    MemoryCase("8-bit KV cache", Schedule(21), Picture(192, 320), Model(256, 1536, 8), kv=KVOptions("int8")),
)

_REAL = MemoryCase("81 frames, sparse", _short(21), Picture(), Model(layers=REAL_LAYERS), vae_dim=24, decode_tiles=0)
CUDA_CASES = (
    _REAL,
    replace(_REAL, name="81 frames, dense", schedule=Schedule(21)),
    replace(_REAL, name="81 frames at 480x832, sparse", picture=Picture(480, 832)),
    replace(_REAL, name="long video, window 12", schedule=_long(18)),
    replace(_REAL, name="full Wan VAE", schedule=_short(9), vae_dim=96),
    replace(_REAL, name="full Wan VAE in 2x2 tiles", schedule=_short(9), vae_dim=96, decode_tiles=2),
    replace(_REAL, name="8-bit KV cache", kv=KVOptions("int8")),
    replace(_REAL, name="KV cache in CPU memory", kv=KVOptions(host=True)),
)


def run_memory(bench: Place, put: Put, say: Say = str) -> None:
    """Estimated memory against the measured peak, for several configurations."""
    device, dtype = bench.prepare()
    describe(put, device, "memory", bench)
    for case in CUDA_CASES if device.type == "cuda" else CPU_CASES:
        say(case.name)
        expected, backend = estimated(case, device, dtype)
        measured = measured_peak(case, device, dtype)
        sizes = {"estimated MB": expected.total / 1e6, "measured MB": measured / 1e6}
        put("peak memory", case.name, {"attention": backend, "error": expected.total / measured - 1.0, **sizes})
        put("arguments", case.name, asdict(case))
        put("parts", case.name, asdict(expected))


def estimated(case: MemoryCase, device: torch.device, dtype: torch.dtype) -> tuple[MemoryEstimate, str]:
    """The estimate, and the backend that it assumes."""
    tokens, heads = math.prod(case.picture.grid), case.model.dim // HEAD_DIM
    schedule = case.schedule
    visible = min(schedule.window or schedule.latent_frames, schedule.latent_frames)
    frames = max(schedule.chunk_lengths()), visible
    q, k = (torch.empty(case.batch, n * tokens, heads, HEAD_DIM, dtype=dtype, device=device) for n in frames)
    backend = choose_backend(q, k, tokens_per_frame=tokens, backend=case.backend).name
    dit = meta_wan(**case.sizes, dtype=dtype)
    expected = estimate(
        size_of(dit),
        case.recipe(case.schedule, dtype, "meta"),
        weights=sum(parameter.nbytes for parameter in dit.parameters()),
        kv=case.kv,
        backend=backend,
        dtype=dtype,
    )
    if case.vae_dim:
        latents = case.batch, 16, frames[0], *case.picture.latent
        expected = replace(expected, **decode_bytes(latents, case.vae_dim, dtype, case.decode_tiles))
    return expected, backend if case.schedule.target else "dense"


def measured_peak(case: MemoryCase, device: torch.device, dtype: torch.dtype) -> int:
    """Peak bytes of torch's allocator while this case runs, above those held before."""
    weights = random_state_dict(**case.sizes)
    vae_weights = random_vae_state_dict(dim=case.vae_dim) if case.vae_dim else None

    def run(schedule: Schedule) -> None:
        # Copies, so that the run owns them, in the dtypes of a real model.
        dtypes = {name: torch.float32 if name.startswith("patch_embedding.") else dtype for name in weights}
        dit = wan_from_state_dict({name: x.to(device, dtypes[name], copy=True) for name, x in weights.items()})
        decoder = None
        if vae_weights:
            vae = vae_from_state_dict(vae_weights, dtype=dtype, device=device)
            at_once = 1 if case.decode_tiles else None
            decoder = TiledDecoder(lambda: StreamingDecoder(vae, at_once=at_once), case.decode_tiles)
        for chunk in rollout(dit, case.recipe(schedule, dtype, device), Runtime(kv=case.kv)):
            if decoder is not None:
                decoder.decode(chunk.latents)
            del chunk

    run(_short(6))  # compiles before the measurement
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(case.schedule)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run(case.schedule)
    results: Any = record.profiler.kineto_results if record.profiler else None
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes, key=itemgetter(0))), default=0)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("memory", help=run_memory.__doc__)(with_options(Place, partial(carry_out, run_memory), Out, None))


if __name__ == "__main__":
    app(prog_name="python -m laboratory.memory")
