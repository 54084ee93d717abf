"""Roll the exported model out over fixed captions, dense and sparse, and judge the videos by the detector."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laboratory.quality.detector import Verdict, judge
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.demo.captions import Scene, caption_of, context_of_caption
from lightforcing.lightforcing_core.demo.model import DemoModel, Level, load_demo_model
from lightforcing.lightforcing_core.families import Family
from lightforcing.lightforcing_core.files.output import whole_file
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from lightforcing.lightforcing_core.rollout.schedule import Schedule
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder

from .recipe import TrainingRecipe
from .shapes import draw_clip

TEST_SEED_OFFSET = 2_000_003


def evaluation_scenes(recipe: TrainingRecipe) -> dict[str, list[Scene]]:
    """As many different scenes of each lesson, from lists that training never draws from."""
    lessons = {"first": recipe.first, "second": recipe.second}
    return {name: _drawn(recipe, lesson.level) for name, lesson in lessons.items() if lesson is not None}


def _drawn(recipe: TrainingRecipe, level: Level) -> list[Scene]:
    found: dict[Scene, None] = {}
    drawn = (draw_clip(recipe.seed + TEST_SEED_OFFSET, index, level=level).scene for index in itertools.count())
    while len(found) < recipe.eval_captions:
        found[next(drawn)] = None
    return list(found)


def generate(
    models: DemoModel,
    scene: Scene,
    recipe: TrainingRecipe,
    *,
    seed: int,
    growth: list[float] | None = None,
) -> Tensor:
    """A video of the scene's caption, [frames, H, W, 3] in 0…1 on the CPU."""
    context, video = context_of_caption(models.table, caption_of(scene)), recipe.video
    video_recipe = Recipe(
        latent_shape=(1, 16, video.latent_frames, video.height // 8, video.width // 8),
        frames_per_chunk=video.frames_per_chunk,
        sigmas=few_step_sigmas(),
        context=context,
        growth=growth,
        seed=seed,
        attention=AttentionOptions(
            block=(video.block, video.block), estimator=Family.sparse.estimator, tail=Family.sparse.tail
        ),
    )
    decoder = StreamingDecoder(models.vae)
    return torch.cat([decoder.decode(chunk.latents)[0].float().cpu() for chunk in rollout(models.dit, video_recipe)])


def evaluate(recipe: TrainingRecipe, folder: Path, device: torch.device) -> dict:
    """Judge dense and sparse rollouts of each lesson's captions.

    Writes evaluation.json and one picture sheet each; returns (right, of) by "dense first" and so on.
    """
    models = load_demo_model(folder, device)
    schedule = Schedule(
        recipe.video.latent_frames, recipe.video.frames_per_chunk, target=Family.target, base=Family.base
    )
    growth = schedule.sparsities()
    results = {}
    for lesson, scenes in evaluation_scenes(recipe).items():
        for name, sparsities in (("dense", None), ("sparse", growth)):
            videos = [
                generate(models, scene, recipe, seed=seed, growth=sparsities) for seed, scene in enumerate(scenes)
            ]
            verdicts = [judge(video, scene) for video, scene in zip(videos, scenes, strict=True)]
            results[f"{name} {lesson}"] = {
                "right": sum(verdict.right for verdict in verdicts),
                "of": len(verdicts),
                "captions": [
                    {"caption": caption_of(scene), **_numbers(verdict)}
                    for scene, verdict in zip(scenes, verdicts, strict=True)
                ],
            }
            save_sheet(videos, folder / f"evaluation_{name}_{lesson}.png")
    with whole_file(folder / "evaluation.json") as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return {name: (result["right"], result["of"]) for name, result in results.items()}


def save_sheet(videos: list[Tensor], path: Path, columns: int = 6) -> None:
    """One row of frames a video, as a PNG."""
    rows = []
    for video in videos:
        places = torch.linspace(0, len(video) - 1, columns).round().long()
        rows.append(torch.cat(list(video[places]), dim=1))
    picture = torch.cat(rows).mul(255).round().to(torch.uint8).numpy()
    with whole_file(path) as partial:
        Image.fromarray(np.ascontiguousarray(picture)).save(partial)


def _numbers(verdict: Verdict) -> dict:
    things = [{key: value for key, value in asdict(t).items() if key != "position_errors"} for t in verdict.things]
    return {"right": verdict.right, "strangers": verdict.strangers, "things": things}
