"""`bench rollout`: seconds and peak memory of whole videos, chunk by chunk.

The arms take turns in one process. "even" is sparse without growth, so that every chunk takes the same work once the
window is full. A chunk's time is that of its 4 denoising steps, its decode, and the clean pass that commits it.
"""

import gc
import statistics
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from ..lightforcing_core import machine
from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.model.wan import Wan
from ..lightforcing_core.pinned import Weights, indexed
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.record import RunRecord, RunRecorder
from ..lightforcing_core.rollout.runtime import Runtime
from ..lightforcing_core.rollout.schedule import Schedule, latent_frames_of, video_frames_of
from ..lightforcing_core.vae.graph import PassGraph
from ..lightforcing_core.vae.overlap import OverlappedDecoder
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .console import Put
from .layer import published
from .settings import PAIR, RolloutBench, Say
from .step import TEXT_DIM, random_wan
from .timing import describe, ratio

ARMS = (*PAIR, "even")
TEXT_TOKENS = 64
EARLY, LATE, LAST = 10, 80, 10  # chunks EARLY and LATE are compared, and the last LAST with EARLY … 2 · EARLY


def measure(bench: RolloutBench, put: Put, say: Say = str) -> None:
    """Run every arm, after its first three chunks untimed."""
    if not bench.arm or any(arm not in ARMS for arm in bench.arm):
        raise ValueError(f"arms {bench.arm} must be one or more of {', '.join(ARMS)}")
    device, dtype = bench.place.prepare()
    latent_frames_of(bench.frames)  # refuses a wrong length before weights are made
    describe(put, device, "rollout", bench)
    dit, vae = random_wan(bench.model, device, dtype), None
    if bench.decode:
        vae = vae_from_state_dict(random_vae_state_dict(dim=bench.vae_dim), dtype=dtype, device=device)

    def run(arm: str, frames: int) -> tuple[RunRecord, list[float]]:
        return _video(bench, dit, vae, recipe_of(bench, arm, frames, device))

    for arm in bench.arm:
        run(arm, min(12 * family_of(bench).frames_per_chunk - 3, bench.frames))
    gc.collect()
    videos: dict[str, list[tuple[RunRecord, list[float]]]] = {arm: [] for arm in bench.arm}
    for turn in range(bench.rounds):
        for arm in bench.arm[:: -1 if turn % 2 else 1]:
            say(f"{arm}, round {turn + 1} of {bench.rounds}")
            videos[arm].append(run(arm, bench.frames))
    summarise(videos, put)


def recipe_of(bench: RolloutBench, arm: str, frames: int, device: torch.device) -> Recipe:
    family = family_of(bench)
    schedule = Schedule.of_family(family, latent_frames_of(frames))
    if arm == "even":
        schedule = replace(schedule, curve="constant", base=schedule.target)
    elif arm == "dense":
        schedule = schedule.dense()
    return Recipe(
        latent_shape=(1, 16, schedule.latent_frames, *bench.picture.latent),
        sigmas=few_step_sigmas(family.denoising_steps, family.shift),
        context=torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(0)).to(device),
        attention=published(bench.backend, bench.picture.block, family),
        **schedule.arguments(),
    )


def family_of(bench: RolloutBench) -> Family:
    return FAMILIES[f"light_forcing_{bench.setting}"]


def _video(bench: RolloutBench, dit: Wan, vae: nn.Module | None, recipe: Recipe) -> tuple[RunRecord, list[float]]:
    """Make a video; returns its record and the peak MB of each chunk. With overlap the last chunk waits for all."""
    recorder, device, decoder = RunRecorder(reads_blocks=False), recipe.prompts[0].context.device, None
    if vae is not None:
        graph, weights = None, Weights(vae, indexed(device))
        if bench.cuda_graph != "off" and CudaRecorder.why_not(device) is None:
            measuring = None if bench.cuda_graph == "on" else machine.measuring
            graph = PassGraph(CudaRecorder(device, lane="decode"), weights, measuring)
        decoder = OverlappedDecoder(StreamingDecoder(vae, graph=graph), weights, concurrent=bench.overlap)
    peaks, last = [], len(recipe.chunk_lengths()) - 1
    for chunk in rollout(dit, recipe, Runtime(recorder=recorder, cuda_graph=bench.cuda_graph)):
        if decoder is not None:
            decoder.put(chunk.latents)
            if chunk.index == last:
                decoder.rest()
        peaks.append(peak_bytes(device) / 1e6)
    return recorder.finish(), peaks


def peak_bytes(device: torch.device) -> int:
    """The peak of torch's allocator since the last call on a GPU, else of the process; 0 on Windows."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def summarise(videos: Mapping[str, list[tuple[RunRecord, list[float]]]], put: Put) -> None:
    """Put chunks, clips, ratios, and how flat time and memory stay over chunks of full length.

    videos: records and peak MB of each chunk, by arm and round.
    """
    lengths = [chunk.frames for chunk in next(iter(videos.values()))[0][0].chunks]
    full = lengths.count(lengths[0])
    ms = {
        arm: [[1e3 * sum(chunk.seconds.values()) for chunk in record.chunks] for record, _ in rounds]
        for arm, rounds in videos.items()
    }
    put("ms", "rollout", ms)
    for arm, rounds in videos.items():
        medians = [statistics.median(times) for times in zip(*ms[arm], strict=True)]
        peaks = [max(same) for same in zip(*(peaks for _, peaks in rounds), strict=True)]
        record = rounds[-1][0]
        for chunk, median, peak in zip(record.chunks, medians, peaks, strict=True):
            columns = {f"{arm} ms": median, f"{arm} decode ms": 1e3 * chunk.seconds["output"], f"{arm} peak MB": peak}
            put("chunks", str(chunk.index + 1), {"latent frames": chunk.frames} | columns)
        frames, seconds = video_frames_of(sum(lengths)), statistics.median(map(sum, ms[arm])) / 1e3
        graphs = record.facts.get("CUDA graphs", "switched off")
        put("clip", arm, {"s": seconds, "FPS": frames / seconds, "CUDA graphs": graphs})
        if full >= 2 * EARLY:
            late, early, last = min(LATE, full), medians[EARLY - 1 : 2 * EARLY], medians[full - LAST : full]
            memory, time = peaks[late - 1] / peaks[EARLY - 1], statistics.median(last) / statistics.median(early)
            put("flatness", arm, {f"peak memory, chunk {late} / chunk {EARLY}": memory})
            put("flatness", arm, {f"time, last {LAST} chunks / chunks {EARLY}-{2 * EARLY}": time})
    if set(PAIR) <= set(videos):
        for name, some in (("video", slice(None)), ("last chunk", slice(full - 1, full))):
            put("times as fast as dense", name, ratio(*([sum(video[some]) for video in ms[arm]] for arm in PAIR)))
