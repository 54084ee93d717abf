"""`bench rollout`: seconds and peak memory of whole videos, chunk by chunk.

The arms are interleaved chunk by chunk in one process. "even" is sparse without growth, so that every chunk takes the
same work once the window is full.
"""

import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..lightforcing_core import machine
from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.model.wan import Wan, random_state_dict, wan_from_state_dict
from ..lightforcing_core.pinned import Weights, indexed
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.record import RunRecorder
from ..lightforcing_core.rollout.runtime import Runtime
from ..lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from ..lightforcing_core.vae.graph import PassGraph
from ..lightforcing_core.vae.overlap import OverlappedDecoder
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .layer import published
from .record import facts
from .settings import PAIR, RolloutBench, Say
from .timing import medians

ARMS = (*PAIR, "even")
TEXT_TOKENS, TEXT_DIM = 64, 4096
EARLY, LATE = 10, 80  # the chunks, counted from 1, whose memory is compared
LAST = 10  # chunks whose median time is compared with chunks EARLY … 2 · EARLY
WARM_UP = "each arm runs its first three chunks once, a sparse one among them, before anything is timed"


def run_rollout(bench: RolloutBench, say: Say) -> dict[str, Any]:
    """Run every arm; returns the record of `bench rollout`."""
    if not bench.arm or any(arm not in ARMS for arm in bench.arm):
        raise ValueError(f"arms {bench.arm} must be one or more of {', '.join(ARMS)}")
    device, dtype = bench.place.prepare()
    lengths = schedule_of(bench, "dense", bench.frames).chunk_lengths()
    dit = random_wan(bench, device, dtype)
    vae = None
    if bench.decode:
        vae = vae_from_state_dict(random_vae_state_dict(dim=bench.vae_dim), dtype=dtype, device=device)
    warm_frames = 4 * (3 * family_of(bench).frames_per_chunk) - 3
    recorders = {arm: RunRecorder(reads_blocks=False) for arm in bench.arm}

    def run(arm: str, frames: int) -> Iterator[dict[str, float]]:
        return _seconds(bench, dit, vae, device, schedule_of(bench, arm, frames), recorders[arm])

    for arm in bench.arm:
        for _ in run(arm, min(warm_frames, bench.frames)):
            pass
    gc.collect()
    memory = PeakMemory(device)
    rounds: list[list[dict[str, Any]]] = []
    for number in range(bench.rounds):
        turns = {arm: run(arm, bench.frames) for arm in bench.arm}
        rounds.append([])
        for index, frames in enumerate(lengths):
            memory.reset()
            row = {"chunk": index + 1, "latent_frames": frames, **{arm: next(turn) for arm, turn in turns.items()}}
            rounds[-1].append(row | {"peak_bytes": memory.peak()})
            say(f"chunk {number * len(lengths) + index + 1} of {bench.rounds * len(lengths)}")
        for turn in turns.values():
            next(turn, None)  # ends the run, which then says how its graphs went
    rows = [over_rounds(same, bench.arm) for same in zip(*rounds, strict=True)]
    return {
        "bench": "rollout",
        **facts(device, bench),
        "warm_up": WARM_UP,
        "timed": "a chunk's seconds run from the chunk before it to its own arrival: the clean pass that commits the "
        "former, then 4 denoising steps",
        "cuda_graphs": {arm: one.facts.get("CUDA graphs", "switched off") for arm, one in recorders.items()},
        "memory": memory.rule,
        "bytes_before": memory.before,
        **summarise(rows, bench.arm),
        "chunks": rows,
    }


def random_wan(bench: RolloutBench, device: torch.device, dtype: torch.dtype) -> Wan:
    sizes = asdict(bench.model) | {"layers": bench.model.layers or 2}
    return wan_from_state_dict(random_state_dict(**sizes, dtype=dtype), device=device)


def recipe_of(bench: RolloutBench, schedule: Schedule, device: torch.device) -> Recipe:
    family = family_of(bench)
    return Recipe(
        latent_shape=(1, 16, schedule.latent_frames, *bench.picture.latent),
        sigmas=few_step_sigmas(family.denoising_steps, family.shift),
        context=torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(0)).to(device),
        attention=published(bench.backend, bench.picture.block, family),
        **schedule.arguments(),
    )


def family_of(bench: RolloutBench) -> Family:
    return FAMILIES[f"light_forcing_{bench.setting}"]


def schedule_of(bench: RolloutBench, arm: str, frames: int) -> Schedule:
    schedule = Schedule.of_family(family_of(bench), latent_frames_of(frames))
    if arm == "even":
        return replace(schedule, curve="constant", base=schedule.target)
    return schedule if arm == "sparse" else schedule.dense()


def over_rounds(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Merge one chunk's rows of all rounds: median seconds, maximal memory."""
    peak = max(row["peak_bytes"] for row in rows)
    return rows[0] | {arm: medians([row[arm] for row in rows]) for arm in arms} | {"peak_bytes": peak}


def _seconds(
    bench: RolloutBench,
    dit: Wan,
    vae: nn.Module | None,
    device: torch.device,
    schedule: Schedule,
    recorder: RunRecorder,
) -> Iterator[dict[str, float]]:
    """Make a video; yield the seconds of each chunk: `sample` and, with a VAE, `decode`, or `both` if they overlap.

    Both together run from the arrival of one chunk's frames to the next, since waiting for the device would end the
    overlap. The first chunk's share ends with its sampling, the last one's includes the frames of two chunks.
    """
    recipe, overlaps, count = recipe_of(bench, schedule, device), bench.overlap, len(schedule.chunk_lengths())
    decoder = graph = None
    if vae:
        weights = Weights(vae, indexed(device))
        if bench.cuda_graph != "off" and CudaRecorder.why_not(device) is None:
            measuring = None if bench.cuda_graph == "on" else machine.measuring
            graph = PassGraph(CudaRecorder(device, lane="decode"), weights, measuring)
        decoder = OverlappedDecoder(StreamingDecoder(vae, graph=graph), weights, concurrent=overlaps)
    chunks = rollout(dit, recipe, Runtime(recorder=recorder, cuda_graph=bench.cuda_graph))

    def now() -> float:
        if device.type == "cuda" and not overlaps:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    while True:
        start = now()
        chunk = next(chunks, None)
        if chunk is None:
            return
        seconds = {"sample": now() - start}
        if decoder is not None:
            start = now()
            decoder.put(chunk.latents)
            if overlaps and chunk.index == count - 1:
                decoder.rest()
            seconds["decode"] = now() - start
        del chunk
        yield {"both": sum(seconds.values())} if overlaps else seconds


class PeakMemory:
    """Peak memory since `reset`: of torch's allocator on a GPU, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        holder = "torch's CUDA allocator" if self._cuda else "the process's resident memory"
        self.rule = f"peak of {holder} since the chunk began, or the process if it cannot be reset; all arms together"
        self.reset()
        self.before = self.peak()

    def reset(self) -> None:
        """Reset the peak if the system allows it; else it only grows, which hides no leak."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        with suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Bytes."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._cuda)
        if sys.platform == "linux":  # whose getrusage ignores `reset`
            status = Path("/proc/self/status").read_text(encoding="ascii")
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


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
        dense, sparse = (seconds[arm] for arm in PAIR)
        sampling = [rows[full[-1]][arm]["sample"] for arm in PAIR]
        result["dense_over_sparse"] = {
            "video": sum(dense) / sum(sparse),
            "last_chunk": dense[full[-1]] / sparse[full[-1]],
            "last_chunk_sampling": sampling[0] / sampling[1],
        }
    if len(full) >= 2 * EARLY:
        early, late = rows[full[EARLY - 1]], rows[full[min(LATE, len(full)) - 1]]
        flatness = {"chunks": [EARLY, late["chunk"]], "memory": late["peak_bytes"] / early["peak_bytes"]}
        for arm in arms:
            of_full = [seconds[arm][place] for place in full]
            first, last = of_full[EARLY - 1 : 2 * EARLY], of_full[-LAST:]
            flatness[f"{arm}_seconds"] = statistics.median(last) / statistics.median(first)
        result["flatness"] = flatness
    return result | {
        "seconds": {arm: sum(values) for arm, values in seconds.items()},
        "peak_bytes": max(row["peak_bytes"] for row in rows),
    }
