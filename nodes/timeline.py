"""The prompt timeline node: prompts that take over during the video."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import itemgetter
from typing import Any, TypeAlias, get_args

from comfy_api.latest import io
from torch import Tensor

from ..lightforcing_core.rollout.schedule import latent_frame_at, video_frames_of
from ..lightforcing_core.rollout.timeline import FARTHEST, Prompt, Switch, check_text
from .texts import node_schema

TimelineType = io.Custom("LIGHTFORCING_TIMELINE")
PromptChange: TypeAlias = tuple[float, Prompt]  # from so many seconds on
FRAMES_PER_SECOND = 16
# Parts of CONDITIONING that a Wan T2V rollout would silently ignore.
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


class LightForcingPromptTimeline(io.ComfyNode):
    """Add a prompt that takes over at a given time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingPromptTimeline",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Float.Input("start", default=3.0, min=0.0, max=3600.0, step=0.25),
                io.Combo.Input("switch", options=list(get_args(Switch)), default="hard"),
                io.Int.Input("blend_chunks", default=4, min=1, max=1000, step=1),
                TimelineType.Input("timeline", optional=True),
                io.Int.Input("jump", default=Prompt.jump, min=0, max=FARTHEST, step=1, optional=True, advanced=True),
                io.Int.Input("pin", default=Prompt.pin, min=0, max=64, step=1, optional=True, advanced=True),
            ],
            outputs=[TimelineType.Output(display_name="timeline")],
        )

    @classmethod
    def execute(
        cls,
        positive: list,
        start: float,
        switch: Switch,
        blend_chunks: int,
        timeline: tuple[PromptChange, ...] = (),
        jump: int = Prompt.jump,
        pin: int = Prompt.pin,
    ) -> io.NodeOutput:
        text, extras = positive[0]
        reason = unsuitable_prompt(f"prompt at {start:g} s", [{**extras, "cross_attn": text}, *positive[1:]])
        if reason:
            raise ValueError(reason)
        return io.NodeOutput((*timeline, (start, Prompt(text, 0, switch, blend_chunks, jump, pin))))


def prompts_of(text: Tensor, timeline: Sequence[PromptChange], chunk_lengths: list[int]) -> list[Prompt]:
    """`text` from 0 s, then the timeline's prompts, each from its start's chunk.

    Raises ValueError for a start after the video's end and for two prompts in one chunk.
    """
    prompts, taken = [Prompt(text)], {0: "the sampler's own prompt"}
    *starts, total = accumulate(chunk_lengths, initial=0)
    for start, prompt in sorted(timeline, key=itemgetter(0)):
        frame = latent_frame_at(int(start * FRAMES_PER_SECOND))
        if frame >= total:
            seconds = video_frames_of(total) / FRAMES_PER_SECOND
            raise ValueError(f"a prompt at {start:g} s is after the end at {seconds:.2f} s; start it earlier")
        chunk = bisect_right(starts, frame) - 1
        if chunk in taken:
            frames = (max(0, video_frames_of(starts[chunk] + latents)) for latents in (0, chunk_lengths[chunk]))
            begin, end = (count / FRAMES_PER_SECOND for count in frames)
            raise ValueError(
                f"the prompt at {start:g} s is in chunk {chunk} ({begin:.2f} to {end:.2f} s), which already has "
                f"{taken[chunk]}; move it to another chunk"
            )
        taken[chunk] = f"the prompt at {start:g} s"
        prompts.append(replace(prompt, start_chunk=chunk))
    return prompts


def unsuitable_prompt(name: str, parts: Sequence[Mapping[str, Any]], *, may_be_empty: bool = False) -> str | None:
    """Why a rollout cannot follow CONDITIONING, as a list of mappings, or None."""
    if len(parts) != 1:
        return f"the {name} has {len(parts)} parts, and a rollout follows exactly one; do not combine prompts"
    text = parts[0].get("cross_attn")
    if text is None:
        return f"the {name} holds no text embedding; connect CLIP Text Encode with a Wan (umt5) text encoder"
    check_text(f"the {name}", text)
    if not may_be_empty and int((text.abs().amax(-1) > 0).sum(1).min()) < 2:
        return f"the {name} is empty; describe the video in it"
    unused = [field for field in UNUSED_BY_T2V if parts[0].get(field) is not None]
    if unused:
        return f"the {name} has {', '.join(unused)}, which a rollout cannot follow; remove that node"
    return None
