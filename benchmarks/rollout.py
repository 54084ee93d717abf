"""`bench rollout`: seconds and peak memory of whole videos, chunk by chunk, and whether both stay constant.

The arms are interleaved chunk by chunk in one process. "even" is sparse without growth, so that every chunk takes the
same work once the window is full.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.causal import Pass
from ..lightforcing_core.model.cuda_graph import CudaRecorder, StepGraph, why_no_graph
from ..lightforcing_core.model.wan import Wan, random_state_dict, wan_from_state_dict
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.runtime import Chunk, Runtime
from ..lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from ..lightforcing_core.vae.overlap import OverlappedDecoder
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .layer import published
from .record import facts
from .settings import RolloutBench
from .timing import medians

PAIR = ("dense", "sparse")
ARMS = (*PAIR, "even")
TEXT_TOKENS, TEXT_DIM = 64, 4096
EARLY, LATE = 10, 80  # the chunks, counted from 1, whose memory is compared
LAST = 10  # chunks whose median time is compared with chunks EARLY … 2 · EARLY
WARM_UP = "each arm runs its first three chunks once, a sparse one among them, before anything is timed"


def run_rollout(
    bench: RolloutBench, on_chunk: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """Run every arm; returns the record of `bench rollout`. on_chunk: called as on_chunk(done, total)."""
    latent_frames_of(bench.frames)
    if not bench.arm or any(arm not in ARMS for arm in bench.arm):
        raise ValueError(f"arms {bench.arm} must be one or more of {', '.join(ARMS)}")
    device, dtype = bench.place.prepare()
    if bench.cuda_graph == "on" and (reason := CudaRecorder.why_not(device)):
        raise ValueError(f"cuda_graph 'on' cannot run: {reason}; use 'auto' or 'off'")
    model = bench.model
    weights = random_state_dict(dim=model.dim, ffn_dim=model.ffn_dim, layers=model.layers or 2, dtype=dtype)
    dit = wan_from_state_dict(weights, device=device)
    vae = None
    if bench.decode:
        vae = vae_from_state_dict(random_vae_state_dict(dim=bench.vae_dim), dtype=dtype, device=device)
    warm_frames = 4 * (3 * family_of(bench).frames_per_chunk) - 3
    for arm in bench.arm:
        for _ in _Arm(bench, arm, dit, vae, device, frames=min(warm_frames, bench.frames)).run():
            pass
    gc.collect()
    memory = PeakMemory(device)
    lengths = schedule_of(bench, "dense", bench.frames).chunk_lengths()
    rounds: list[list[dict[str, Any]]] = []
    for number in range(bench.rounds):
        running = {arm: _Arm(bench, arm, dit, vae, device, frames=bench.frames) for arm in bench.arm}
        turns = [arm.run() for arm in running.values()]
        rounds.append([])
        for index, frames in enumerate(lengths):
            memory.reset()
            row: dict[str, Any] = {"chunk": index + 1, "latent_frames": frames}
            row |= {arm: next(turn) for arm, turn in zip(running, turns, strict=True)}
            rounds[-1].append(row | {"peak_bytes": memory.peak()})
            on_chunk(number * len(lengths) + index + 1, bench.rounds * len(lengths))
    rows = [over_rounds(same, bench.arm) for same in zip(*rounds, strict=True)]
    return {
        "bench": "rollout",
        **facts(device, bench),
        "warm_up": WARM_UP,
        "timed": "a chunk's seconds run from the chunk before it to its own arrival: the clean pass that commits the "
        "former, then 4 denoising steps",
        "cuda_graphs": {name: arm.graphs for name, arm in running.items()},
        "memory": memory.rule,
        "bytes_before": memory.before,
        **summarise(rows, bench.arm),
        "chunks": rows,
    }


def family_of(bench: RolloutBench) -> Family:
    return FAMILIES[f"light_forcing_{bench.setting}"]


def schedule_of(bench: RolloutBench, arm: str, frames: int) -> Schedule:
    """The schedule of one arm for `frames` video frames."""
    schedule = Schedule.of_family(family_of(bench), latent_frames_of(frames))
    if arm == "even":
        return replace(schedule, curve="constant", base=schedule.target)
    return schedule if arm == "sparse" else schedule.dense()


def over_rounds(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Merge one chunk's rows of all rounds: the median of the seconds, the maximum of the memory."""
    peak = max(row["peak_bytes"] for row in rows)
    return rows[0] | {arm: medians([row[arm] for row in rows]) for arm in arms} | {"peak_bytes": peak}


class _Arm:
    """One rollout, run chunk by chunk."""

    def __init__(
        self, bench: RolloutBench, arm: str, dit: Wan, vae: nn.Module | None, device: torch.device, *, frames: int
    ) -> None:
        schedule, family = schedule_of(bench, arm, frames), family_of(bench)
        generator = torch.Generator().manual_seed(0)
        context = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=generator).to(device)
        self._device = device
        self._decoder = OverlappedDecoder(StreamingDecoder(vae), device, concurrent=bench.overlap) if vae else None
        self._overlaps, self._count = bench.overlap, len(schedule.chunk_lengths())
        self._graph: StepGraph | None = None
        self._why_no_graph = why_no_graph(dit, device, kv_in_cpu_memory=False)
        if bench.cuda_graph == "off":
            self._why_no_graph = "switched off"

        def denoise(x: Tensor, sigma: float, model_pass: Pass) -> Tensor:
            if isinstance(model_pass.predict, StepGraph):
                self._graph = model_pass.predict
            timestep = torch.full((x.shape[0],), sigma * 1000.0, device=device)
            return x - sigma * model_pass(dit, x.to(dit.dtype), timestep).float()

        recipe = Recipe(
            latent_shape=(1, 16, schedule.latent_frames, *bench.picture.latent),
            sigmas=few_step_sigmas(family.denoising_steps, family.shift),
            context=context,
            attention=published(bench.backend, bench.picture.block, family),
            **schedule.arguments(),
        )
        runtime = Runtime(denoise=denoise, cuda_graph=bench.cuda_graph)  # type: ignore[arg-type]
        self._chunks: Iterator[Chunk] = rollout(dit, recipe, runtime)

    @property
    def graphs(self) -> str:
        """Whether steps ran as CUDA graphs, in words."""
        graph = self._graph
        if graph is None:
            return f"none: {self._why_no_graph}"
        return f"none: {graph.why_off}" if graph.why_off else f"{graph.launches} steps launched as graphs"

    def run(self) -> Iterator[dict[str, float]]:
        """Yield the seconds of each chunk: `sample` and, with a VAE, `decode`, or `both` if they overlap.

        Both together run from the arrival of one chunk's frames to the next, since waiting for the device would end the
        overlap. The first chunk's share ends with its sampling, the last one's includes the frames of two chunks.
        """
        while True:
            start = self._now()
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            seconds = {"sample": self._now() - start}
            if self._decoder is not None:
                decode_start = self._now()
                self._decoder.put(chunk.latents)
                if self._overlaps and chunk.index == self._count - 1:
                    self._decoder.rest()
                seconds["decode"] = self._now() - decode_start
            del chunk
            yield {"both": sum(seconds.values())} if self._overlaps else seconds

    def _now(self) -> float:
        if self._device.type == "cuda" and not self._overlaps:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class PeakMemory:
    """Peak memory since `reset`: of torch's allocator on a GPU, else the resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        holder = "torch's CUDA allocator" if self._cuda else "the process's resident memory"
        start = "the chunk began" if self.reset() else "the process began"
        self.rule = f"peak of {holder} since {start}, all arms together"
        self.before = self.peak()

    def reset(self) -> bool:
        """Reset the peak; False if the system does not allow it. The peak then only grows, which hides no leak."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # not Linux, or not allowed
            return False
        return True

    def peak(self) -> int:
        """Bytes."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._cuda)
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        except OSError:
            import resource
            import sys

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        assert found is not None
        return int(found[1]) * 1024


def summarise(rows: list[dict[str, Any]], arms: tuple[str, ...]) -> dict[str, Any]:
    """Ratios first, from the rows of `run_rollout`; only chunks of full length count.

    `dense_over_sparse`: of whole videos and of the last chunk. `flatness`: needs at least 2 · EARLY chunks; memory
    of chunk LATE (or the last one) over chunk EARLY, and per arm the median seconds of the last chunks over those
    of chunks EARLY … 2 · EARLY.
    """
    seconds = {arm: [sum(row[arm].values()) for row in rows] for arm in arms}
    full = [place for place, row in enumerate(rows) if row["latent_frames"] == rows[0]["latent_frames"]]
    result: dict[str, Any] = {}
    if set(PAIR) <= set(arms):
        last = rows[full[-1]]
        result["dense_over_sparse"] = {
            "video": sum(seconds["dense"]) / sum(seconds["sparse"]),
            "last_chunk": seconds["dense"][full[-1]] / seconds["sparse"][full[-1]],
            "last_chunk_sampling": last["dense"]["sample"] / last["sparse"]["sample"],
        }
    if len(full) >= 2 * EARLY:
        late = rows[full[min(LATE, len(full)) - 1]]
        flatness: dict[str, Any] = {
            "chunks": [EARLY, late["chunk"]],
            "memory": late["peak_bytes"] / rows[full[EARLY - 1]]["peak_bytes"],
        }
        for arm in arms:
            early = statistics.median(seconds[arm][place] for place in full[EARLY - 1 : 2 * EARLY])
            flatness[f"{arm}_seconds"] = statistics.median(seconds[arm][place] for place in full[-LAST:]) / early
        result["flatness"] = flatness
    return result | {
        "seconds": {arm: sum(values) for arm, values in seconds.items()},
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }
