"""The sampling nodes: the whole chunk-by-chunk run in one node, or as a SAMPLER for SamplerCustomAdvanced."""

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ..lightforcing_core.rollout import Chunk, few_step_sigmas, seeded_noise
from ..lightforcing_core.schedule import Schedule
from .chunk_sampler import ChunkSampler
from .decode import FrameDecoder
from .patch import KEY, Settings, settings_of
from .schedule import ScheduleType

PREVIEW_SIDE = 512
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class LightForcingSampler(io.ComfyNode):
    """Sample a video chunk by chunk; with a VAE, decode each chunk as it is finished."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSampler",
            display_name="Light Forcing Sampler",
            category="Light Forcing",
            description="Generates a video chunk by chunk with an autoregressive Wan 2.1 model. With a VAE connected "
            "it decodes every chunk as soon as it is finished and shows it.",
            search_aliases=["self forcing sampler", "causal video sampler", "longlive sampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Light Forcing Model Loader or Light Forcing Apply."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the video shows. There is no negative prompt: these checkpoints run at cfg 1.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty video latent (Empty AR Video Latent): size, length and batch. Width and height "
                    "must be multiples of 16.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    step=1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same video on every card. A longer video with the same seed "
                    "starts the same.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=16,
                    step=1,
                    tooltip="Denoising steps per chunk. 4 is what almost all checkpoints were trained with; only use "
                    "1 or 2 with checkpoints made for it.",
                ),
                ScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="Chunks, window and sparsity from Light Forcing Schedule. Left open: the defaults of the "
                    "model's checkpoint family.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan 2.1 VAE or LightVAE: decodes while sampling and fills IMAGE. Left open: decode LATENT "
                    "afterwards.",
                ),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="What the video starts with, from VAE Encode: one image (frame-wise checkpoints), or the "
                    "end of another video to continue. It counts towards the length.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The whole video, start_latent included."),
                io.Image.Output(display_name="IMAGE", tooltip="The decoded frames; needs vae."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        schedule: Schedule | None = None,
        vae: Any = None,
        start_latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        settings = settings_of(model)
        if settings is None:
            raise ValueError(
                "this MODEL carries no Light Forcing patch; load it with Light Forcing Model Loader or put Light "
                "Forcing Apply behind its loader"
            )
        latents = empty_latents(model, latent)
        initial = start_latent["samples"] if start_latent else None
        sampler = ChunkSampler(schedule, initial_latents=initial)
        frames = None
        if vae is not None and latents.ndim == 5:
            frames = FrameDecoder(vae, latents.shape)
            model = model.clone()
            model.set_additional_models(KEY, [vae.patcher])
            sampler.extra_bytes = frames.bytes_needed
            sampler.on_chunk = ChunkViewer(frames, initial)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        sigmas = torch.tensor(few_step_sigmas(denoising_steps(settings, steps), settings.family.shift))
        video = guider.sample(
            starting_noise(latents, seed, sampler, settings),
            latents,
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        made = {"samples": video.to(comfy.model_management.intermediate_device())}
        if frames is None:
            return io.NodeOutput(made, ExecutionBlocker("Light Forcing Sampler makes frames only with a vae connected"))
        return io.NodeOutput(made, frames.images())


class LightForcingSamplerSelect(io.ComfyNode):
    """The chunk sampler for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSamplerSelect",
            display_name="Light Forcing Sampler Select",
            category="Light Forcing",
            description="The chunk-by-chunk sampler for SamplerCustomAdvanced. Use it with a patched model, "
            "BasicGuider, and BasicScheduler (simple, 4 steps).",
            inputs=[
                ScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="Chunks, window and sparsity from Light Forcing Schedule. Left open: the defaults of the "
                    "model's checkpoint family.",
                ),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="What the video starts with, from VAE Encode. It counts towards the length.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, schedule: Schedule | None = None, start_latent: dict[str, Any] | None = None) -> io.NodeOutput:
        return io.NodeOutput(ChunkSampler(schedule, initial_latents=start_latent["samples"] if start_latent else None))


class ChunkViewer:
    """Decodes finished chunks and shows their last frame on the node; the start latents are decoded first."""

    def __init__(self, frames: FrameDecoder, initial: Tensor | None) -> None:
        self._frames, self._initial = frames, initial
        self._progress = comfy.utils.ProgressBar(1)

    def __call__(self, chunk: Chunk, done: int, total: int) -> None:
        if self._initial is not None:
            batch = chunk.latents.shape[0]
            self._frames.add(self._initial.expand(batch, -1, -1, -1, -1), normalised=False)
            self._initial = None
        last = self._frames.add(chunk.latents, normalised=True)[0, -1]
        picture = Image.fromarray((last.float().cpu() * 255).round().to(torch.uint8).numpy())
        self._progress.update_absolute(done, total, ("JPEG", picture, PREVIEW_SIDE))


def empty_latents(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The latents to fill, with the channels that the model wants when they are empty."""
    spatial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], spatial, temporal)


def denoising_steps(settings: Settings, steps: int) -> list[int]:
    """The unwarped step list on the 1000 scale: the family's own, or `steps` evenly spaced ones."""
    own = settings.family.denoising_steps
    return list(own) if len(own) == steps else [round(1000 * (steps - step) / steps) for step in range(steps)]


def starting_noise(latents: Tensor, seed: int, sampler: ChunkSampler, settings: Settings) -> Tensor:
    """Draw 0 of every chunk, [B, 16, frames, h, w]; it depends on the seed and the chunk only."""
    if latents.ndim != 5:
        return torch.zeros_like(latents)  # refused by the sampler's checks
    schedule = sampler.schedule or Schedule.of_family(settings.family, latents.shape[2])
    initial = 0 if sampler.initial_latents is None else sampler.initial_latents.shape[2]
    draw = seeded_noise(seed)
    batch, channels, _, height, width = latents.shape
    pieces = [
        draw(index, 0, (batch, channels, length, height, width))
        for index, length in enumerate(schedule.chunk_lengths(initial))
    ]
    return torch.cat(pieces, dim=2)[:, :, : latents.shape[2]]
