"""The sampling nodes: a whole run, decoded and shown meanwhile, and the chunk sampler as a SAMPLER."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ...lightforcing_core.families import Family, family_of
from ...lightforcing_core.files.video import VideoWriter
from ...lightforcing_core.model.fp8 import WIDENED
from ...lightforcing_core.rollout.recipe import check_guidance, few_step_sigmas
from ..comfy import (
    ExecutionBlocker,
    ModelPatcher,
    empty_latents,
    encode_text,
    file_of,
    flow_shift,
    guider_for,
    progress_bars_hidden,
    queued_prompt,
    result_device,
)
from ..demo_prompt import encode_caption
from ..model.loader import AUTO, LightForcingApply
from ..model.patch import KEY, required_settings, settings_of
from ..report import RECORD
from ..schedule import ScheduleType, numbers_per_chunk
from ..state import StateFile, StateType
from ..texts import node_schema
from ..timeline import TimelineType
from ..vae.decode import FrameDecoder
from ..video_output import VideoOutput, VideoOutputType, graph_metadata, open_video, saved_results
from .chunk_sampler import ChunkSampler
from .direction import Direction
from .frames import FrameOutput
from .live_view import DEMO_FAMILY, LiveView
from .observer import Observer, ProgressLine, StateWriter, runs_off_plan
from .request import Request, model_text, run_inputs

MAX_CFG = 30.0
OPEN = object()  # the value of an input that is not connected


class LightForcingSampler(io.ComfyNode):
    """Sample a video chunk by chunk; with a VAE, decode each chunk as it is finished."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSampler",
            search_aliases=[
                "autoregressive",
                "extend video",
                "long video",
                "real-time",
                "self forcing sampler",
                "causal video sampler",
                "longlive sampler",
            ],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, step=1, control_after_generate=True),
                io.Int.Input("steps", default=0, min=0, max=16, step=1),
                ScheduleType.Input("schedule", optional=True),
                io.Vae.Input("vae", optional=True),
                io.Latent.Input("start_latent", optional=True),
                TimelineType.Input("timeline", optional=True),
                io.Conditioning.Input("negative", optional=True),
                StateType.Input("state", optional=True),
                VideoOutputType.Input("video_output", optional=True),
                io.Float.Input("cfg", default=1.0, min=0.0, max=MAX_CFG, step=0.1, optional=True, advanced=True),
                io.String.Input("chunk_seeds", default="", optional=True, advanced=True),
                *run_inputs(),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.Latent.Output(display_name="LATENT"), io.Image.Output(display_name="IMAGE")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
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
        """Refuse inputs that cannot work before anything runs; a linked input is None."""
        numbers_per_chunk(chunk_seeds or "", "chunk_seeds", int, lists=False)
        if cfg is not None and not 0.0 <= cfg <= MAX_CFG:
            raise ValueError(f"cfg {cfg:g} is outside 0 to {MAX_CFG:g}; use 1 for distilled checkpoints")
        if cfg is not None:
            check_guidance(cfg, None if negative is OPEN and state is OPEN else "connected")
        if video_output is not OPEN and vae is OPEN:
            raise ValueError("video_output needs decoded frames, but vae is not connected; connect Load VAE to vae")
        if prompt := queued_prompt():
            node_id = cls.hidden.unique_id
            output = prompt[node_id]["inputs"].get("video_output")
            kept = output is None or prompt[output[0]]["inputs"].get("keep_images") is not False
            check_images_used(prompt, node_id, has_vae=vae is not OPEN, keep=kept)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return runs_off_plan[cls.hidden.unique_id]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        latent: dict[str, Any],
        seed: int,
        steps: int,
        vae: Any = None,
        negative: list[Any] | None = None,
        state: StateFile | None = None,
        video_output: VideoOutput | None = None,
        cfg: float = 1.0,
        clip: Any = None,
        **inputs: Any,
    ) -> io.NodeOutput:
        # A MODEL of ComfyUI's own loader, as in its template for Causal Forcing, if its file shows the family.
        if settings_of(model) is None and family_of(file_of(model))[1]:
            model = LightForcingApply.execute(model, AUTO)[0]
        family = required_settings(model).family
        keep = video_output is None or video_output.keep_images
        check_images_used(cls.hidden.prompt or {}, cls.hidden.unique_id, has_vae=vae is not None, keep=keep)
        request, latents = Request(**inputs), empty_latents(model, latent)
        start = request.start(model.model_options)
        saved = state.continued(latents.shape) if state else None
        if saved is not None:
            saved.check_model(model_text(model))
        decoder, videos = None, list[VideoWriter]()
        if vae is not None:
            decoder = FrameDecoder(vae, latents.shape, keep=keep)
        line, live = ProgressLine(cls.hidden.unique_id), LiveView(model, latents.shape, decoder)
        observers: list[Observer] = [line, live]
        with contextlib.ExitStack() as stack:
            if state is not None:
                observers.append(StateWriter(stack.enter_context(state.reserved())))
            if decoder is not None:
                if video_output is not None:
                    metadata = graph_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
                    for _ in range(latents.shape[0]):
                        videos.append(stack.enter_context(open_video(video_output, latents.shape, metadata)))
                before = saved.latents if saved else start
                frames = FrameOutput(decoder, before, normalised=saved is not None, live=live, videos=videos)
                stack.push(frames.finish_failed)
                observers.append(frames)
            encode = encode_caption if family.id == DEMO_FAMILY else clip and partial(encode_text, clip)
            sampler = ChunkSampler(
                request, observers, saved=saved, decoder=decoder, own_noise=True, direction=Direction(encode)
            )
            if saved is not None and saved.is_complete:
                video = model.model.process_latent_out(saved.latents)
                if decoder is not None:
                    decoder.load()
                    frames.add_before(latents.shape[0])
            else:
                sigmas = saved.recipe.sigmas if saved else few_step_sigmas(steps_of(family, steps), flow_shift(model))
                guider = guider_for(model, vae, positive, negative, cfg if saved is None else 1.0, KEY)
                video = guider.sample(
                    latents.float(),  # instead of noise, which the sampler makes
                    latents,
                    sampler,
                    torch.tensor(sigmas),
                    denoise_mask=latent.get("noise_mask"),
                    callback=live.callback,
                    disable_pbar=progress_bars_hidden(),
                    seed=seed,
                )
            line.end()
            live.end()
            if line.why_cut:
                for writer in videos:
                    writer.__exit__(InterruptedError)  # a file that ends early does not get its name
        made: dict[str, Any] = {"samples": video.to(result_device())}
        notes = [note for note in (line.why_cut, line.why_dense, line.warning, *line.changes) if note]
        if sampler.record is not None:
            made[RECORD] = sampler.record
            if WIDENED in sampler.record.facts:
                notes.append(f"{WIDENED}: {sampler.record.facts[WIDENED]}")
        return io.NodeOutput(made, images_of(decoder), ui=shown(videos, notes))


class LightForcingSamplerSelect(io.ComfyNode):
    """The chunk sampler for SamplerCustomAdvanced, for graphs that bring their own noise, guider or sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSamplerSelect",
            inputs=[
                ScheduleType.Input("schedule", optional=True),
                io.Latent.Input("start_latent", optional=True),
                TimelineType.Input("timeline", optional=True),
                *run_inputs(),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return runs_off_plan[cls.hidden.unique_id]

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(ChunkSampler(Request(**inputs), [ProgressLine(cls.hidden.unique_id)]))


def steps_of(family: Family, steps: int) -> Sequence[int]:
    """The steps before the shift, out of 1000: the family's, or evenly spaced."""
    own = family.denoising_steps
    return own if steps in (0, len(own)) else [round(1000 * (steps - step) / steps) for step in range(steps)]


def shown(videos: Sequence[VideoWriter], notes: Sequence[str]) -> dict[str, Any] | None:
    """The node's display after the run: video files and `notes`."""
    found: dict[str, Any] = {"images": saved_results(videos), "animated": (True,)} if videos else {}
    if notes:
        found["text"] = tuple(notes)
    return found or None


def check_images_used(prompt: Mapping[str, Any], node_id: str, *, has_vae: bool, keep: bool) -> None:
    """Refuse a graph in which a node takes the sampler's IMAGE although there will be none."""
    link = [node_id, 1]
    user = next((node["class_type"] for node in prompt.values() if link in node.get("inputs", {}).values()), None)
    if user and not (has_vae and keep):
        off = "keep_images of Light Forcing Video Output is off; turn it on"
        problem = off if has_vae else "vae to nothing; connect Load VAE"
        raise ValueError(f"IMAGE is connected to {user}, but {problem}, or disconnect IMAGE")


def images_of(decoder: FrameDecoder | None) -> Any:
    """The frames as IMAGE, or a blocker that says why there are none."""
    images = decoder.images() if decoder else None
    why = "IMAGE is empty: connect a vae, and turn on keep_images of Light Forcing Video Output if that is connected"
    return ExecutionBlocker(why) if images is None else images
