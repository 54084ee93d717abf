"""What both sampling nodes ask for, and which of their runs were cut short."""

from collections import Counter

from comfy_api.latest import io

from ..schedule import ScheduleType
from ..timeline import TimelineType
from .memory import kv_cache_input

# Runs of each node that were cut short: their results are kept, but the next queueing must not be answered with them.
CUT_SHORT: Counter[str | None] = Counter()


def schedule_input() -> io.Input:
    """The schedule socket of both nodes."""
    return ScheduleType.Input(
        "schedule",
        optional=True,
        tooltip="Chunks, window and sparsity, from Light Forcing Schedule. If not connected, the defaults of the "
        "model's family.",
    )


def timeline_input() -> io.Input:
    """The timeline socket of both nodes."""
    return TimelineType.Input(
        "timeline",
        optional=True,
        tooltip="Later prompts, from Light Forcing Prompt Timeline; the positive prompt applies until the first of "
        "them.",
    )


def run_inputs() -> list[io.Input]:
    """The inputs at the end of both nodes."""
    return [
        io.Combo.Input(
            "replay",
            options=["all", "window"],
            default="all",
            optional=True,
            advanced=True,
            tooltip="How a continued video is read again before sampling. all: every frame, so the result equals one "
            "long run. window: only the frames that are still visible; faster for long videos, close but not equal.",
        ),
        io.Boolean.Input(
            "keep_finished",
            default=True,
            optional=True,
            advanced=True,
            tooltip="On: a run that is cancelled or runs out of memory returns its finished chunks as a shorter "
            "video, and later nodes run. Off: the run ends as in other samplers, and the chunks are lost.",
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
            tooltip="The timestep, 0 to 1000, at which a finished chunk is written to the KV cache. 0 for every "
            "published checkpoint; a little more makes a model trust its own past less, against drift.",
        ),
        io.Latent.Input(
            "end_latent",
            optional=True,
            tooltip="The end of the video: an image from Light Forcing Encode with place end. It counts towards the "
            "length. Only the last chunk moves toward it, so it must be close to where the prompt leads; frame-wise "
            "checkpoints cannot use it.",
        ),
    ]
