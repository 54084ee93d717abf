"""`bench rollout`: whole videos, chunk by chunk: seconds, peak memory, and whether both stay flat when it gets long."""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lightforcing_core.attention.dispatch import AttentionOptions
from ..lightforcing_core.families import FAMILIES, Family
from ..lightforcing_core.model.causal import CausalState, forward
from ..lightforcing_core.model.cuda_graph import CudaGraph, CudaRecorder, why_no_graph
from ..lightforcing_core.model.wan import Wan, random_state_dict, wan_from_state_dict
from ..lightforcing_core.rollout.rollout import Chunk, few_step_sigmas, rollout
from ..lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from ..lightforcing_core.vae.overlap import OverlappedDecoder
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .record import facts

PAIR = ("dense", "sparse")
ARMS = (*PAIR, "even")
FAMILY_OF = {"short": "light_forcing_short", "long": "light_forcing_long"}
EARLY, LATE = 10, 80  # the chunks, counted from 1, whose memory is compared
LAST = 10  # chunks whose median time is compared with chunks EARLY … 2 · EARLY
WARM_UP = "each arm runs its first three chunks once, a sparse one among them, before anything is timed"


@dataclass(frozen=True)
class RolloutBench:
    """What is measured: `frames` video frames (1 + 4·k) with weights of the given sizes, random.

    arms: any of "dense", "sparse" and "even", which then take turns chunk by chunk in one process; "even" is sparse
    without growth, so that every chunk has the same work once the window is full. setting: "short" sees everything;
    "long" has window 12 and one sink. decode: also decode each chunk, with a VAE of width `vae_dim`
    (24 is LightVAE's); overlap: on a GPU beside the sampling of the next chunk. cuda_graph: as in `rollout`.
    height, width: video pixels. rounds: how often each video is made; a chunk's seconds are their median.
    """

    frames: int = 81
    arms: tuple[str, ...] = PAIR
    setting: str = "short"
    decode: bool = False
    overlap: bool = False
    cuda_graph: CudaGraph = "auto"
    vae_dim: int = 24
    dim: int = 256
    ffn_dim: int = 512
    layers: int = 2
    text_tokens: int = 64
    height: int = 64
    width: int = 96
    block: tuple[int, int] = (64, 64)
    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "bfloat16"
    seed: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        latent_frames_of(self.frames)
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds} is not positive; one round makes every video once")
        if not self.arms or any(arm not in ARMS for arm in self.arms):
            raise ValueError(f"arms {self.arms} must be one or more of {', '.join(ARMS)}")
        if self.setting not in FAMILY_OF:
            raise ValueError(f"setting {self.setting!r} is not known; use short or long")
        if self.cuda_graph == "on" and (reason := CudaRecorder.why_not(torch.device(self.device))):
            raise ValueError(f"cuda_graph 'on' cannot run: {reason}; use 'auto' or 'off'")
        if self.overlap and not self.decode:
            raise ValueError("overlap is about decoding beside the sampling; ask for decode too")
        if self.overlap and len(self.arms) > 1:
            raise ValueError(f"arms {', '.join(self.arms)} take turns and would overlap each other; ask for one arm")

    @property
    def family(self) -> Family:
        return FAMILIES[FAMILY_OF[self.setting]]

    def schedule(self, arm: str, frames: int | None = None) -> Schedule:
        """The recipe of one arm; `frames` video frames instead of all."""
        schedule = Schedule.of_family(self.family, latent_frames_of(frames or self.frames))
        if arm == "even":
            return replace(schedule, curve="constant", base=schedule.target)
        return schedule if arm == "sparse" else schedule.dense()


def run_rollout(bench: RolloutBench, on_chunk: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run every arm; returns the record that `bench rollout` writes. on_chunk: called as on_chunk(done, total)."""
    device, dtype = torch.device(bench.device), getattr(torch, bench.dtype)
    dit = wan_from_state_dict(
        random_state_dict(dim=bench.dim, ffn_dim=bench.ffn_dim, layers=bench.layers, seed=bench.seed, dtype=dtype),
        device=device,
    )
    vae = None
    if bench.decode:
        vae = vae_from_state_dict(random_vae_state_dict(dim=bench.vae_dim, seed=bench.seed), dtype=dtype, device=device)
    warm_frames = 4 * (3 * bench.family.frames_per_chunk) - 3
    for arm in bench.arms:
        for _ in _Arm(bench, arm, dit, vae, frames=min(warm_frames, bench.frames)).run():
            pass
    gc.collect()
    memory = PeakMemory(device)
    lengths = bench.schedule("dense").chunk_lengths()
    rounds: list[list[dict[str, Any]]] = []
    for number in range(bench.rounds):
        running = {arm: _Arm(bench, arm, dit, vae) for arm in bench.arms}
        turns = [arm.run() for arm in running.values()]
        rounds.append([])
        for index, frames in enumerate(lengths):
            memory.reset()
            row: dict[str, Any] = {"chunk": index + 1, "latent_frames": frames}
            for arm, turn in zip(running, turns, strict=True):
                row[arm] = next(turn)
            row["peak_bytes"] = memory.peak()
            rounds[-1].append(row)
            if on_chunk is not None:
                on_chunk(number * len(lengths) + index + 1, bench.rounds * len(lengths))
    rows = [_over_rounds(same, bench.arms) for same in zip(*rounds, strict=True)]
    return {
        "bench": "rollout",
        **facts(device, asdict(bench)),
        "warm_up": WARM_UP,
        "timed": "a chunk's seconds run from the chunk before it to its own arrival: the clean pass that commits the "
        "former, then 4 denoising steps",
        "cuda_graphs": {name: arm.graphs for name, arm in running.items()},
        "memory": memory.rule,
        "bytes_before": memory.before,
        **summarise(rows, bench.arms),
        "chunks": rows,
    }


def _over_rounds(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """One chunk's rows of all rounds as one: the median of the seconds, the most memory."""
    merged = {**rows[0], "peak_bytes": max(row["peak_bytes"] for row in rows)}
    for arm in arms:
        merged[arm] = {part: statistics.median(row[arm][part] for row in rows) for part in rows[0][arm]}
    return merged


class _Arm:
    """One rollout, advanced a chunk at a time."""

    def __init__(self, bench: RolloutBench, arm: str, dit: Wan, vae: nn.Module | None, frames: int | None = None):
        self._device = torch.device(bench.device)
        schedule = bench.schedule(arm, frames)
        family = bench.family
        generator = torch.Generator().manual_seed(bench.seed)
        context = torch.randn(1, bench.text_tokens, 4096, generator=generator).to(self._device)
        self._decoder = None
        if vae is not None:
            self._decoder = OverlappedDecoder(StreamingDecoder(vae), self._device, beside=bench.overlap)
        self._overlaps, self._count = bench.overlap, len(schedule.chunk_lengths())
        self._state: CausalState | None = None
        self._why_no_graph = why_no_graph(dit, self._device, kv_in_host_memory=False)
        if bench.cuda_graph == "off":
            self._why_no_graph = "not asked for"

        def denoise(x: Tensor, sigma: float, state: CausalState) -> Tensor:
            self._state = state
            timestep = torch.full((x.shape[0],), sigma * 1000.0, device=self._device)
            assert state.text is not None
            return x - sigma * forward(dit, x.to(dit.dtype), timestep, state.text, state).float()

        self._chunks: Iterator[Chunk] = rollout(
            dit,
            context,
            latent_shape=(1, 16, schedule.latent_frames, bench.height // 8, bench.width // 8),
            frames_per_chunk=schedule.frames_per_chunk,
            sigmas=few_step_sigmas(family.denoising_steps, family.shift),
            growth=schedule.sparsities(),
            window=schedule.window,
            sink_frames=schedule.sink_frames,
            sink_rope=schedule.sink_rope,
            seed=bench.seed,
            attention=AttentionOptions(
                bench.backend, bench.block, family.keep_frames, family.keep_sink, family.keep_near
            ),
            denoise=denoise,
            cuda_graph=bench.cuda_graph,
        )

    @property
    def graphs(self) -> str:
        """What became of CUDA graphs, in words."""
        graph = self._state and self._state.graph
        if not graph:
            return f"none: {self._why_no_graph}"
        return f"none: {graph.why_off}" if graph.why_off else f"{graph.launches} steps launched as graphs"

    def run(self) -> Iterator[dict[str, float]]:
        """Seconds of each chunk: `sample` and, with a VAE, `decode`, or `both` where they overlap."""
        if self._overlaps:
            yield from self._run_overlapped()
            return
        while True:
            start = self._now()
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            seconds = {"sample": self._now() - start}
            if self._decoder is not None:
                start = self._now()
                self._decoder.put(chunk.latents)
                seconds["decode"] = self._now() - start
            del chunk
            yield seconds

    def _run_overlapped(self) -> Iterator[dict[str, float]]:
        """From the moment that one chunk's frames are there to the next; waiting for the device would end the overlap.

        The first chunk's share ends when it is asked for, the last one's holds the frames of two.
        """
        assert self._decoder is not None
        start = self._now()
        for chunk in self._chunks:
            self._decoder.put(chunk.latents)
            if chunk.index == self._count - 1:
                self._decoder.rest()
            end = time.perf_counter()
            yield {"both": end - start}
            start = end

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class PeakMemory:
    """The most memory held since `reset`: torch's allocator on a GPU, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._resets = False
        self.reset()
        where = "torch's CUDA allocator" if self._on_gpu else "the process's resident memory"
        when = "since the chunk began" if self._on_gpu or self._resets else "since the process began"
        self.rule = f"peak of {where} {when}, all arms together"
        self.before = self.peak()

    def reset(self) -> None:
        """Begin a new peak, where the system allows it."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._resets = True
        except OSError:  # not Linux, or not allowed: the peak then only grows, which hides no leak
            self._resets = False

    def peak(self) -> int:
        """Bytes."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text(encoding="ascii")
        except OSError:
            import resource
            import sys

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


def summarise(rows: list[dict[str, Any]], arms: tuple[str, ...]) -> dict[str, Any]:
    """Ratios first, from the rows of `run_rollout`; only chunks of full length count.

    `dense_over_sparse`: of whole videos and of the last chunk. `flatness`: needs at least 2 · EARLY chunks; memory
    of chunk LATE (or the last one) over chunk EARLY, and per arm the median seconds of the last chunks over those
    of chunks EARLY … 2 · EARLY.
    """
    full = [row for row in rows if row["latent_frames"] == rows[0]["latent_frames"]]

    def seconds(row: dict[str, Any], arm: str) -> float:
        return sum(row[arm].values())

    result: dict[str, Any] = {}
    if set(PAIR) <= set(arms):
        totals = {arm: sum(seconds(row, arm) for row in rows) for arm in PAIR}
        result["dense_over_sparse"] = {
            "video": totals["dense"] / totals["sparse"],
            "last_chunk": seconds(full[-1], "dense") / seconds(full[-1], "sparse"),
            "last_chunk_sampling": full[-1]["dense"]["sample"] / full[-1]["sparse"]["sample"],
        }
    if len(full) >= 2 * EARLY:
        late = full[min(LATE, len(full)) - 1]
        flatness: dict[str, Any] = {
            "chunks": [EARLY, late["chunk"]],
            "memory": late["peak_bytes"] / full[EARLY - 1]["peak_bytes"],
        }
        for arm in arms:
            early = statistics.median(seconds(row, arm) for row in islice(full, EARLY - 1, 2 * EARLY))
            flatness[f"{arm}_seconds"] = statistics.median(seconds(row, arm) for row in full[-LAST:]) / early
        result["flatness"] = flatness
    result["seconds"] = {arm: sum(seconds(row, arm) for row in rows) for arm in arms}
    result["peak_bytes"] = max(row["peak_bytes"] for row in rows)
    return result
