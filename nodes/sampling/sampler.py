"""The sampling node: the whole chunk-by-chunk run, decoded and shown on the way."""

import contextlib
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ...lightforcing_core.families import Family
from ...lightforcing_core.rollout.recipe import check_guidance, few_step_sigmas, seeded_noise
from ...lightforcing_core.rollout.runtime import Replay
from ...lightforcing_core.rollout.schedule import Schedule
from ...lightforcing_core.rollout.state import RunState, save_run_state
from ..comfy import show_text
from ..decode import FrameDecoder
from ..model.patch import KEY, settings_of
from ..report import RECORD
from ..schedule import numbers_per_chunk
from ..state import StateFile, StateType
from ..timeline import PromptChange
from ..video_output import VideoFiles, VideoOutput, VideoOutputType, graph_metadata
from .chunk_sampler import NO_PATCH, ChunkSampler
from .inputs import CUT_SHORT, run_inputs, schedule_input, timeline_input
from .live_view import LiveView
from .memory import KV_CACHES
from .outputs import ChunkOutputs
from .request import Request, model_text

MAX_SEED, MAX_CFG = 0xFFFFFFFFFFFFFFFF, 30.0
OPEN = object()  # an input that nothing is connected to
VIDEO_WITHOUT_VAE = "video_output is connected, but no vae is there to make frames; connect Load VAE to vae"
HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]


class LightForcingSampler(io.ComfyNode):
    """Sample a video chunk by chunk; with a VAE, decode each chunk as it is finished."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSampler",
            display_name="Light Forcing Sampler",
            category="Light Forcing",
            description="Generates a video chunk by chunk with an autoregressive Wan 2.1 model. With a VAE connected, "
            "it decodes and shows each chunk as soon as it is finished.",
            search_aliases=["self forcing sampler", "causal video sampler", "longlive sampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Light Forcing Model Loader or Light Forcing Apply."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, from the start of the video until the first change of the timeline.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty video latent (Empty AR Video Latent), which sets size, length and batch. Width "
                    "and height must be multiples of 16.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    step=1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same noise on every GPU. A longer video with the same seed "
                    "starts the same.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=16,
                    step=1,
                    tooltip="Denoising steps per chunk. 0 takes the number that the checkpoint was trained with: 4 "
                    "for almost all, 2 or 1 for Causal Forcing++ (which takes 4 for its first chunk).",
                ),
                schedule_input(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Wan 2.1 VAE, LightVAE or a TAE: decodes during sampling and fills IMAGE. If not "
                    "connected, decode LATENT later. Under ComfyUI's DynamicVRAM it decodes between the chunks, not "
                    "concurrently.",
                ),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="The start of the video, from VAE Encode or Light Forcing Encode: one image (frame-wise "
                    "checkpoints), or a video to continue. It counts towards the length.",
                ),
                timeline_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Things that the video should not show; only read if cfg is not 1.",
                ),
                StateType.Input(
                    "state",
                    optional=True,
                    tooltip="Light Forcing Save State writes the run to disk after every chunk. Light Forcing Load "
                    "State continues a saved run: the seed, prompts, steps, schedule, start and end then come from "
                    "the file, and those of this node are not read.",
                ),
                VideoOutputType.Input(
                    "video_output",
                    optional=True,
                    tooltip="Light Forcing Video Output writes frames into a video file as they are made, so memory "
                    "does not grow with the length. Needs vae.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=MAX_CFG,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Strength of the positive prompt over the negative one. 1 for all distilled checkpoints; "
                    "another value, for undistilled ones, doubles time and KV cache and needs negative.",
                ),
                io.String.Input(
                    "chunk_seeds",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Seeds of single chunks, such as 4: 123, 7: 99 (the first chunk is 0). Those chunks and "
                    "all later ones change; the earlier ones stay the same.",
                ),
                *run_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The whole video, including a given start and end."),
                io.Image.Output(display_name="IMAGE", tooltip="The decoded frames; needs vae."),
            ],
            hidden=HIDDEN,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        cfg: float | None = 1.0,
        chunk_seeds: str | None = "",
        negative: Any = OPEN,
        vae: Any = OPEN,
        video_output: Any = OPEN,
        state: Any = OPEN,
    ) -> bool:
        """Refuse what cannot be met before anything runs; what comes over a link is None here.

        Raises ValueError, which the host shows once; a returned reason it repeats for every input.
        """
        numbers_per_chunk(chunk_seeds or "", "chunk_seeds", int, lists=False)
        if cfg is not None and not 0.0 <= cfg <= MAX_CFG:
            raise ValueError(f"cfg {cfg:g} is outside 0 to {MAX_CFG:g}; use 1 for distilled checkpoints")
        if cfg is not None:
            check_guidance(cfg, None if negative is OPEN and state is OPEN else "connected")
        if video_output is not OPEN and vae is OPEN:
            raise ValueError(VIDEO_WITHOUT_VAE)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return CUT_SHORT[cls.hidden.unique_id]

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
        timeline: Sequence[PromptChange] = (),
        negative: list | None = None,
        state: StateFile | None = None,
        video_output: VideoOutput | None = None,
        cfg: float = 1.0,
        chunk_seeds: str = "",
        replay: Replay = "all",
        keep_finished: bool = True,
        kv_cache: str = "auto",
        context_noise: float = 0.0,
        end_latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        settings = settings_of(model)
        if settings is None:
            raise ValueError(NO_PATCH)
        if video_output is not None and vae is None:
            raise ValueError(VIDEO_WITHOUT_VAE)
        latents = empty_latents(model, latent)
        run = state.continued(latents.shape) if state else None
        if run is not None:
            run.check_model(model_text(model))
        told: list[str] = []
        wanted = run or Request(
            schedule,
            initial_latents=start_latent["samples"] if start_latent else None,
            last_latents=end_latent["samples"] if end_latent else None,
            timeline=timeline,
            chunk_seeds=numbers_per_chunk(chunk_seeds, "chunk_seeds", int, lists=False),
            context_noise=context_noise,
        )
        sampler = ChunkSampler(
            wanted,
            replay=replay,
            kv=KV_CACHES[kv_cache],
            keep_finished=keep_finished,
            on_cut=told.append,
        )
        live = LiveView(model, latents.shape, decodes=vae is not None)
        sampler.on_step, sampler.on_plan = live.step, live.plan
        frames = files = None
        with contextlib.ExitStack() as stack:
            if vae is not None and latents.ndim == 5:
                keep = video_output is None or video_output.keep_images
                frames = sampler.decoder = FrameDecoder(vae, latents.shape, keep=keep)
                if video_output is not None:
                    files = stack.enter_context(video_files(video_output, latents, cls))
                before = wanted.latents if isinstance(wanted, RunState) else wanted.initial_latents
                outputs = stack.enter_context(
                    ChunkOutputs(frames, before, normalised=run is not None, live=live, files=files)
                )
                sampler.on_chunk, sampler.on_step = outputs, outputs.step
            if state is not None:
                path = stack.enter_context(state.opened())
                sampler.on_state = lambda run: save_run_state(run, path)
            if run is not None and run.is_complete:
                video = model.model.process_latent_out(run.latents)
                if frames is not None:
                    frames.load()
                    outputs.add_before(latents.shape[0])
            else:
                family = settings.family
                levels = run.recipe.sigmas if run else few_step_sigmas(denoising_steps(family, steps), family.shift)
                guider = guider_for(model, vae, positive, negative, cfg if run is None else 1.0)
                video = guider.sample(
                    starting_noise(latents, seed, wanted, family),
                    latents,
                    sampler,
                    torch.tensor(levels),
                    denoise_mask=latent.get("noise_mask"),
                    callback=live.callback,
                    disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                    seed=seed,
                )
            if frames is not None:
                outputs.finish()
            live.end()
            if told and files is not None:
                files.cut_short(told[0])
        if told:
            CUT_SHORT[cls.hidden.unique_id] += 1
            show_text(told[0])
        made: dict[str, Any] = {"samples": video.to(comfy.model_management.intermediate_device())}
        if sampler.record is not None:
            made[RECORD] = sampler.record
        return io.NodeOutput(made, images_of(frames), ui=shown(files, told))


def empty_latents(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    """The latents to fill, with the channels that the model wants when they are empty."""
    spatial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], spatial, temporal)


def guider_for(
    model: ModelPatcher, vae: Any, positive: list, negative: list | None, cfg: float
) -> comfy.samplers.CFGGuider:
    """The host's guider, which loads the VAE along with the model where there is one."""
    if vae is not None:
        model = model.clone()
        model.set_additional_models(KEY, [vae.patcher])
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    if cfg != 1.0:
        guider.set_cfg(cfg)
        guider.inner_set_conds({"negative": negative or []})
    return guider


def denoising_steps(family: Family, steps: int) -> Sequence[int]:
    """The unwarped step list on the 1000 scale: the family's own, or `steps` evenly spaced ones."""
    own = family.denoising_steps
    return own if steps in (0, len(own)) else [round(1000 * (steps - step) / steps) for step in range(steps)]


def starting_noise(latents: Tensor, seed: int, wanted: Request | RunState, family: Family) -> Tensor:
    """Draw 0 of every chunk, [B, 16, frames, h, w]; it depends on the seed and the chunk only."""
    if latents.ndim != 5:
        return torch.zeros_like(latents)  # refused by the sampler's checks
    batch, channels, frames, height, width = latents.shape
    if isinstance(wanted, RunState):
        lengths, draw = wanted.recipe.chunk_lengths(), wanted.recipe.noise()
    else:
        lengths = wanted.schedule_of(family, frames).chunk_lengths(wanted.initial_frames)
        draw = seeded_noise(seed, wanted.chunk_seeds)
    pieces = [draw(index, 0, (batch, channels, length, height, width)) for index, length in enumerate(lengths)]
    return torch.cat(pieces, dim=2)[:, :, :frames]


def video_files(output: VideoOutput, latents: Tensor, node: type[io.ComfyNode]) -> VideoFiles:
    """The files that a run's frames are written to, with the graph in them."""
    hidden = node.hidden
    return VideoFiles(
        output,
        batch=latents.shape[0],
        height=8 * latents.shape[3],
        width=8 * latents.shape[4],
        metadata=graph_metadata(hidden.prompt, hidden.extra_pnginfo),
    )


def shown(files: VideoFiles | None, told: list[str]) -> dict[str, Any] | None:
    """What the node shows when it is done: the video files, and why the run ended early."""
    found: dict[str, Any] = {}
    if files is not None:
        found |= {"images": files.shown(), "animated": (True,)}
    if told:
        found["text"] = tuple(told)
    return found or None


def images_of(frames: FrameDecoder | None) -> Any:
    """The frames as IMAGE, or what keeps the nodes behind it from running, with the reason."""
    images = None if frames is None else frames.images()
    if images is not None:
        return images
    if frames is None:
        return ExecutionBlocker("Light Forcing Sampler makes frames only with a vae connected")
    return ExecutionBlocker("IMAGE is empty: turn on keep_images of Light Forcing Video Output")
