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
    """The inputs at the end of both nodes."""
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
        io.Latent.Input(
            "end_latent",
            optional=True,
            tooltip="What the video ends with: an image from Light Forcing Encode with place end. It counts towards "
            "the length. Only the last chunk bends toward it, so it has to be near what the prompt leads to; "
            "frame-wise checkpoints cannot do it.",
        ),
    ]
