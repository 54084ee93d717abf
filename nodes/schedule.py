"""The schedule node: how the video falls into chunks and how sparse each may be, with the curve on the node."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import folder_paths
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..lightforcing_core.families import FAMILIES, Family, SinkRope, family_of
from ..lightforcing_core.report.plots import plot_schedule
from ..lightforcing_core.rollout.cost import clip_cost, schedule_costs
from ..lightforcing_core.rollout.growth import CURVES
from ..lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from .canvas.browser import running_server, watching_page
from .model.patch import settings_of
from .per_chunk import numbers_per_chunk

ScheduleType = io.Custom("LIGHTFORCING_SCHEDULE")
AUTO, DENSE, CUSTOM, GENTLE = "auto", "dense", "custom", "gentle"
FOLLOWING = (AUTO, DENSE, GENTLE)  # presets that take their chunks and window from the connected model
# What Light Forcing's authors run on H100, where dense attention is fast: 80 % instead of 88 and 85 %.
H100: dict[str, Family] = {
    f"{family.id}_h100": replace(family, title=f"{family.title}, H100 setting", target=0.8, base=0.9)
    for family in (FAMILIES["light_forcing_short"], FAMILIES["light_forcing_long"])
}
PUBLISHED = FAMILIES | H100
SINK_ROPES = get_args(SinkRope)
GENTLE_TARGET, GENTLE_BASE = Family.target, Family.base  # what checkpoints bear that were never trained sparse
MOST_FRAMES = 16001
NO_PRESET = f"this preset does not exist; use {AUTO}, {DENSE}, {GENTLE}, {CUSTOM} or a family"
LONG = 961  # stands for a length that is only known when the graph runs


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
                    max=MOST_FRAMES,
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
                        *(io.DynamicCombo.Option(name, []) for name in H100),
                        io.DynamicCombo.Option(GENTLE, []),
                    ],
                    tooltip="auto: what the connected model's checkpoint was published with. dense: the same chunks "
                    "and window, nothing skipped (slower, the reference for quality). gentle: the same chunks and "
                    "window, 60 % skipped, safe for checkpoints that were not trained sparse. custom: your own.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The patched model, for auto, dense and gentle: its checkpoint family decides the values.",
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
    def validate_inputs(cls, length: int | None, preset: dict[str, Any] | None = None, **_: Any) -> bool:
        """Refuse what cannot be met before anything runs; what comes over a link is None here.

        Raises ValueError, which the host shows once; a returned reason it repeats for every input.
        """
        if preset is None:
            raise ValueError(NO_PRESET)
        if length is not None:
            latent_frames_of(length)
        linked = [name for name, value in preset.items() if value is None and name != "sparsity"]
        if preset["preset"] == CUSTOM and not linked:
            if length is None:  # only what holds for any long video can be said
                length, preset = LONG, preset | {"sparsity": ""}
            schedule_from(length, preset, None)
        return True

    @classmethod
    def execute(cls, length: int, preset: dict[str, Any], model: ModelPatcher | None = None) -> io.NodeOutput:
        settings = settings_of(model) if model is not None else None
        schedule = schedule_from(length, preset, settings.family if settings else None)
        is_drawn = watching_page(running_server()) is not None
        return io.NodeOutput(schedule, ui=None if is_drawn else picture_of(schedule, cls))


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
            options=list(SINK_ROPES),
            default=SINK_ROPES[0],
            advanced=True,
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
            advanced=True,
            tooltip="How sparsity grows from chunk to chunk. All meet the target; constant does not grow.",
        ),
        io.Int.Input(
            "dense_chunks",
            default=1,
            min=0,
            max=1000,
            step=1,
            advanced=True,
            tooltip="Chunks at the start that skip nothing: errors made there are inherited by the whole video.",
        ),
        io.String.Input(
            "sparsity",
            default="",
            optional=True,
            advanced=True,
            tooltip="Sparsity of single chunks instead of the curve's, such as 3: 0.5, 7: 0.8 or a plain list from "
            "chunk 0 on. The target then holds for the curve without them. Empty: the curve alone.",
        ),
    ]


def schedule_from(length: int, preset: Mapping[str, Any], family: Family | None) -> Schedule:
    """The schedule that the node's inputs describe; `family`: the connected model's, if any.

    Raises ValueError for one that cannot be met.
    """
    frames = latent_frames_of(length)
    settings = dict(preset)
    name = settings.pop("preset")
    if name == CUSTOM:
        target, window = settings.pop("target"), settings.pop("window")
        own = numbers_per_chunk(settings.pop("sparsity", None) or "", "sparsity", float, lists=True)
        overrides = tuple(sorted(own.items()))
        if settings["sink_rope"] not in SINK_ROPES:
            raise ValueError(f"sink_rope {settings['sink_rope']} is not known; use {' or '.join(SINK_ROPES)}")
        return Schedule(
            frames, window=window or None, target=target or None, title=CUSTOM, overrides=overrides, **settings
        )
    if name in PUBLISHED:
        return Schedule.of_family(PUBLISHED[name], frames)
    if name not in FOLLOWING:
        raise ValueError(NO_PRESET)
    if family is None:
        raise ValueError(
            f"preset {name} follows the checkpoint, but no patched model is connected; connect the MODEL of Light "
            f"Forcing Model Loader or Light Forcing Apply, or choose the checkpoint's family"
        )
    if name == GENTLE:
        family = replace(family, title=f"{family.title}, gentle", target=GENTLE_TARGET, base=GENTLE_BASE)
    schedule = Schedule.of_family(family, frames)
    return schedule.dense() if name == DENSE else schedule


def schedule_numbers(
    length: int, preset: Mapping[str, Any], family: str | None = None, file: str | None = None
) -> dict[str, Any]:
    """What the plot on the canvas shows, in JSON types; `follows` where only the running graph knows the model.

    family, file: of the connected model as far as the canvas knows them, as in Light Forcing Model Loader. Raises
    ValueError for a schedule that cannot be met, TypeError, KeyError or AttributeError for what are not its inputs.
    """
    if length > MOST_FRAMES:
        raise ValueError(f"length {length} is more than {MOST_FRAMES} video frames")
    known = FAMILIES.get(family or "")
    if known is None and file is not None:
        known, _ = family_of(folder_paths.get_full_path("diffusion_models", file) or file)
    if preset["preset"] in FOLLOWING and known is None:
        return {"follows": "the connected model decides when the graph runs"}
    schedule = schedule_from(length, preset, known)
    lengths = schedule.chunk_lengths()
    sparsities = schedule.sparsities() or [0.0] * len(lengths)
    cost = clip_cost(schedule_costs(sparsities, lengths, schedule.window))
    return {
        "title": schedule.title,
        "lengths": lengths,
        "sparsities": sparsities,
        "target": schedule.target,
        "window": schedule.window,
        "sink_frames": schedule.sink_frames,
        "attention_ratio": cost.attention_ratio,
        "model_ratio": cost.model_ratio,
    }


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
