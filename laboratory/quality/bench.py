"""the laboratory: many videos of the demo model, each arm with the same noise, judged and compared; resumable.

Every video is one row of `rows.jsonl` in the output folder, appended as soon as it is judged. What is there already
is not made again, so an interrupted run goes on, and later runs add arms, seeds and sparsities.
"""

import copy
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.demo.captions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PASSING,
    SHAPES,
    SPEEDS,
    Scene,
    Thing,
    caption_of,
    context_of_caption,
)
from lightforcing.lightforcing_core.demo.model import DIT, DemoModel, DemoVideo, Level, demo_video, load_demo_model
from lightforcing.lightforcing_core.files.output import prepare_folder, whole_file
from lightforcing.lightforcing_core.fp8.linear import quantize_linears
from lightforcing.lightforcing_core.rollout.rollout import StepEvent, few_step_sigmas, rollout, seeded_noise
from lightforcing.lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder

from .arms import Arm, all_arms, chosen
from .measures import against_caption, against_dense, over_time
from .probe import AttentionProbe, is_probed

ROWS = "rows.jsonl"
PROMPTS = 64  # the fixed list; seed i follows prompt i, modulo this

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class QualityBench:
    """What is made and compared.

    models: folder of the demo model. seeds: a video each per arm; probe_seeds: the first so many of them are also
    probed layer by layer. sparsities, arms: see `quality_arms`; arms are patterns, none means all. keep: past latent
    frames that stay eligible, and how many of them are sinks and nearest ones. long_frames: video frames of long
    rollouts, 0 for none, in a window of so many latent frames with so many sinks. batch: seeds that run together.
    """

    models: Path
    seeds: tuple[int, ...] = tuple(range(32))
    sparsities: tuple[float, ...] = (0.5, 0.75, 0.88)
    arms: tuple[str, ...] = ()
    keep: tuple[int, int, int] = (6, 1, 2)
    long_frames: int = 241
    window: tuple[int, int] = (12, 1)
    probe_seeds: int = 8
    batch: int = 8
    backend: str = "reference"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be one or more, each once")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is not positive; 8 seeds at once suit two CPU cores")
        if self.long_frames:
            latent_frames_of(self.long_frames)

    def header(self) -> Row:
        """What all rows of one folder share."""
        weights = zlib.crc32((self.models / DIT).read_bytes())
        return {"model": f"{weights:08x}", "keep": list(self.keep), "prompts": PROMPTS} | (
            {"long_frames": self.long_frames, "window": list(self.window)} if self.long_frames else {}
        )

    def attention(self, video: DemoVideo) -> AttentionOptions:
        """The published method, in blocks that suit the video."""
        return AttentionOptions(self.backend, (video.block, video.block), *self.keep)

    def schedules(self, video: DemoVideo) -> tuple[Schedule, Schedule | None]:
        """The dense schedules of a video as long as in training, and of a long one."""
        short = Schedule(video.latent_frames, video.frames_per_chunk)
        if not self.long_frames:
            return short, None
        window, sinks = self.window
        window = min(window, video.latent_frames)  # the model never saw further
        long = Schedule(
            latent_frames_of(self.long_frames), video.frames_per_chunk, window, sink_frames=sinks, sink_rope="follow"
        )
        return short, long

    def chosen_arms(self, video: DemoVideo) -> dict[str, Arm]:
        """The arms that run. Raises ValueError for patterns that match none."""
        return chosen(all_arms(*self.schedules(video), self.sparsities, self.attention(video)), self.arms)


def run_quality(bench: QualityBench, folder: Path, on_row: Callable[[int, int], None] | None = None) -> list[Row]:
    """Make what is missing in `folder`/rows.jsonl; all rows there, those of earlier runs too.

    on_row: called as on_row(done, total) of this run. Raises ValueError for a folder with rows of another model.
    """
    video = demo_video(bench.models)
    arms = bench.chosen_arms(video)
    rows = open_rows(folder, bench.header())
    done = {(row["kind"], row["arm"], row["seed"]) for row in rows}
    wanted = [(_kind(arm), arm.name, seed) for arm in arms.values() for seed in bench.seeds]
    wanted += [
        ("attention", arm.name, seed)
        for arm in arms.values()
        for seed in bench.seeds[: bench.probe_seeds]
        if is_probed(arm)
    ]
    missing = [key for key in wanted if key not in done]
    if not missing:
        return rows
    laboratory = _Laboratory(bench, load_demo_model(bench.models, bench.device))
    made = 0
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        for new in laboratory.rows(arms, missing):
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            rows += new
            made += len(new)
            if on_row is not None:
                on_row(made, len(missing))
    return rows


def prompt_scenes(level: Level, count: int = PROMPTS) -> list[Scene]:
    """A fixed list of scenes in which all words come equally often; at level "full" every second has two things, and
    at level "pillar" each goes one of the ways that lead behind it."""
    dice = random.Random("light forcing quality laboratory")

    def dealt(words: Sequence[T]) -> Iterator[T]:
        while True:
            yield from dice.sample(list(words), len(words))

    decks = [dealt(words) for words in (COLOURS, SHAPES, tuple(DIRECTIONS), SPEEDS)]
    backgrounds, passing = dealt(BACKGROUNDS), dealt(PASSING)
    scenes = []
    for index in range(count):
        things = [Thing(*(next(deck) for deck in decks))]
        if level == "pillar":
            things = [Thing(things[0].colour, things[0].shape, *next(passing))]
        if level == "full" and index % 2:
            second = Thing(*(next(deck) for deck in decks))
            while second.colour == things[0].colour:
                second = Thing(next(decks[0]), second.shape, second.direction, second.speed)
            things.append(second)
        scenes.append(Scene(next(backgrounds) if level == "full" else "plain", tuple(things)))
    return scenes


def open_rows(folder: Path, header: Row) -> list[Row]:
    """The rows of `folder`, a half-written last line cut off; the file begins with `header`.

    Raises ValueError where it begins with another one, OutputError where the folder takes no files.
    """
    file = prepare_folder(folder) / ROWS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        whole = [json.dumps(header) + "\n"]
    if json.loads(whole[0]) != header:
        raise ValueError(
            f"{file} holds rows of another model or setting ({whole[0].strip()}, here {json.dumps(header)}); "
            f"choose another --out"
        )
    if whole != lines:
        with whole_file(file) as partial:
            partial.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole[1:]]


def _kind(arm: Arm) -> str:
    return "long" if arm.is_long else "video"


class _Laboratory:
    """A loaded model, its FP8 twin where an arm wants one, and the dense videos of the seeds at hand."""

    def __init__(self, bench: QualityBench, model: DemoModel) -> None:
        self._bench, self._model, self._video = bench, model, model.video
        self._short, self._long = bench.schedules(model.video)
        self._scenes = prompt_scenes(model.video.level)
        self._sigmas = few_step_sigmas()
        self._fp8: Any = None

    def rows(self, arms: dict[str, Arm], missing: Sequence[tuple[str, str, int]]) -> Iterator[list[Row]]:
        """The rows for the missing (kind, arm, seed), in lists of those that were made together."""
        probe_seeds = self._bench.seeds[: self._bench.probe_seeds]
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
                yield self._judged(arm, seeds, left, dense)
            probed = [arm for arm in arms.values() if any(key[:2] == ("attention", arm.name) for key in todo)]
            if probed:
                found = self._probed(probed, [seed for seed in seeds if seed in probe_seeds])
                yield [row for row in found if (row["kind"], row["arm"], row["seed"]) in todo]

    def _judged(
        self, arm: Arm, seeds: Sequence[int], left: Sequence[int], dense: tuple[Tensor, Tensor] | None
    ) -> list[Row]:
        began = time.perf_counter()
        latents, videos, densities = self._made(arm, left)
        schedule = self._long if arm.is_long else self._short
        assert schedule is not None
        lengths = schedule.chunk_lengths()
        seconds = (time.perf_counter() - began) / len(left)
        rows = []
        for index, seed in enumerate(left):
            scene = self._scenes[seed % PROMPTS]
            row: Row = {"kind": _kind(arm), "arm": arm.name, "seed": seed, "caption": caption_of(scene)}
            row |= {"seconds": round(seconds, 3), "densities": densities, "flops": _flops(densities, schedule)}
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
        """Per arm and seed: the error of each layer's attention, chunk by chunk."""
        grid = self._video.height // 16, self._video.width // 16
        probe = AttentionProbe(self._model.dit, grid, self._sigmas[-2], arms)
        listening = {"denoise": probe.denoise, "dense_attention": probe.attention}
        for _ in self._chunks(Arm("dense", None, arms[0].attention), seeds, **listening):
            pass
        return [
            {
                "kind": "attention",
                "arm": name,
                "seed": seed,
                "errors": [[layer[index] for layer in chunk] for chunk in chunks],
            }
            for name, chunks in probe.errors.items()
            for index, seed in enumerate(seeds)
        ]

    def _made(self, arm: Arm, seeds: Sequence[int]) -> tuple[Tensor, Tensor, list[float]]:
        """Latents [B, 16, F, h, w], videos [B, frames, H, W, 3] in 0…1, and the density of each chunk; on the CPU."""
        densities: dict[int, float] = {}

        def on_step(event: StepEvent) -> None:
            densities[event.index] = event.density

        decoder = StreamingDecoder(self._model.vae)
        latents, videos = [], []
        for chunk in self._chunks(arm, seeds, on_step=on_step):
            latents.append(chunk.latents.float().cpu())
            videos.append(decoder.decode(chunk.latents).float().cpu())
        return torch.cat(latents, 2), torch.cat(videos, 1), [densities[index] for index in sorted(densities)]

    def _chunks(self, arm: Arm, seeds: Sequence[int], **listening: Any) -> Iterator[Any]:
        schedule = self._long if arm.is_long else self._short
        assert schedule is not None
        dit = self._model.dit
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

        return rollout(
            dit,
            context.to(dit.dtype),
            latent_shape=(len(seeds), 16, schedule.latent_frames, self._video.height // 8, self._video.width // 8),
            frames_per_chunk=schedule.frames_per_chunk,
            sigmas=self._sigmas,
            growth=arm.growth,
            window=schedule.window,
            sink_frames=schedule.sink_frames,
            sink_rope=schedule.sink_rope,
            attention=arm.attention,
            kv=arm.kv,
            noise=noise,
            **listening,
        )


def _flops(densities: Sequence[float], schedule: Schedule) -> float:
    """Attention's FLOPs over those of dense attention with the same window."""
    asked = dense = 0.0
    end = 0
    for density, frames in zip(densities, schedule.chunk_lengths(), strict=True):
        end += frames
        pairs = frames * min(end, schedule.window or end)
        asked, dense = asked + density * pairs, dense + pairs
    return asked / dense
