"""Train the demo model, resumably: python -m laboratory.training STAGE --out DIR [options]; see README.md."""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from lightforcing.lightforcing_core.demo.model import load_demo_model
from lightforcing.lightforcing_core.files.output import whole_file

from .evaluate import evaluate
from .export import export, new_table
from .recipe import PRESETS, Lesson, TrainingRecipe
from .shapes import draw_clip, render
from .stage import Paused, Session, autocast
from .train_ar import CACHES, cache_latents, train_ar, train_few
from .train_vae import fold_statistics, latent_statistics, train_vae, whole_clip_psnr

STAGES = ("vae", "ar", "second", "few", "evaluate")
HELD_OUT_SEED_OFFSET = 3_000_017
PAUSED = 75  # exit status


def run(
    recipe: TrainingRecipe,
    session: Session,
    *,
    minutes: float | None = None,
    last: str = "evaluate",
    start: Path | None = None,
) -> dict:
    """Run everything up to the stage `last`; the counts of the evaluation, if it ran. Raises Paused at the deadline.

    start: a folder of exported models, which replace the VAE and the first lesson.
    """
    session.folder.mkdir(parents=True, exist_ok=True)
    _keep_recipe(recipe, session.folder)
    try:
        return _stages(recipe, session, minutes, last, start)
    finally:
        draw_curves(session.folder)


def _stages(recipe: TrainingRecipe, session: Session, minutes: float | None, last: str, start: Path | None) -> dict:
    folder, device = session.folder, session.device
    shares = [None if minutes is None else minutes * share for share in recipe.shares]
    clock = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.monotonic()
        print(f"{stage}: {now - clock:.0f} s", flush=True)
        clock = now

    def latents(lesson: Lesson, stage: str, share: float | None) -> dict[str, torch.Tensor]:
        file = folder / CACHES[stage]
        if session.deadline is not None and not file.exists() and session.deadline - clock < 60 * (share or 0):
            raise Paused("there is no time left to make the latents; the same command makes them")
        found = cache_latents(recipe, lesson, vae, file, device, share)
        lap(f"latents of {len(found['ids'])} clips")
        return found

    if start is None:
        vae = train_vae(recipe, session, shares[0])
        videos = _held_out(recipe, device)
        with autocast(recipe, device):
            fold_statistics(vae, *latent_statistics(vae, videos))
            print(f"vae: {whole_clip_psnr(vae, videos):.2f} dB over whole clips that it never saw")
        lap("vae")
        if last == "vae":
            return {}
        table = {name: tensor.to(device) for name, tensor in new_table(recipe.model.text_dim, recipe.seed).items()}
        cache = latents(recipe.first, "ar", shares[1])
        teacher = train_ar(recipe, recipe.first, cache, table, session, shares[2])
        lap("ar")
    else:
        known = load_demo_model(start, device)
        vae, table, teacher = known.vae.float(), known.table, known.dit
    if last in ("vae", "ar"):
        return {}
    if recipe.second is not None:
        cache = latents(recipe.second, "second", shares[3])
        teacher = train_ar(recipe, recipe.second, cache, table, session, shares[4], start=teacher)
        lap("second")
    if last == "second":
        return {}
    student = teacher
    if recipe.few.steps:
        student = train_few(recipe, teacher, cache, table, session, shares[5])
        lap("few")
    for file in export(folder / "models", student, vae, table, recipe.video):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if last == "few":
        return {}
    counts = evaluate(recipe, folder / "models", device)
    lap(f"evaluation, right: {counts}")
    return counts


def _held_out(recipe: TrainingRecipe, device: torch.device) -> torch.Tensor:
    """Videos [B, 3, T, H, W] in −1…1 of a list that no stage trains on."""
    seed, size = recipe.seed + HELD_OUT_SEED_OFFSET, recipe.video
    clips = [draw_clip(seed, i, aspect=recipe.aspect, level=recipe.first.level) for i in range(recipe.held_out_clips)]
    return render(clips, size.frames, size.height, size.width, device=device).permute(0, 4, 1, 2, 3) * 2 - 1


def _keep_recipe(recipe: TrainingRecipe, folder: Path) -> None:
    """Write the recipe next to its results; ValueError if the folder holds those of another one."""
    file = folder / "recipe.json"
    text = json.dumps(asdict(recipe), indent=1) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} holds a run of another recipe; choose another --out, or empty it")
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def draw_curves(folder: Path) -> None:
    """curves.png: every logged value of every stage over its steps."""
    logs = {name: folder / f"{name}.jsonl" for name in ("vae_images", "vae", "ar", "second", "few")}
    found = {name: [json.loads(line) for line in log.open()] for name, log in logs.items() if log.exists()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return
    columns = max(len(rows[0]) - 2 for rows in found.values())
    figure, axes = plt.subplots(len(found), columns, figsize=(3.5 * columns, 2.6 * len(found)), squeeze=False)
    for line, (name, rows) in zip(axes, found.items(), strict=True):
        for axis, key in zip(line, [key for key in rows[0] if key not in ("step", "seconds")], strict=False):
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=0.8)
            axis.set_title(f"{name}: {key}", fontsize=9)
            if key != "psnr":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")  # plain text; powers of ten take seconds to typeset
                axis.yaxis.set_minor_formatter(NullFormatter())
    figure.subplots_adjust(0.06, 0.06, 0.98, 0.94, 0.3, 0.35)
    with whole_file(folder / "curves.png") as partial:
        figure.savefig(partial, dpi=90)
    plt.close(figure)


def _report(stage: str, step: int, values: Mapping[str, float]) -> None:
    if step % 50 == 0 or step == 1:
        print(f"{stage} {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m laboratory.training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="h200")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--pause-after", type=float)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    recipe = replace(PRESETS[options.preset], seed=options.seed)
    last = "evaluate" if options.stage == "all" else options.stage
    deadline = None if options.pause_after is None else time.monotonic() + 60 * options.pause_after
    session = Session(options.out, torch.device(options.device), _report, deadline)
    try:
        run(recipe, session, minutes=options.minutes, last=last, start=options.start)
    except Paused as pause:
        print(pause)
        sys.exit(PAUSED)


if __name__ == "__main__":
    main()
