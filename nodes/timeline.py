"""The prompt timeline node: prompts that take over while the video runs, chained one behind the other."""

from collections.abc import Sequence
from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..lightforcing_core.rollout.schedule import latent_frame_at, video_frames_of
from ..lightforcing_core.rollout.timeline import Prompt, Switch
from .sampling.refusals import unsuitable_prompt

TimelineType = io.Custom("LIGHTFORCING_TIMELINE")
FRAMES_PER_SECOND = 16


@dataclass(frozen=True, eq=False)
class PromptChange:
    """A prompt that takes over `start` seconds into the video; text: [B or 1, tokens, text_dim]."""

    text: Tensor
    start: float
    switch: Switch
    blend_chunks: int


class LightForcingPromptTimeline(io.ComfyNode):
    """CONDITIONING and a start time → one more change on the timeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingPromptTimeline",
            display_name="Light Forcing Prompt Timeline",
            category="Light Forcing",
            description="A prompt that takes over at a given second of the video. Chain several; the sampler's own "
            "prompt holds from the start until the first of them.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the video shows from start on."),
                io.Float.Input(
                    "start",
                    default=3.0,
                    min=0.0,
                    max=3600.0,
                    step=0.25,
                    tooltip="Seconds into the video, at 16 frames per second. The change happens at the beginning of "
                    "the chunk that contains this moment.",
                ),
                io.Combo.Input(
                    "switch",
                    options=["hard", "soft", "blend"],
                    default="hard",
                    tooltip="hard: what is still visible is read again under the new prompt, so the scene turns at "
                    "once (one extra pass). soft: only the text changes, the picture follows slowly. blend: soft, "
                    "moving from the old text to the new one over several chunks.",
                ),
                io.Int.Input(
                    "blend_chunks",
                    default=4,
                    min=1,
                    max=1000,
                    step=1,
                    tooltip="For blend: chunks until the new prompt holds alone. A chunk of 3 latent frames is 0.75 "
                    "seconds.",
                ),
                TimelineType.Input(
                    "timeline", optional=True, tooltip="Other changes, from another Light Forcing Prompt Timeline."
                ),
            ],
            outputs=[TimelineType.Output(display_name="timeline", tooltip="For the sampler, or for the next change.")],
        )

    @classmethod
    def execute(
        cls,
        positive: list,
        start: float,
        switch: Switch,
        blend_chunks: int,
        timeline: tuple[PromptChange, ...] = (),
    ) -> io.NodeOutput:
        text, extras = positive[0]
        reason = unsuitable_prompt(f"prompt at {start:g} s", [{**extras, "cross_attn": text}, *positive[1:]])
        if reason:
            raise ValueError(reason)
        return io.NodeOutput((*timeline, PromptChange(text, start, switch, blend_chunks)))


def prompts_of(text: Tensor, timeline: Sequence[PromptChange], chunk_lengths: list[int]) -> list[Prompt]:
    """The rollout's prompts: `text` from 0 s, then the timeline's, each from the chunk that contains its start.

    Raises ValueError for a start behind the video's end and for two prompts on one chunk.
    """
    prompts, taken = [Prompt(text)], {0: "the sampler's own prompt"}
    total = sum(chunk_lengths)
    for change in sorted(timeline, key=lambda change: change.start):
        frame = latent_frame_at(int(change.start * FRAMES_PER_SECOND))
        if frame >= total:
            seconds = video_frames_of(total) / FRAMES_PER_SECOND
            raise ValueError(
                f"a prompt starts at {change.start:g} s, but the video ends at {seconds:.2f} s; start it earlier or "
                f"make the video longer"
            )
        chunk = next(i for i in range(len(chunk_lengths)) if sum(chunk_lengths[: i + 1]) > frame)
        if chunk in taken:
            begin = _seconds(sum(chunk_lengths[:chunk]))
            end = _seconds(sum(chunk_lengths[: chunk + 1]))
            raise ValueError(
                f"the prompt at {change.start:g} s falls on chunk {chunk} ({begin:.2f} to {end:.2f} s), which follows "
                f"{taken[chunk]} already; move it to another chunk"
            )
        taken[chunk] = f"the prompt at {change.start:g} s"
        prompts.append(Prompt(change.text, chunk, change.switch, change.blend_chunks))
    return prompts


def _seconds(latent_frame: int) -> float:
    """When a latent frame begins."""
    return max(0, video_frames_of(latent_frame)) / FRAMES_PER_SECOND
