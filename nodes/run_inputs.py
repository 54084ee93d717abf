"""What the sampling nodes ask for, why an end cannot be met, and which runs were cut short."""

from collections import Counter
from collections.abc import Sequence

import torch
from comfy_api.latest import io
from torch import Tensor

from ..lightforcing_core.schedule import Schedule, video_frames_of
from .memory import kv_cache_input
from .patch import LATENT_CHANNELS
from .schedule import ScheduleType
from .timeline import TimelineType

# Runs of each node that were cut short: their results are kept, but the next queueing must not be answered with them.
CUT_SHORT: Counter[str | None] = Counter()


def schedule_input() -> io.Input:
    """The schedule socket of both nodes."""
    return ScheduleType.Input(
        "schedule",
        optional=True,
        tooltip="Chunks, window and sparsity from Light Forcing Schedule. Left open: the defaults of the model's "
        "checkpoint family.",
    )


def timeline_input() -> io.Input:
    """The timeline socket of both nodes."""
    return TimelineType.Input(
        "timeline",
        optional=True,
        tooltip="Prompts that take over later, from Light Forcing Prompt Timeline; the positive prompt holds from the "
        "start.",
    )


def run_inputs() -> list[io.Input]:
    """The options at the end of both nodes."""
    return [
        io.Combo.Input(
            "replay",
            options=["all", "window"],
            default="all",
            optional=True,
            advanced=True,
            tooltip="How a continued video is read again before it goes on. all: every frame, so that the result "
            "equals one long run. window: only what is still visible; faster for long videos, close but not equal.",
        ),
        io.Boolean.Input(
            "keep_finished",
            default=True,
            optional=True,
            advanced=True,
            tooltip="On: a run that is cancelled or runs out of memory returns its finished chunks, a shorter video, "
            "and the nodes behind it run. Off: it ends there, as in other samplers, and the chunks are lost.",
        ),
        kv_cache_input(),
        io.Float.Input(
            "context_noise",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            optional=True,
            advanced=True,
            tooltip="The timestep, 0 to 1000, at which a finished chunk is read into the model's memory. 0 for every "
            "published checkpoint; a little more lets a model trust its own past less, against drift.",
        ),
    ]


def unsuitable_end(end: Tensor, latent_shape: Sequence[int], schedule: Schedule, initial_frames: int) -> str | None:
    """Why a video of `latent_shape`, [B, 16, frames, h, w], cannot end with the latents `end`, or None.

    initial_frames: latent frames that it starts with.
    """
    batch, _, frames, height, width = latent_shape
    if end.ndim != 5 or end.shape[1] != LATENT_CHANNELS:
        return (
            f"the end_latent has shape {list(end.shape)}, not [batch, {LATENT_CHANNELS}, frames, height, width]; "
            f"use Light Forcing Encode with place end and a Wan 2.1 VAE"
        )
    if not torch.isfinite(end).all():
        return "the end_latent holds NaN or infinity; encode it again"
    if end.shape[3:] != (height, width):
        return (
            f"end_latent is {8 * end.shape[4]}×{8 * end.shape[3]} and the video {8 * width}×{8 * height}; "
            f"resize the last image to the video's size before encoding it"
        )
    if end.shape[0] not in (1, batch):
        return f"end_latent is a batch of {end.shape[0]}, the video one of {batch}; use 1 or the same"
    usual, last = schedule.frames_per_chunk, schedule.chunk_lengths(initial_frames)[-1]
    if usual == 1:
        return (
            "end_latent cannot be met by a frame-wise model: the frame before it is finished before it is seen; use a "
            "chunk-wise checkpoint"
        )
    if end.shape[2] >= usual:
        return (
            f"end_latent holds {end.shape[2]} latent frames, and a chunk of {usual} can end with at most {usual - 1}; "
            f"encode one image, or the last {4 * (usual - 1)} frames of a video"
        )
    if end.shape[2] >= last:
        whole = video_frames_of(frames + usual - last)
        return (
            f"the video's {video_frames_of(frames)} frames leave its last chunk {last} latent frames, of which nothing "
            f"is left to lead to an end_latent of {end.shape[2]}; make the video {whole} frames long"
        )
    return None
