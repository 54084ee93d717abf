"""The whole method on a small model, from growth to a video file."""

import json
import platform
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import imageio.v3 as iio
import torch
from PIL import Image, ImageDraw

from ..lightforcing_core.attention.options import AttentionOptions
from ..lightforcing_core.demo import model as demo_model
from ..lightforcing_core.demo.captions import context_of_caption
from ..lightforcing_core.demo.model import DEFAULT_CAPTION, FPS, load_demo_model
from ..lightforcing_core.families import Family
from ..lightforcing_core.files.output import prepare_folder, whole_file
from ..lightforcing_core.refusal import check_size
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.record import RunRecord, RunRecorder
from ..lightforcing_core.rollout.runtime import Runtime, StepEvent
from ..lightforcing_core.rollout.schedule import Schedule, video_frames_of
from ..lightforcing_core.vae.streaming import StreamingDecoder

WIDTH, PER_ROW = 256, 4  # of the contact sheet's thumbnails: pixels, and how many in a row


def make_demo(
    folder: str | Path,
    on_progress: Callable[[str, int, int], None],
    *,
    models: Path | None,
    caption: str | None,
    chunks: int | None,
    height: int | None,
    width: int | None,
    target: float,
    base: float | None,
    seed: int,
) -> tuple[RunRecord, list[Path]]:
    """Write demo.mp4, contact_sheet.png and report.json, each complete or absent; returns the run's record and them.

    on_progress: called as on_progress(stage, done, total).
    models: the folder of a demo model, by default the shipped one. Other arguments that are None take the model's own
    value; target 0 is dense.

    Raises before any work: ValueError if a file is missing, and for sizes, schedules and captions that cannot be met;
    OutputError if the folder cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, caption = models or demo_model.SHIPPED, caption or DEFAULT_CAPTION
    model = load_demo_model(models, device)
    video, sparse = model.video, Family.sparse
    video.check(caption)
    height, width = height or video.height, width or video.width
    check_size(height, width)
    count = video.frames_per_chunk * (chunks or -(-video.latent_frames // video.frames_per_chunk))
    schedule = Schedule(count, video.frames_per_chunk, target=target or None, base=base)
    recipe = Recipe(
        latent_shape=(1, 16, count, height // 8, width // 8),
        sigmas=few_step_sigmas(),
        context=context_of_caption(model.table, caption).to(model.dit.dtype),
        seed=seed,
        attention=AttentionOptions(block=(video.block, video.block), estimator=sparse.estimator, tail=sparse.tail),
        **schedule.arguments(),
    )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    facts = {
        "video": f"{video_frames_of(count)} frames of {width}x{height} at {FPS} per second",
        "caption": caption,
        "weights": f"the demo model in {models}",
        "model": f"{len(model.dit.blocks)} layers, dim {model.dit.dim}; VAE dim {model.vae.dim}",
        "schedule": f"target {target:g}, base {base or target + 0.1:g}, blocks of {video.block} tokens, seed {seed}",
        "machine": f"{machine}, torch {torch.__version__}, {platform.platform(terse=True)}",
    }
    # Noise compresses badly: at worst about a byte per pixel.
    folder = prepare_folder(folder, bytes_needed=video_frames_of(count) * height * width + 2**20)
    paths = [folder / name for name in ("demo.mp4", "contact_sheet.png", "report.json")]
    recorder, decoder = RunRecorder(facts), StreamingDecoder(model.vae)
    thumbnails: list[Image.Image] = []

    def on_step(event: StepEvent) -> None:
        on_progress("denoising", event.done, event.total)

    made = rollout(model.dit, recipe, Runtime(on_step=on_step, recorder=recorder))
    with closing(made), whole_file(paths[0]) as partial, iio.imopen(partial, "w", plugin="pyav") as file:
        file.init_video_stream("libx264", fps=FPS)
        for chunk in made:
            pixels = decoder.decode(chunk.latents)[0].mul(255).round().to(torch.uint8).cpu().numpy()
            for frame in pixels:
                file.write_frame(frame)
            last = Image.fromarray(pixels[-1])
            thumbnails.append(last.resize((WIDTH, max(1, round(WIDTH * height / width)))))
            on_progress("decoding", len(thumbnails), len(recipe.chunk_lengths()))
    record = recorder.finish()
    with whole_file(paths[1]) as partial:
        _contact_sheet(record, thumbnails).save(partial)
    with whole_file(paths[2]) as partial:
        # The block maps are too large.
        listed = [{**vars(chunk), "density": chunk.density, "block_map": None} for chunk in record.chunks]
        partial.write_text(json.dumps({**vars(record), "chunks": listed}, indent=2) + "\n", encoding="utf-8")
    return record, paths


def _contact_sheet(record: RunRecord, thumbnails: list[Image.Image]) -> Image.Image:
    """The last frame of every chunk with a caption above it."""
    caption, margin = 18, 6
    cell_width, cell_height = WIDTH + margin, thumbnails[0].height + caption + margin
    columns, rows = min(PER_ROW, len(thumbnails)), -(-len(thumbnails) // PER_ROW)
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (chunk, picture) in enumerate(zip(record.chunks, thumbnails, strict=True)):
        x, y = margin + place % PER_ROW * cell_width, margin + place // PER_ROW * cell_height
        draw.text((x, y + 2), f"chunk {chunk.index + 1}: {chunk.density:.0%} of blocks", fill="#1d2733")
        sheet.paste(picture, (x, y + caption))
    return sheet
