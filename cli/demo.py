"""The whole method on a small model: growth, selection, rollout and streaming decode to a video.

Nothing is downloaded and no GPU is needed. With the demo model that the repository ships a caption becomes its video.
Where there is none the weights are random and the picture abstract; the machinery and its cost are the same.
"""

import logging
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..lightforcing_core.attention.backends import sdpa
from ..lightforcing_core.attention.blocks import FrameBlocks
from ..lightforcing_core.attention.dispatch import (
    AttentionOptions,
    BackendUnavailable,
    choose_backend,
    sparse_attention,
)
from ..lightforcing_core.attention.selection import BlockSelection, SelectionPlan, sub_block_layout
from ..lightforcing_core.demo.captions import context_of_caption, parse
from ..lightforcing_core.demo.model import (
    DEFAULT_CAPTION,
    FPS,
    DemoVideo,
    fast_convolutions,
    load_demo_model,
    vae_dtype,
)
from ..lightforcing_core.families import Family
from ..lightforcing_core.files.output import prepare_folder, whole_file
from ..lightforcing_core.model.causal import Pass
from ..lightforcing_core.model.wan import HEAD_DIM, Wan, random_state_dict, wan_from_state_dict
from ..lightforcing_core.refusal import Refusal, check_size
from ..lightforcing_core.report.plots import RunReport
from ..lightforcing_core.rollout.cost import ChunkCost, flops_ratio, schedule_costs
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.runtime import Runtime, StepEvent
from ..lightforcing_core.rollout.schedule import Schedule, video_frames_of
from ..lightforcing_core.vae.overlap import OverlappedDecoder
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import WanVAE, random_vae_state_dict, vae_from_state_dict

HEADS, LAYERS = 2, 2
VAE_DIM = 24  # LightVAE's width
THUMBNAIL = (256, 4)  # width of a picture on the contact sheet in pixels, and how many stand in a row
TIMED_RUNS = 5
FLEX_BLOCK = 64  # tokens; frames that need smaller blocks are too small to repay half a minute of compiling flex

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes: `chunks` of `frames_per_chunk` latent frames at `height` × `width` pixels.

    target and base parametrise Chunk-Aware Growth, by default as for any model that never saw sparse attention while it
    was trained; target 0 is dense. block: tokens per attention block. caption: what the demo model shows; random
    weights read none. Raises ValueError for sizes and schedules that cannot be met, and for captions outside the
    grammar.
    """

    height: int = 256
    width: int = 448
    chunks: int = 7
    frames_per_chunk: int = 3
    target: float = Family.target
    base: float = Family.base
    seed: int = 0
    block: int = 64
    caption: str = DEFAULT_CAPTION

    def __post_init__(self) -> None:
        check_size(self.height, self.width)
        for name, count in (("chunks", self.chunks), ("frames_per_chunk", self.frames_per_chunk)):
            if count < 1:
                raise Refusal(name, f"{count} is not positive", "use 1 or more")
        parse(self.caption)
        self.schedule().sparsities()

    @classmethod
    def of_video(cls, video: DemoVideo, **chosen: Any) -> "DemoSettings":
        """What a demo model was trained to make, but for what is chosen otherwise."""
        own = {
            "height": video.height,
            "width": video.width,
            "chunks": -(-video.latent_frames // video.frames_per_chunk),
            "frames_per_chunk": video.frames_per_chunk,
            "block": video.block,
        }
        return cls(**{**own, **chosen})

    def schedule(self) -> Schedule:
        """The Chunk-Aware Growth schedule of this video."""
        frames = self.chunks * self.frames_per_chunk
        target = self.target or None
        return Schedule(frames, self.frames_per_chunk, target=target, base=self.base, title="demo")

    @property
    def video_frames(self) -> int:
        return video_frames_of(self.chunks * self.frames_per_chunk)

    @property
    def tokens_per_frame(self) -> int:
        return (self.height // 16) * (self.width // 16)


class DemoResult(NamedTuple):
    """The report and the files of a demo run."""

    report: RunReport
    video: Path
    contact_sheet: Path
    report_file: Path


class _Parts(NamedTuple):
    """What runs, the prompt [1, tokens, text_dim], and a sentence each on the model and on its weights."""

    dit: Wan
    vae: WanVAE
    context: Tensor
    model: str
    weights: str


def run_demo(
    folder: str | Path, settings: DemoSettings, on_progress: Progress | None = None, *, models: Path | None = None
) -> DemoResult:
    """Write demo.mp4, contact_sheet.png and report.json into `folder`; each is whole or absent.

    on_progress: called as on_progress(stage, done, total). models: the folder of a demo model; random weights without.
    Runs on a GPU where torch sees one, else on the CPU. Raises OutputError, before any work, when the folder cannot
    take the files, and ValueError when there is no demo model in `models`.
    """
    progress = on_progress or (lambda stage, done, total: None)
    # Noise compresses badly: about a byte per pixel at worst.
    folder = prepare_folder(folder, bytes_needed=settings.video_frames * settings.height * settings.width + 2**20)
    paths = folder / "demo.mp4", folder / "contact_sheet.png", folder / "report.json"
    schedule = settings.schedule()
    steps = few_step_sigmas()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = _random_parts(device, settings.seed) if models is None else _trained_parts(models, device, settings.caption)
    dit, heads = parts.dit, parts.dit.dim // HEAD_DIM
    report = RunReport(settings.tokens_per_frame, len(dit.blocks), heads, HEAD_DIM, forwards=len(steps))
    progress("preparing attention", 0, 1)
    with report.stage("prepare attention"):
        options, why = _attention_options(device, settings, heads)
    progress("preparing attention", 1, 1)

    def denoise(x: Tensor, sigma: float, model_pass: Pass) -> Tensor:
        with report.stage("clean pass" if model_pass.commits else "denoise"):
            timestep = torch.full((1,), sigma * 1000.0, device=device)
            return x - sigma * model_pass(dit, x.to(dit.dtype), timestep).float()

    density: dict[int, float] = {}

    def on_step(event: StepEvent) -> None:
        density[event.index] = event.density
        progress("denoising", event.chunk * event.steps + event.step + 1, event.chunks * event.steps)

    recipe = Recipe(
        latent_shape=(1, 16, schedule.latent_frames, settings.height // 8, settings.width // 8),
        sigmas=steps,
        context=parts.context,
        seed=settings.seed,
        attention=options,
        **schedule.arguments(),
    )
    lengths = recipe.chunk_lengths()
    costs = schedule_costs([recipe.sparsity(index) for index in range(len(lengths))], lengths, recipe.window)
    chunks = rollout(dit, recipe, Runtime(denoise=denoise, on_step=on_step))
    decoder = OverlappedDecoder(StreamingDecoder(parts.vae), device)
    thumbnails: list[tuple[str, Image.Image]] = []
    with ExitStack() as files:
        files.callback(decoder.drop)
        files.callback(chunks.close)
        video = files.enter_context(iio.imopen(files.enter_context(whole_file(paths[0])), "w", plugin="pyav"))
        video.init_video_stream("libx264", fps=FPS)

        def write(decoded: Tensor) -> None:
            number = len(thumbnails) + 1
            with report.stage("decode"):
                frames = decoded[0].mul(255).round().to(torch.uint8).cpu().numpy()
            progress("decoding", number, len(costs))
            with report.stage("encode video"):
                for frame in frames:
                    video.write_frame(frame)
            thumbnails.append((f"chunk {number}: {density[number - 1]:.0%} of blocks", _small(frames[-1])))

        for chunk in chunks:
            cost = costs[chunk.index]
            report.chunks.append(ChunkCost(**{**asdict(cost), "density": density[chunk.index]}))
            with report.stage("decode"):
                ready = decoder.put(chunk.latents)
            for decoded in ready:
                write(decoded)
        for decoded in decoder.rest():
            write(decoded)

    timing: dict[str, Any] | None = None
    if options.backend != "reference":  # which is not made to be fast
        progress("timing attention", 0, 1)
        with report.stage("time attention"), torch.no_grad():
            timing = _time_attention(report.chunks[-1], options, device, settings, heads)
        progress("timing attention", 1, 1)
    report.facts = {
        "settings": asdict(settings),
        "weights": parts.weights,
        "model": parts.model,
        "video_frames": settings.video_frames,
        "fps": FPS,
        "machine": _machine(device),
        "attention_backend": {"name": options.backend, "reason": why},
        "scheduled_attention_flops_ratio": flops_ratio(costs),
        "attention_seconds": timing,
    }
    with whole_file(paths[1]) as partial:
        _contact_sheet(thumbnails).save(partial)
    with whole_file(paths[2]) as partial:
        partial.write_text(report.to_json() + "\n", encoding="utf-8")
    return DemoResult(report, *paths)


def _random_parts(device: torch.device, seed: int) -> _Parts:
    """A two-layer model and a LightVAE-sized VAE whose weights mean nothing."""
    dit = wan_from_state_dict(
        random_state_dict(dim=HEADS * HEAD_DIM, layers=LAYERS, text_dim=64, seed=seed), device=device
    )
    vae = vae_from_state_dict(random_vae_state_dict(dim=VAE_DIM, seed=seed), dtype=vae_dtype(device), device=device)
    context = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed)).to(device)
    why = "random, so the picture is abstract"
    return _Parts(dit, fast_convolutions(vae), context, _sizes(dit, vae), why)


def _trained_parts(models: Path, device: torch.device, caption: str) -> _Parts:
    """The demo model in `models`, and the caption as it reads it."""
    model = load_demo_model(models, device)
    context = context_of_caption(model.table, caption).to(model.dit.dtype)
    return _Parts(model.dit, model.vae, context, _sizes(model.dit, model.vae), f"the demo model in {models}")


def _sizes(dit: Wan, vae: WanVAE) -> str:
    return f"{len(dit.blocks)} layers of {dit.dim // HEAD_DIM} heads, width {dit.dim}; Wan VAE layout, width {vae.dim}"


def _attention_options(device: torch.device, settings: DemoSettings, heads: int) -> tuple[AttentionOptions, str]:
    """The backend for the whole run, compiled and tried, with a sentence of why.

    A single call this small is not worth a compiler's wait, so "auto" would take the slow reference on a CPU; the
    demo makes hundreds of calls and names flex where it works, but for blocks so small that all calls together are
    not worth it either.
    """
    tokens, block = settings.tokens_per_frame, (settings.block, settings.block)
    options = AttentionOptions(block=block, estimator=Family.sparse.estimator, tail=Family.sparse.tail)
    q, k = (torch.randn(1, frames * tokens, heads, HEAD_DIM, device=device) for frames in (1, 2))
    if device.type == "cpu" and settings.block >= FLEX_BLOCK:
        options = replace(options, backend="flex")
        per_frame = FrameBlocks(tokens, settings.block).per_frame
        mask = torch.ones(1, heads, per_frame, 2 * per_frame, dtype=torch.bool)
        try:
            with torch.no_grad():
                sparse_attention(q, k, k, mask=mask, tokens_per_frame=tokens, block=block, backend="flex")
            return options, "flex_attention compiles here"
        except (BackendUnavailable, RuntimeError) as error:
            _log.warning("[Light Forcing] demo: flex_attention does not compile here: %s", error)
    choice = choose_backend(q, k, tokens_per_frame=tokens, block=block)
    return replace(options, backend=choice.name), choice.reason


def _time_attention(
    chunk: ChunkCost, options: AttentionOptions, device: torch.device, settings: DemoSettings, heads: int
) -> dict[str, Any]:
    """Seconds of one layer's self-attention at the last chunk: dense SDPA, selection, and sparse with selection.

    Random q, k, v of that chunk's shapes and budget; the arms take turns, the median of `TIMED_RUNS` counts.
    Without a sparse chunk there is nothing to compare and only "dense" is filled.
    """
    tokens = settings.tokens_per_frame
    generator = torch.Generator().manual_seed(settings.seed)
    q, k, v = (
        torch.randn(1, frames * tokens, heads, HEAD_DIM, generator=generator).to(device)
        for frames in (chunk.frames, chunk.kv_frames, chunk.kv_frames)
    )
    q_layout, k_layout = (FrameBlocks(tokens, size) for size in options.block)
    k_means = k_layout.block_means(k)
    frame_means = k_layout.frame_means(k_means)
    plan = SelectionPlan.build(
        range(chunk.kv_frames),
        chunk.frames,
        k_layout,
        sparsity=chunk.sparsity,
        keep_frames=options.keep_frames,
        sink_frames=options.sink_frames,
        near_frames=options.near_frames,
        device=device,
    )
    sub_means = sub_block_layout(k_layout).block_means(k) if options.estimator == "lse" else None
    tail = (k_means, k_layout.block_means(v)) if options.tail else None

    def select() -> BlockSelection:
        q_means = q_layout.block_means(q)
        return plan.select(q_means, k_means, frame_means, sub_means)

    selection, backend = select(), options.backend

    def attend() -> None:
        sparse_attention(
            q, k, v, selection=selection, tokens_per_frame=tokens, block=options.block, backend=backend, tail=tail
        )

    arms: dict[str, Callable[[], Any]] = {"dense": lambda: sdpa(q, k, v)}
    if chunk.density < 1.0:
        arms |= {"selection": select, "sparse": attend}
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(TIMED_RUNS + 1):
        for name, arm in arms.items():
            seconds = _seconds(arm, device)
            if turn:  # the first turn warms up
                samples[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    result: dict[str, Any] = {
        "query_tokens": q.shape[1],
        "key_tokens": k.shape[1],
        "density": chunk.density,
        "runs": TIMED_RUNS,
        **medians,
    }
    if "sparse" in medians:
        result["dense_over_sparse"] = medians["dense"] / (medians["sparse"] + medians["selection"])
    return result


def _seconds(arm: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, {platform.platform(terse=True)}"


def _small(frame: np.ndarray) -> Image.Image:
    """A frame [H, W, 3] uint8 at the contact sheet's size."""
    width = THUMBNAIL[0]
    return Image.fromarray(frame).resize((width, max(1, round(width * frame.shape[0] / frame.shape[1]))))


def _contact_sheet(thumbnails: list[tuple[str, Image.Image]]) -> Image.Image:
    """One picture per chunk, its last frame, with a caption above."""
    width, per_row = THUMBNAIL
    caption, margin = 18, 6
    cell_width, cell_height = width + margin, thumbnails[0][1].height + caption + margin
    columns, rows = min(per_row, len(thumbnails)), -(-len(thumbnails) // per_row)
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (text, picture) in enumerate(thumbnails):
        x, y = margin + place % per_row * cell_width, margin + place // per_row * cell_height
        draw.text((x, y + 2), text, fill="#1d2733")
        sheet.paste(picture, (x, y + caption))
    return sheet
