"""The chunk sampler behind both sampling nodes: the host's guider runs the model, our rollout says what to run."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from tqdm.auto import tqdm

from ..lightforcing_core.causal_wan import CausalState
from ..lightforcing_core.kv_cache import kv_bytes
from ..lightforcing_core.rollout import Chunk, Noise, StepEvent, rollout, seeded_noise
from ..lightforcing_core.schedule import Schedule, video_frames_of
from .patch import KEY, LATENT_CHANNELS, RUN, conflicting_patch, settings_of

log = logging.getLogger(__name__)
UNUSED_BY_T2V = (
    "area",
    "clip_vision_output",
    "concat_latent_image",
    "concat_mask",
    "context_latents",
    "control",
    "gligen",
    "mask",
    "reference_latents",
    "time_dim_concat",
    "timestep_end",
    "timestep_start",
    "start_percent",
    "end_percent",
    "vace_frames",
)


class ChunkSampler(comfy.samplers.Sampler):
    """The autoregressive rollout as a host SAMPLER.

    schedule: None takes the defaults of the model's family. initial_latents: [B or 1, 16, frames, h, w] in the
    VAE's space, what the video starts with. on_chunk: called with each finished chunk (normalised latents), the steps
    done and the steps in all. extra_bytes: memory to ask for beside the model and the KV cache. fresh_noise: where
    the noise after each denoising step comes from, see `rollout`; default the run's seed.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        initial_latents: Tensor | None = None,
        on_chunk: Callable[[Chunk, int, int], None] | None = None,
        extra_bytes: int = 0,
        fresh_noise: Noise | None = None,
    ) -> None:
        self.schedule, self.initial_latents = schedule, initial_latents
        self.on_chunk, self.extra_bytes, self.fresh_noise = on_chunk, extra_bytes, fresh_noise

    def light_forcing_prepare(
        self, guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor, denoise_mask: Any = None, *_, **__
    ) -> None:
        """Check everything before weights are loaded, and add the KV cache to the run's memory request."""
        reason = (
            conflicting_patch(guider.model_patcher, guider.model_options)
            or unsuitable_guider(guider)
            or unsuitable_latents(latent_image, self.initial_latents)
            or unsuitable_sigmas(sigmas)
        )
        if denoise_mask is not None:
            reason = "the latent carries a noise mask, which a rollout cannot follow; remove Set Latent Noise Mask"
        if reason:
            raise ValueError(reason)
        model, shape = guider.model_patcher, list(noise.shape)
        schedule = self._schedule(model, shape)
        dit, base = model.get_model_object("diffusion_model"), model.model
        cache = kv_bytes(
            len(dit.blocks),
            shape[0],
            schedule.visible_frames(),
            (shape[3] // 2) * (shape[4] // 2),
            dit.num_heads,
            dit.dim // dit.num_heads,
            base.get_dtype_inference(),
        )

        def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
            # The host's estimate grows linearly with the frames of its argument: speak in that unit.
            one_frame = base.memory_required([*noise_shape[:2], 1, *noise_shape[3:]])
            frames = max(schedule.chunk_lengths()) + (cache + self.extra_bytes) / max(one_frame, 1)
            return executor(model, [*noise_shape[:2], -int(-frames // 1), *noise_shape[3:]], conds, *args, **kwargs)

        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling, guider.model_options, True)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The whole video [B, 16, frames, h, w] in the model's space; draw 0 comes from `noise`."""
        model, inner = model_wrap.model_patcher, model_wrap.inner_model
        settings = settings_of(model)
        if settings is None:
            raise ValueError(
                "this MODEL carries no Light Forcing patch; load it with Light Forcing Model Loader or put "
                "Light Forcing Apply between its loader and the guider"
            )
        schedule = self._schedule(model, noise.shape)
        initial = self._initial(inner, noise)
        start = 0 if initial is None else initial.shape[2]
        video = torch.zeros_like(noise)
        noisy = noise.clone()
        if initial is not None:
            video[:, :, :start] = initial
        fresh = self.fresh_noise or seeded_noise(extra_args.get("seed") or 0)
        options = extra_args["model_options"]["transformer_options"]
        starts = [sum(schedule.chunk_lengths(start)[:i]) for i in range(len(schedule.chunk_lengths(start)))]
        begun, finished = time.perf_counter(), 0

        def draw(index: int, number: int, shape: tuple[int, ...]) -> Tensor:
            return fresh(index, number, shape) if number else noise[:, :, starts[index] : starts[index] + shape[2]]

        def denoise(x: Tensor, sigma: float, state: CausalState) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            options[RUN] = state
            return model_wrap(x, x.new_full((x.shape[0],), sigma), **extra_args)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = q.shape[2]
            mixed = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=heads)
            return mixed.unflatten(-1, (heads, -1))

        def on_step(event: StepEvent) -> None:
            frames = slice(event.start_frame, event.start_frame + event.x0.shape[2])
            video[:, :, frames], noisy[:, :, frames] = event.x0, event.x
            bar.total = event.chunks * event.steps
            bar.update()
            if callback is not None:
                done = event.chunk * event.steps + event.step
                callback(done, video.clone(), noisy, event.chunks * event.steps)

        bar = tqdm(disable=disable_pbar, desc="Light Forcing")
        try:
            chunks = rollout(
                inner.diffusion_model,
                model_wrap.conds["positive"][0]["cross_attn"],
                latent_shape=noise.shape,
                frames_per_chunk=schedule.frames_per_chunk,
                sigmas=sigmas.tolist(),
                growth=schedule.sparsities(start),
                window=schedule.window,
                sink_frames=schedule.sink_frames,
                sink_rope=schedule.sink_rope,
                noise=draw,
                initial_latents=initial,
                attention=settings.attention,
                denoise=denoise,
                dense_attention=attend,
                on_step=on_step,
                dtype=inner.get_dtype_inference(),
                device=noise.device,
            )
            with contextlib.closing(chunks):
                for chunk in chunks:
                    video[:, :, chunk.start_frame : chunk.start_frame + chunk.latents.shape[2]] = chunk.latents
                    finished += 1
                    if self.on_chunk is not None:
                        self.on_chunk(chunk, bar.n, bar.total)
        finally:
            options.pop(RUN, None)
            bar.close()
            log.info(
                "[Light Forcing] %s, %d of %d chunks in %.1f s",
                schedule.title,
                finished,
                sum(at >= start for at in starts),
                time.perf_counter() - begun,
            )
        return video

    def _schedule(self, model: Any, shape: Any) -> Schedule:
        """The run's schedule; ValueError when it is for another length or another kind of checkpoint."""
        settings = settings_of(model)
        family = settings.family if settings else None
        schedule = self.schedule
        if schedule is None:
            assert family is not None
            return Schedule.of_family(family, shape[2])
        if schedule.latent_frames != shape[2]:
            raise ValueError(
                f"the schedule is for {video_frames_of(schedule.latent_frames)} video frames "
                f"({schedule.latent_frames} latent) but the latent holds {video_frames_of(shape[2])} ({shape[2]}); "
                f"feed both from one length"
            )
        if family and family.id != "unknown" and family.frames_per_chunk != schedule.frames_per_chunk:
            raise ValueError(
                f"the schedule's chunks of {schedule.frames_per_chunk} latent frames do not match the checkpoint: "
                f"{family.title} was trained on chunks of {family.frames_per_chunk}; set frames_per_chunk to that, or "
                f"the model's family to unknown"
            )
        return schedule

    def _initial(self, inner: Any, noise: Tensor) -> Tensor | None:
        """The start latents in the model's space, on the run's device."""
        if self.initial_latents is None:
            return None
        return inner.process_latent_in(self.initial_latents.to(noise.device, torch.float32))


def unsuitable_guider(guider: Any) -> str | None:
    """Why the guider's prompts or strength cannot drive a rollout, or None."""
    if getattr(guider, "cfg", 1.0) != 1.0:
        return (
            f"cfg {guider.cfg} needs a second pass with the negative prompt, which would overwrite the KV cache; "
            f"autoregressive checkpoints are distilled for cfg 1"
        )
    if guider.model_options.get("disable_cfg1_optimization") and guider.conds.get("negative"):
        return "a patch forces the negative prompt at cfg 1 (disable_cfg1_optimization); remove the node that adds it"
    positive = guider.conds.get("positive") or []
    if len(positive) != 1:
        return f"the positive prompt has {len(positive)} parts; a rollout follows exactly one: do not combine prompts"
    text = positive[0].get("cross_attn")
    if text is None or text.ndim != 3 or not text.shape[1]:
        return "the positive prompt holds no text embedding; connect CLIP Text Encode with a Wan (umt5) text encoder"
    if not torch.isfinite(text).all():
        return "the positive prompt's embedding holds NaN or infinity; encode the text again"
    if int((text.abs().amax(-1) > 0).sum(1).min()) < 2:
        return "the positive prompt is empty; write what the video should show"
    unused = [name for name in UNUSED_BY_T2V if positive[0].get(name) is not None]
    if unused:
        return f"the positive prompt carries {', '.join(unused)}, which a rollout cannot follow; remove that node"
    return None


def unsuitable_latents(latents: Tensor, initial: Tensor | None) -> str | None:
    """Why the latents cannot be filled by a rollout, or None."""
    for name, tensor in (("latent", latents), ("start_latent", initial)):
        if tensor is None:
            continue
        if tensor.ndim != 5 or tensor.shape[1] != LATENT_CHANNELS:
            return (
                f"the {name} has shape {list(tensor.shape)}, not [batch, {LATENT_CHANNELS}, frames, height, width]; "
                f"use Empty AR Video Latent, or a Wan 2.1 VAE to encode"
            )
        if not torch.isfinite(tensor).all():
            return f"the {name} holds NaN or infinity; encode or create it again"
    height, width = 8 * latents.shape[3], 8 * latents.shape[4]
    for side, size in (("height", height), ("width", width)):
        if size % 16:
            return f"{side} {size} is not a multiple of 16; use {size // 16 * 16 or 16} or {size // 16 * 16 + 16}"
    if torch.count_nonzero(latents):
        return (
            "the latent is not empty, but a rollout starts from noise; connect an empty video latent here and "
            "the encoded frames to start_latent"
        )
    if initial is None:
        return None
    if initial.shape[3:] != latents.shape[3:]:
        return (
            f"start_latent is {8 * initial.shape[4]}×{8 * initial.shape[3]} and the video {width}×{height}; "
            f"resize the start image to the video's size before encoding it"
        )
    if initial.shape[2] >= latents.shape[2]:
        return (
            f"start_latent already fills {initial.shape[2]} of the video's {latents.shape[2]} latent frames; "
            f"make the video longer"
        )
    if initial.shape[0] not in (1, latents.shape[0]):
        return f"start_latent is a batch of {initial.shape[0]}, the video one of {latents.shape[0]}; use 1 or the same"
    return None


def unsuitable_sigmas(sigmas: Tensor) -> str | None:
    """Why a list of noise levels cannot drive a rollout, or None."""
    values = [round(float(sigma), 4) for sigma in sigmas]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if len(values) < 2 or values[0] < 0.999 or values[-1] != 0.0 or not falling:
        return (
            f"sigmas {values} do not fall from 1 to 0; use BasicScheduler with simple, 4 steps and denoise 1 "
            f"on the patched MODEL"
        )
    return None
