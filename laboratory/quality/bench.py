"""Make the videos of every arm and seed with the same noise, and judge them: a row each, see `rows.py`; resumable.

Rows that a folder holds are not made again, so an interrupted run continues, and later runs add arms, seeds and
sparsities.
"""

import copy
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from lightforcing.benchmarks.settings import Machine
from lightforcing.benchmarks.step import quantize_linears
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.demo.captions import caption_of, context_of_caption
from lightforcing.lightforcing_core.demo.model import DIT, SHIPPED, DemoModel, DemoVideo, demo_video, load_demo_model
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Recipe, few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.runtime import Chunk, Runtime
from lightforcing.lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder

from .arms import Arm, all_arms, chosen
from .measures import against_caption, against_dense, over_time
from .probe import AttentionProbe, is_probed
from .rows import ROWS, Row, lines_of, open_rows, rounded
from .scenes import PROMPTS, prompt_scenes


@dataclass(frozen=True)
class QualityBench:
    """The videos that are made and compared. Every field is an option of the command, its annotation the help."""

    models: Annotated[Path, "Folder of a demo model."] = SHIPPED
    arms: Annotated[tuple[str, ...], 'Arms by name or pattern: "dense,published,long *"; all by default.'] = ()
    seeds: Annotated[tuple[int, ...], "Seeds, a video each per arm."] = tuple(range(32))
    sparsities: Annotated[tuple[float, ...], "Mean sparsities of the sparse chunks."] = (0.5, 0.75, 0.88)
    keep: Annotated[tuple[int, int, int], "Past latent frames that stay eligible; of them sinks, nearest."] = (6, 1, 2)
    long_frames: Annotated[int, "Video frames of long rollouts, 1 + 4k; 0 makes none."] = 241
    window: Annotated[tuple[int, int], "Visible latent frames and sinks of long rollouts."] = (12, 1)
    probes: Annotated[int, "The number of seeds whose attention is compared layer by layer."] = 8
    batch: Annotated[int, "Seeds that run together; 8 suit two CPU cores."] = 8
    backend: Annotated[str, "Sparse backend."] = "reference"
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be one or more, each once")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is not positive; 8 seeds at once suit two CPU cores")
        if self.long_frames:
            latent_frames_of(self.long_frames)

    def shared(self) -> Row:
        """The settings that all rows of one folder have in common."""
        weights = zlib.crc32((self.models / DIT).read_bytes())
        return {"model": f"{weights:08x}", "keep": list(self.keep), "prompts": PROMPTS} | (
            {"long_frames": self.long_frames, "window": list(self.window)} if self.long_frames else {}
        )

    def schedules(self, video: DemoVideo) -> tuple[Schedule, Schedule | None]:
        """The dense schedules of a video as long as in training, and of a long one."""
        short = Schedule(video.latent_frames, video.frames_per_chunk)
        if not self.long_frames:
            return short, None
        window, sinks = min(self.window[0], video.latent_frames), self.window[1]  # the model never saw further
        frames = latent_frames_of(self.long_frames)
        return short, Schedule(frames, video.frames_per_chunk, window, sink_frames=sinks, sink_rope="follow")

    def chosen_arms(self, video: DemoVideo) -> dict[str, Arm]:
        """The arms that run. Raises ValueError for patterns that match none."""
        attention = AttentionOptions(self.backend, (video.block, video.block), *self.keep)
        return chosen(all_arms(*self.schedules(video), self.sparsities, attention), self.arms)


def run_quality(
    bench: QualityBench, folder: Path, on_row: Callable[[int, int], object] = lambda done, total: None
) -> list[Row]:
    """Make the rows that are missing in `folder`; all rows there, those of earlier runs too.

    on_row: called as on_row(done, total) of this run. Raises ValueError for a folder with rows of another model.
    """
    video = demo_video(bench.models)
    arms = bench.chosen_arms(video)
    device = bench.machine.prepare()
    rows = open_rows(folder, bench.shared())
    done = {_key(row) for row in rows}
    wanted = [(_kind(arm), arm.name, seed) for arm in arms.values() for seed in bench.seeds]
    probed = [arm.name for arm in arms.values() if is_probed(arm)]
    wanted += [("attention", name, seed) for name in probed for seed in bench.seeds[: bench.probes]]
    missing = [key for key in wanted if key not in done]
    if not missing:
        return rows
    maker = _Maker(bench, load_demo_model(bench.models, device), rows)
    made = 0
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        for found in maker.rows(arms, missing):
            new = [rounded(row) for row in found]
            file.write(lines_of(new))
            file.flush()
            rows += new
            made += len(new)
            on_row(made, len(missing))
    return rows


def _kind(arm: Arm) -> str:
    return "long" if arm.is_long else "video"


def _key(row: Row) -> tuple[str, str, int]:
    return row["kind"], row["arm"], row["seed"]


class _Maker:
    """A loaded model and, if an arm wants one, its FP8 twin, which make the rows.

    made: all rows so far, in which an arm finds the densities of the one that it is `like`.
    """

    def __init__(self, bench: QualityBench, model: DemoModel, made: Sequence[Row]) -> None:
        self._bench, self._model, self._video, self._rows = bench, model, model.video, made
        self._short, self._long = bench.schedules(model.video)
        self._scenes = prompt_scenes(model.video.level)
        self._sigmas = few_step_sigmas()
        self._fp8: Any = None

    def rows(self, arms: dict[str, Arm], missing: Sequence[tuple[str, str, int]]) -> Iterator[list[Row]]:
        """The rows for the missing (kind, arm, seed), in lists of those that were made together."""
        for start in range(0, len(self._bench.seeds), self._bench.batch):
            seeds = self._bench.seeds[start : start + self._bench.batch]
            todo = {key for key in missing if key[2] in seeds}
            dense: tuple[Tensor, Tensor] | None = None
            for arm in arms.values():
                left = [seed for seed in seeds if (_kind(arm), arm.name, seed) in todo]
                if not left:
                    continue
                if not arm.is_long and dense is None:
                    dense = self._made(arms.get("dense") or Arm("dense", None, arm.attention), seeds)[:2]
                yield self._judged(self._at_densities(arm, seeds), seeds, left, dense)
            probed = [
                self._at_densities(arm, seeds)
                for arm in arms.values()
                if any(key[:2] == ("attention", arm.name) for key in todo)
            ]
            if probed:
                found = self._probed(
                    probed, [seed for seed in seeds if seed in self._bench.seeds[: self._bench.probes]]
                )
                yield [row for row in found if _key(row) in todo]

    def _at_densities(self, arm: Arm, seeds: Sequence[int]) -> Arm:
        """`arm` with the growth that reads as much as the arm that it is like read in videos of these seeds."""
        if not arm.like:
            return arm
        read = [row["densities"] for row in self._rows if _key(row)[:2] == ("video", arm.like) and row["seed"] in seeds]
        per_frame = FrameBlocks(self._video.height * self._video.width // 256, arm.attention.block[1]).per_frame
        # Half a block more, because a rule rounds its number of blocks down.
        halves = [0.5 / (per_frame * end) for end in accumulate(self._short.chunk_lengths())]
        read_on_average = map(statistics.fmean, zip(*read, strict=True))
        growth = (max(0.0, 1.0 - share - half) for share, half in zip(read_on_average, halves, strict=True))
        return replace(arm, growth=tuple(growth))

    def _judged(
        self, arm: Arm, seeds: Sequence[int], left: Sequence[int], dense: tuple[Tensor, Tensor] | None
    ) -> list[Row]:
        """The rows of one arm for the seeds that are left; dense: latents and videos of all seeds, for short arms."""
        began = time.perf_counter()
        latents, videos, densities = self._made(arm, left)
        seconds = round((time.perf_counter() - began) / len(left), 3)
        schedule = self._schedule(arm)
        lengths, flops = schedule.chunk_lengths(), _flops(densities, schedule)
        rows = []
        for index, seed in enumerate(left):
            scene = self._scenes[seed % PROMPTS]
            row: Row = {"kind": _kind(arm), "arm": arm.name, "seed": seed, "caption": caption_of(scene)}
            row |= {"seconds": seconds, "densities": densities, "flops": flops}
            if arm.is_long:
                row |= over_time(videos[index], scene, lengths)
            else:
                assert dense is not None
                place = seeds.index(seed)
                row |= against_dense(latents[index], videos[index], dense[0][place], dense[1][place], lengths)
            row |= against_caption(videos[index], scene)
            rows.append(row)
        return rows

    def _probed(self, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Row]:
        """Per arm and seed: the error of each layer's attention, chunk by chunk, and its mean over sparse chunks."""
        grid = self._video.height // 16, self._video.width // 16
        probe = AttentionProbe(self._model.dit, grid, self._sigmas[-2], arms)
        dense = Arm("dense", None, arms[0].attention)
        for _ in self._chunks(dense, seeds, denoise=probe.denoise, dense_attention=probe.attention):
            pass
        rows = []
        for name, chunks in probe.errors.items():
            for index, seed in enumerate(seeds):
                errors = [[layer[index] for layer in chunk] for chunk in chunks]
                # The first chunk is dense in every arm and would only dilute the error.
                mean = statistics.fmean(error for chunk in errors[1:] for error in chunk) if errors[1:] else None
                row = {"kind": "attention", "arm": name, "seed": seed, "attention_error": mean, "errors": errors}
                rows.append(row)
        return rows

    def _made(self, arm: Arm, seeds: Sequence[int]) -> tuple[Tensor, Tensor, list[float]]:
        """Latents [B, 16, F, h, w], videos [B, frames, H, W, 3] in 0…1, and the density of each chunk; on the CPU.

        A density is the share of all frames in the schedule's window, also if the cache holds fewer.
        """
        recorder, decoder = RunRecorder(), StreamingDecoder(self._model.vae)
        latents, videos = [], []
        for chunk in self._chunks(arm, seeds, recorder=recorder):
            latents.append(chunk.latents.float().cpu())
            videos.append(decoder.decode(chunk.latents).float().cpu())
        densities = [one.cost.density for one in recorder.finish().chunks]
        return torch.cat(latents, 2), torch.cat(videos, 1), densities

    def _chunks(self, arm: Arm, seeds: Sequence[int], **callbacks: Any) -> Iterator[Chunk]:
        schedule, dit = self._schedule(arm), self._model.dit
        if arm.fp8:
            if self._fp8 is None:
                self._fp8 = copy.deepcopy(dit)
                quantize_linears(self._fp8)
            dit = self._fp8
        captions = (caption_of(self._scenes[seed % PROMPTS]) for seed in seeds)
        context = torch.cat([context_of_caption(self._model.table, caption) for caption in captions])
        draws = [seeded_noise(seed) for seed in seeds]

        def noise(chunk: int, number: int, shape: tuple[int, ...]) -> Tensor:
            return torch.cat([draw(chunk, number, (1, *shape[1:])) for draw in draws])

        recipe = Recipe(
            latent_shape=(len(seeds), 16, schedule.latent_frames, self._video.height // 8, self._video.width // 8),
            sigmas=self._sigmas,
            context=context.to(dit.dtype),
            attention=arm.attention,
            **schedule.arguments(),
        )
        return rollout(dit, replace(recipe, growth=arm.growth), Runtime(kv=arm.kv, noise=noise, **callbacks))

    def _schedule(self, arm: Arm) -> Schedule:
        schedule = self._long if arm.is_long else self._short
        assert schedule is not None
        if arm.attention.cache_rule is not None:  # it brings first frames back itself, into the window of training
            return replace(schedule, window=self._video.latent_frames, sink_frames=0, sink_rope="fixed")
        return schedule


def _flops(densities: Sequence[float], schedule: Schedule) -> float:
    """Attention's FLOPs over those of dense attention with the same window."""
    sparse = dense = 0.0
    end = 0
    for density, frames in zip(densities, schedule.chunk_lengths(), strict=True):
        end += frames
        pairs = frames * min(end, schedule.window or end)
        sparse, dense = sparse + density * pairs, dense + pairs
    return sparse / dense
