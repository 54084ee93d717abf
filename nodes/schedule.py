"""The schedule node: how the video falls into chunks and how sparse each may be, with the curve on the node."""

import importlib.util
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..lightforcing_core.families import FAMILIES
from ..lightforcing_core.growth import CURVES
from ..lightforcing_core.report import plot_schedule
from ..lightforcing_core.schedule import Schedule, latent_frames_of
from .patch import settings_of
from .per_chunk import numbers_per_chunk

ScheduleType = io.Custom("LIGHTFORCING_SCHEDULE")
AUTO, DENSE, CUSTOM = "auto", "dense", "custom"


class LightForcingSchedule(io.ComfyNode):
    """Chunk-Aware Growth: chunk lengths, window and sparsity per chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSchedule",
            display_name="Light Forcing Schedule",
            category="Light Forcing",
            description="How the video is cut into chunks, how far each chunk looks back and how much of that it may "
            "skip. Early chunks stay dense, later ones grow sparser (Chunk-Aware Growth).",
            inputs=[
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=16001,
                    step=4,
                    tooltip="Video frames, 1 + 4·k; must equal the latent's length. 81 is 5 seconds at 16 fps.",
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        io.DynamicCombo.Option(AUTO, []),
                        *(io.DynamicCombo.Option(family, []) for family in FAMILIES),
                        io.DynamicCombo.Option(DENSE, []),
                        io.DynamicCombo.Option(CUSTOM, custom_inputs()),
                    ],
                    tooltip="auto: what the connected model's checkpoint was published with. dense: the same chunks "
                    "and window, nothing skipped (slower, the reference for quality). custom: your own.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The patched model, for auto and dense: its checkpoint family decides the values.",
                ),
            ],
            outputs=[
                ScheduleType.Output(
                    display_name="schedule", tooltip="For Light Forcing Sampler or Light Forcing Sampler Select."
                )
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, length: int, preset: dict[str, Any], model: ModelPatcher | None = None) -> io.NodeOutput:
        schedule = schedule_from(length, dict(preset), model)
        return io.NodeOutput(schedule, ui=picture_of(schedule, cls))


def custom_inputs() -> list[io.Input]:
    """The inputs of the custom preset."""
    return [
        io.Int.Input(
            "frames_per_chunk",
            default=3,
            min=1,
            max=32,
            step=1,
            tooltip="Latent frames per chunk. Must match the checkpoint: 3 for chunk-wise ones, 1 for frame-wise.",
        ),
        io.Int.Input(
            "window",
            default=0,
            min=0,
            max=4001,
            step=1,
            tooltip="Latent frames that stay visible, sinks and the current chunk included. Bounds memory and time on "
            "long videos; 0 keeps all.",
        ),
        io.Int.Input(
            "sink_frames",
            default=0,
            min=0,
            max=32,
            step=1,
            tooltip="First latent frames that stay visible after the window has moved on: they hold the look.",
        ),
        io.Combo.Input(
            "sink_rope",
            options=["fixed", "follow"],
            default="fixed",
            tooltip="Where sinks stand in time once the window has moved on: at the start (LongLive) or right before "
            "the window (Infinite Forcing, Light Forcing long).",
        ),
        io.Float.Input(
            "target",
            default=0.6,
            min=0.0,
            max=0.99,
            step=0.01,
            tooltip="Share of key blocks that all sparse chunks skip on average. 0.6 computes 40 % of attention; 0 is "
            "dense.",
        ),
        io.Float.Input(
            "base",
            default=0.7,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Sparsity that late chunks tend to; at least the target. Further above it means denser early "
            "chunks.",
        ),
        io.Combo.Input(
            "curve",
            options=list(CURVES),
            default=CURVES[0],
            tooltip="How sparsity grows from chunk to chunk. All meet the target; constant does not grow.",
        ),
        io.Int.Input(
            "dense_chunks",
            default=1,
            min=0,
            max=1000,
            step=1,
            tooltip="Chunks at the start that skip nothing: errors made there are inherited by the whole video.",
        ),
        io.String.Input(
            "sparsity",
            default="",
            optional=True,
            tooltip="Sparsity of single chunks instead of the curve's, such as 3: 0.5, 7: 0.8 or a plain list from "
            "chunk 0 on. The target then holds for the curve without them. Empty: the curve alone.",
        ),
    ]


def schedule_from(length: int, preset: dict[str, Any], model: ModelPatcher | None) -> Schedule:
    """The schedule that the node's inputs describe. Raises ValueError for one that cannot be met."""
    frames = latent_frames_of(length)
    name = preset.pop("preset")
    if name == CUSTOM:
        target, window = preset.pop("target"), preset.pop("window")
        own = numbers_per_chunk(preset.pop("sparsity", None) or "", "sparsity", float, lists=True)
        overrides = tuple(sorted(own.items()))
        return Schedule(
            frames, window=window or None, target=target or None, title=CUSTOM, overrides=overrides, **preset
        )
    if name in FAMILIES:
        return Schedule.of_family(FAMILIES[name], frames)
    settings = settings_of(model) if model is not None else None
    if settings is None:
        raise ValueError(
            f"preset {name} follows the checkpoint, but no patched model is connected; connect the MODEL of Light "
            f"Forcing Model Loader or Light Forcing Apply, or choose the checkpoint's family"
        )
    schedule = Schedule.of_family(settings.family, frames)
    return schedule if name == AUTO else schedule.dense()


def picture_of(schedule: Schedule, node: type[io.ComfyNode]) -> Any:
    """The curve as an image on the node; as text where matplotlib is not installed."""
    lengths = schedule.chunk_lengths()
    sparsities = schedule.sparsities() or [0.0] * len(lengths)
    if importlib.util.find_spec("matplotlib") is None:
        listed = ", ".join(f"{sparsity:.3f}" for sparsity in sparsities)
        return ui.PreviewText(f"{schedule.title}: {len(lengths)} chunks, sparsity {listed}")
    plot = plot_schedule(sparsities, lengths, schedule.window, schedule.target)
    pixels = torch.from_numpy(np.asarray(plot, dtype=np.float32) / 255.0)
    return ui.PreviewImage(pixels[None], cls=node)
