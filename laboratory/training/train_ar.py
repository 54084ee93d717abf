"""The stages after the VAE: latents, the autoregressive model by teacher forcing, and its four-step student.

The student is distilled for consistency along the teacher's own flow: a caption leaves the clip's start open, and plain
x0 regression would give four steps the blurred mean of all starts. Half of its steps read a history that the student
itself denoised, so that a rollout meets nothing new in its own output.
"""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightforcing.lightforcing_core.demo.captions import SLOTS, caption_of, context_of, word_ids
from lightforcing.lightforcing_core.demo.model import Level
from lightforcing.lightforcing_core.files.tensors import write_tensors
from lightforcing.lightforcing_core.model.wan import Wan
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, normalise_latents

from .recipe import Lesson, TrainingRecipe
from .shapes import draw_clip, render
from .stage import Session, Stage, autocast, step_generator
from .whole_clip import encode_clip, teacher_forced

CACHES = {"ar": "latents.safetensors", "second": "latents_second.safetensors"}
SHIFT = 5.0
DIRTY = 0.1  # the most noise in a history that counts as clean
GRID = 32  # noise levels along which consistency is distilled
TRAIN_SEED_OFFSET = 1_000_003  # the model's clips are not those of the VAE


def new_model(recipe: TrainingRecipe) -> Wan:
    """A Wan to be trained: Xavier linears, unit norms, a head of zeros."""
    sizes = recipe.model
    model = Wan(dim=sizes.dim, ffn_dim=sizes.ffn_dim, num_layers=sizes.layers, text_dim=sizes.text_dim)
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
        elif name.endswith("modulation"):
            nn.init.normal_(parameter, std=sizes.dim**-0.5, generator=generator)
        elif name.endswith("bias") or name.startswith("head.head"):
            nn.init.zeros_(parameter)
        elif name.startswith("time_"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
    return model


def cache_latents(
    recipe: TrainingRecipe, lesson: Lesson, vae: WanVAE, file: Path, device: torch.device, minutes: float | None = None
) -> dict[str, Tensor]:
    """The latents of a lesson, from `file` or made and kept there.

    latents [clips, 16, F, h, w] (bfloat16, normalised) and ids [clips, SLOTS]; openings and opening_ids, the same of
    other clips and their first chunk alone. Makes at least one batch of each, then as many as half the minutes allow.
    """
    if not file.exists():
        half = None if minutes is None else minutes / 2
        wholes, others = range(lesson.clips), range(lesson.clips, lesson.clips + lesson.openings)
        latents, ids = encode_clips(recipe, lesson.level, vae, device, wholes, recipe.video.latent_frames, half)
        chunk = recipe.video.frames_per_chunk
        openings, opening_ids = encode_clips(recipe, lesson.level, vae, device, others, chunk, half)
        tensors = {"latents": latents, "ids": ids, "openings": openings, "opening_ids": opening_ids}
        write_tensors(file, tensors, {})
    return {name: tensor.to(device) for name, tensor in load_file(file).items()}


@torch.no_grad()
def encode_clips(
    recipe: TrainingRecipe,
    level: Level,
    vae: WanVAE,
    device: torch.device,
    clips: range,
    latent_frames: int,
    minutes: float | None,
) -> tuple[Tensor, Tensor]:
    """The first `latent_frames` of some clips and their captions' word ids, of as many as the minutes allow."""
    began, video = time.monotonic(), recipe.video
    latents = [torch.empty(0, 16, latent_frames, video.height // 8, video.width // 8, dtype=torch.bfloat16)]
    ids = [torch.empty(0, SLOTS, dtype=torch.long)]
    for first in clips[:: recipe.cache_batch]:
        if len(ids) > 1 and minutes is not None and time.monotonic() - began > 60 * minutes:
            break
        drawn = [
            draw_clip(recipe.seed + TRAIN_SEED_OFFSET, index, aspect=recipe.aspect, level=level, frames=video.frames)
            for index in range(first, min(first + recipe.cache_batch, clips.stop))
        ]
        pixels = render(drawn, 4 * latent_frames - 3, video.height, video.width, device=device)
        with autocast(recipe, device):
            mean, _ = encode_clip(vae, pixels.permute(0, 4, 1, 2, 3) * 2 - 1)
        latents.append(normalise_latents(mean.float()).bfloat16().cpu())
        ids.append(torch.tensor([word_ids(caption_of(clip.scene)) for clip in drawn]))
    return torch.cat(latents), torch.cat(ids)


class Batches:
    """Clips, noise levels and noise of any step."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        cache: dict[str, Tensor],
        table: dict[str, Tensor],
        device: torch.device,
        stage: str,
    ) -> None:
        self._recipe, self._cache, self._table, self._device, self._stage = recipe, cache, table, device, stage

    def draw(self, step: int, clips: int, chunks: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """The clean first chunks of some clips, [B, 16, F, h, w] in float32, their context, and the step's generator
        on the device."""
        generator = step_generator(self._recipe.seed, self._stage, step, self._device)
        latents, ids = self._cache["latents"], self._cache["ids"]
        if chunks == 1 and len(self._cache["openings"]):
            latents, ids = self._cache["openings"], self._cache["opening_ids"]
        index = torch.randint(0, len(ids), (clips,), generator=generator, device=self._device)
        clean = latents[index, :, : chunks * self._recipe.video.frames_per_chunk]
        return clean.float(), context_of(self._table, ids[index]), generator

    def per_frame(self, chunk_values: Tensor, frames: int) -> Tensor:
        """One value a chunk [B, chunks] → one a frame [B, frames]."""
        return chunk_values.repeat_interleave(self._recipe.video.frames_per_chunk, 1)[:, :frames]


def train_ar(
    recipe: TrainingRecipe,
    lesson: Lesson,
    cache: dict[str, Tensor],
    table: dict[str, Tensor],
    session: Session,
    minutes: float | None = None,
    *,
    start: Wan | None = None,
) -> Wan:
    """Flow matching behind clean history, from nothing or from the weights of `start`; the averaged model.

    Every chunk has a noise level of its own: one of those of the four steps in `few_share` of all cases, else any
    under shift 5.
    """
    device, history_of = session.device, recipe.history
    model = new_model(recipe).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    stage = Stage(
        session,
        "ar" if start is None else "second",
        model,
        rate=lesson.rate,
        steps=lesson.steps,
        minutes=minutes,
        save_every=recipe.save_every,
    )
    batches = Batches(recipe, cache, table, device, stage.name)
    levels = torch.tensor(few_step_sigmas(shift=SHIFT)[:-1], device=device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        progress = stage.progress
        kinds = next((kinds for share, kinds in lesson.phases if progress < share), lesson.phases[-1][1])
        chunks, clips = kinds[step % len(kinds)]
        x0, context, generator = batches.draw(step, clips, chunks)
        u, chance = torch.rand(2, len(x0), chunks, generator=generator, device=device)
        level = torch.where(chance < history_of.few_share, levels[(u * len(levels)).long()], _shifted(u))
        sigma = batches.per_frame(level, x0.shape[2])
        noise = torch.randn(x0.shape, generator=generator, device=device)
        noisy = _mixed(x0, noise, sigma)
        history = _dirtied(x0, generator)
        if chunks > 1 and bool(torch.rand((), generator=generator, device=device) < history_of.own):
            history = _made(stage.ema, x0, history, levels, context, generator, batches, recipe)
        flow = _flow(model, noisy, history, sigma, context, recipe)
        error = (flow - (noise - x0)).square()
        values = {
            "mean": error.detach().mean(),
            "first_chunk": error[:, :, : recipe.video.frames_per_chunk].detach().mean(),
        }
        weights = thing_weights(x0, history_of.thing_weight) * _spread(
            batches.per_frame(chunk_weights(level), x0.shape[2])
        )
        return (weights * error).mean(), values

    return stage.run(loss_of)


def thing_weights(x0: Tensor, weight: float) -> Tensor:
    """The weight of each place of x0 [B, 16, F, h, w], [B, 1, F, h, w] of mean 1.

    1 plus `weight` times its squared distance from its frame's median, in units of the mean distance.
    """
    median = x0.flatten(3).median(3).values[..., None, None]
    far = (x0 - median).square().mean(1, keepdim=True)
    return (1 + weight * far / far.mean()) / (1 + weight)


def chunk_weights(level: Tensor) -> Tensor:
    """The weight of each chunk at its noise level σ [B, chunks], of mean 1 over the four steps' levels.

    At σ = 1 the content of the first chunk is open, and the loss there would drown everything that can be learnt. It
    falls with σ about as 0.13 + 0.87 σ⁸, so the weight divides by that. Later chunks know their history, and their loss
    hardly depends on σ.
    """
    weights = torch.ones_like(level)
    weights[:, 0] = 0.33 / (0.13 + 0.87 * level[:, 0] ** 8)
    return weights


def train_few(
    recipe: TrainingRecipe,
    teacher: Wan,
    cache: dict[str, Tensor],
    table: dict[str, Tensor],
    session: Session,
    minutes: float | None = None,
) -> Wan:
    """Consistency distillation of `teacher` into a model for `few_step_sigmas()`; the averaged student."""
    device = session.device
    student = new_model(recipe).to(device)
    student.load_state_dict(teacher.state_dict())
    stage = Stage(
        session,
        "few",
        student,
        rate=recipe.few.rate,
        steps=recipe.few.steps,
        minutes=minutes,
        save_every=recipe.save_every,
    )
    batches = Batches(recipe, cache, table, device, "few")
    grid = _shifted(torch.linspace(0, 1, GRID + 1, device=device))
    levels = torch.tensor(few_step_sigmas(shift=SHIFT)[:-1], device=device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        chunks = recipe.few.chunks
        x0, context, generator = batches.draw(step, recipe.few.batch, chunks)
        shape = (len(x0), chunks)

        def spread(values: Tensor) -> Tensor:
            return batches.per_frame(values, x0.shape[2])

        noise = torch.randn(x0.shape, generator=generator, device=device)
        history = _dirtied(x0, generator)
        with torch.no_grad():
            if step % 2:
                history = _made(stage.ema, x0, history, levels, context, generator, batches, recipe)
            place = torch.randint(1, GRID + 1, shape, generator=generator, device=device)
            sigma, lower = spread(grid[place]), spread(grid[place - 1])
            noisy = _mixed(x0, noise, sigma)
            flow = _flow(teacher, noisy, history, sigma, context, recipe)
            nearer = noisy + _spread(lower - sigma) * flow
            goal = _denoised(stage.ema, nearer, history, lower, context, recipe)
        found = _denoised(student, noisy, history, sigma, context, recipe)
        # Pseudo-Huber: a few frames with another mode must not outweigh the rest.
        loss = ((found - goal).square() + 0.03**2).sqrt().mean() - 0.03
        return loss, {"x0_error": (found.detach() - x0).square().mean()}

    return stage.run(loss_of)


def _flow(model: Wan, noisy: Tensor, history: Tensor, sigma: Tensor, context: Tensor, recipe: TrainingRecipe) -> Tensor:
    with autocast(recipe, noisy.device):
        flow = teacher_forced(
            model, noisy, history, 1000 * sigma, context, frames_per_chunk=recipe.video.frames_per_chunk
        )
    return flow.float()


def _denoised(
    model: Wan, noisy: Tensor, history: Tensor, sigma: Tensor, context: Tensor, recipe: TrainingRecipe
) -> Tensor:
    """The model's estimate of x0; at σ = 0 its input."""
    return noisy - _spread(sigma) * _flow(model, noisy, history, sigma, context, recipe)


@torch.no_grad()
def _made(
    model: Wan,
    x0: Tensor,
    history: Tensor,
    levels: Tensor,
    context: Tensor,
    generator: torch.Generator,
    batches: Batches,
    recipe: TrainingRecipe,
) -> Tensor:
    """Clips as the model denoises them from one of the four steps' levels, a level for every chunk."""
    drawn = torch.randint(
        0, len(levels), (len(x0), x0.shape[2] // recipe.video.frames_per_chunk), generator=generator, device=x0.device
    )
    sigma = batches.per_frame(levels[drawn], x0.shape[2])
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    return _denoised(model, _mixed(x0, noise, sigma), history, sigma, context, recipe)


def _shifted(u: Tensor) -> Tensor:
    """Shares 0…1 of the steps → noise levels under the flow shift, as in `few_step_sigmas`."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def _spread(sigma: Tensor) -> Tensor:
    """[B, F] → [B, 1, F, 1, 1]."""
    return sigma[:, None, :, None, None]


def _mixed(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return torch.lerp(x0, noise, _spread(sigma))


def _dirtied(x0: Tensor, generator: torch.Generator) -> Tensor:
    """History with up to `DIRTY` noise, different for each clip, since the output of a model is never quite clean."""
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    share = DIRTY * torch.rand(len(x0), 1, 1, 1, 1, generator=generator, device=x0.device)
    return torch.lerp(x0, noise, share)
