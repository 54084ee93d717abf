"""The schedule node: how a video is split into chunks and how sparse each chunk is, and the numbers of its plot."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from comfy_api.latest import io, ui

from ..lightforcing_core.attention.options import AttentionOptions
from ..lightforcing_core.families import FAMILIES, Family, SinkRope, family_of
from ..lightforcing_core.rollout.cost import flops_ratio, model_ratio, recipe_costs, schedule_costs
from ..lightforcing_core.rollout.recipe import Recipe
from ..lightforcing_core.rollout.schedule import CURVES, Schedule, latent_frames_of
from .browser import watching_page
from .comfy import ModelPatcher, file_of, find_model, running_server
from .model.loader import settings_from
from .model.patch import settings_of
from .texts import node_schema

ScheduleType = io.Custom("LIGHTFORCING_SCHEDULE")
AUTO, DENSE, CUSTOM, GENTLE = "auto", "dense", "custom", "gentle"
FOLLOWING = (AUTO, DENSE, GENTLE)  # presets that take their chunks and window from the connected model
# The authors of Light Forcing skip 80 % on an H100, where dense attention is fast, instead of 88 and 85 %.
H100: dict[str, Family] = {
    f"{family.id}_h100": replace(family, title=f"{family.title}, H100 setting", target=0.8, base=0.9)
    for family in (FAMILIES["light_forcing_short"], FAMILIES["light_forcing_long"])
}
PUBLISHED = FAMILIES | H100
SINK_ROPES = get_args(SinkRope)
MOST_FRAMES = 16001
MOST_NUMBERS = latent_frames_of(MOST_FRAMES)  # one per chunk
MOST_TEXT = 1 << 17  # characters of all of them
NO_PRESET = f"this preset does not exist; use {AUTO}, {DENSE}, {GENTLE}, {CUSTOM} or a family"
PLOTTED = 60, 104  # the latent size of 480×832
ANY_LONG_VIDEO = 961  # checks a schedule whose length is not known before the graph runs
Number = TypeVar("Number", int, float)


class LightForcingSchedule(io.ComfyNode):
    """Chunk-Aware Growth: chunk lengths, window and sparsity per chunk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSchedule",
            inputs=[
                io.Int.Input("length", default=81, min=1, max=MOST_FRAMES, step=4),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in (AUTO, GENTLE, DENSE)),
                        io.DynamicCombo.Option(CUSTOM, custom_inputs()),
                        # Not "unknown", which `schedule_from` still takes from saved graphs.
                        *(io.DynamicCombo.Option(name, []) for name in PUBLISHED if name != "unknown"),
                    ],
                ),
                io.Model.Input("model", optional=True),
            ],
            outputs=[ScheduleType.Output(display_name="schedule")],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, length: int | None, preset: dict[str, Any] | None = None, **_: Any) -> bool:
        """Refuse an impossible schedule before anything runs; a linked input is None."""
        if preset is None:
            raise ValueError(NO_PRESET)
        if length is not None:
            _latent_frames_of(length)
        linked = [name for name, value in preset.items() if value is None and name != "sparsity"]
        if preset["preset"] == CUSTOM and not linked:
            if length is None:
                length, preset = ANY_LONG_VIDEO, preset | {"sparsity": ""}
            schedule_from(length, preset, None)
        return True

    @classmethod
    def execute(cls, length: int, preset: dict[str, Any], model: ModelPatcher | None = None) -> io.NodeOutput:
        settings = settings_of(model) if model is not None else None
        family = settings.family if settings else None
        if model is not None and family is None:  # Light Forcing Apply is bypassed, and the stock run reads no schedule
            family, _ = family_of(file_of(model))
        schedule = schedule_from(length, preset, family)
        is_drawn = watching_page(running_server()) is not None
        options = settings.attention if settings else AttentionOptions()
        return io.NodeOutput(schedule, ui=None if is_drawn else ui.PreviewText(_listed(schedule, options)))


def custom_inputs() -> list[io.Input]:
    return [
        io.Int.Input("frames_per_chunk", default=3, min=1, max=32, step=1),
        io.Int.Input("window", default=0, min=0, max=4001, step=1),
        io.Int.Input("sink_frames", default=0, min=0, max=32, step=1),
        io.Combo.Input("sink_rope", options=list(SINK_ROPES), default=SINK_ROPES[0], advanced=True),
        io.Float.Input("target", default=Family.target, min=0.0, max=0.99, step=0.01),
        io.Float.Input("base", default=0.0, min=0.0, max=1.0, step=0.01),
        io.Combo.Input("curve", options=list(CURVES), default=CURVES[0], advanced=True),
        io.Int.Input("dense_chunks", default=1, min=0, max=1000, step=1, advanced=True),
        io.String.Input("sparsity", default="", optional=True, advanced=True),
    ]


def schedule_from(length: int, preset: Mapping[str, Any], family: Family | None) -> Schedule:
    """The schedule of the node's inputs; `family`: the connected model's, if any.

    Raises ValueError for one that cannot be met, TypeError for an input that a custom schedule does not have.
    """
    frames = _latent_frames_of(length)
    settings = dict(preset)
    name = settings.pop("preset")
    if name == CUSTOM:
        if foreign := settings.keys() - {one.id for one in custom_inputs()}:
            raise TypeError(f"{min(foreign)!r:.80} is not an input of a custom schedule")
        target, base, window = (settings.pop(name) or None for name in ("target", "base", "window"))
        own = numbers_per_chunk(settings.pop("sparsity", None) or "", "sparsity", float, lists=True)
        overrides = tuple(sorted(own.items()))
        return Schedule(frames, window=window, target=target, base=base, title=CUSTOM, overrides=overrides, **settings)
    if name in PUBLISHED:
        return Schedule.of_family(PUBLISHED[name], frames)
    if name not in FOLLOWING:
        raise ValueError(NO_PRESET)
    if family is None:
        raise ValueError(
            f"preset {name} follows the checkpoint, but no model is connected; connect the MODEL of Light Forcing "
            f"Model Loader or Light Forcing Apply, or choose the checkpoint's family"
        )
    if name == GENTLE:
        family = replace(family, title=f"{family.title}, gentle", target=0.6, base=0.7)
    schedule = Schedule.of_family(family, frames)
    return schedule.dense() if name == DENSE else schedule


def _latent_frames_of(length: int) -> int:
    """Latent frames of a video that the node accepts: ComfyUI leaves the limits of its inputs to `validate_inputs`."""
    if length > MOST_FRAMES:
        raise ValueError(f"length {length} is more than {MOST_FRAMES} video frames")
    return latent_frames_of(length)


def numbers_per_chunk(text: str, name: str, number: Callable[[str], Number], *, lists: bool) -> dict[int, Number]:
    """Read one number per chunk from a text such as `3: 0.5, 7: 0.8`.

    lists: also accept plain numbers, the first for chunk 0. Raises ValueError, which names the input
    `name` and the part that cannot be read.
    """
    parts = [piece.strip() for piece in text[:MOST_TEXT].replace("\n", ",").split(",") if piece.strip()]
    if len(text) > MOST_TEXT or len(parts) > MOST_NUMBERS:
        raise ValueError(f"{name} is longer than a number for each of {MOST_NUMBERS} chunks, the most of any video")
    found: dict[int, Number] = {}
    for place, part in enumerate(parts):
        index, colon, value = part.rpartition(":")
        try:
            chunk = int(index) if colon or not lists else place
            found_before, found[chunk] = chunk in found, number(value)
        except ValueError:
            example = "0, 0.3, 0.5 or 3: 0.5, 7: 0.8" if lists else "4: 123, 7: 99"
            raise ValueError(f"{name}: {part!r:.80} is not a chunk and its number; write it like {example}") from None
        if chunk < 0 or found_before:
            problem = "is given twice" if found_before else "is negative; the first chunk is 0"
            raise ValueError(f"{name}: {part!r:.80} cannot be used, chunk {chunk!s:.80} {problem}")
    return found


def plot_numbers(asked: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the canvas's plot; `follows` if only a run knows the model, `error` if it cannot be met.

    asked: `length` and `preset` of the node, and `family`, `file` and the attention's `widgets` of the connected model
    as far as the canvas knows them; a request that no node makes raises what its values raise.
    """
    family, file = FAMILIES.get(asked.get("family") or ""), asked.get("file")
    if family is None and file is not None:
        family, _ = family_of(find_model("diffusion_models", file) or file)
    if asked["preset"]["preset"] in FOLLOWING and family is None:
        return {"follows": "the connected model decides when the graph runs"}
    try:
        schedule = schedule_from(asked["length"], asked["preset"], family)
        settings = settings_from(family or FAMILIES["unknown"], **asked.get("widgets") or {})
        return numbers_of(schedule, settings.attention)
    except ValueError as error:
        return {"error": str(error)}


def numbers_of(schedule: Schedule, options: AttentionOptions) -> dict[str, Any]:
    """A schedule as the canvas plots it.

    The size is not known. FLOPs, and the sparsities of a policy that decides them itself or reads a pool too, are those
    of 480×832; at another size, and in the other sparsities and their mean, each chunk differs from a run by less than
    one block. The mean is that of all chunks but the dense ones, weighted as for a target; None if nothing is skipped.
    Numbers that queries and keys decide are None.
    """
    lengths, rule = schedule.chunk_lengths(), options.rule
    sparsities = schedule.sparsities() or [0.0] * len(lengths)
    shape, text = (1, 16, schedule.latent_frames, *PLOTTED), torch.zeros(1, 1, 1)
    recipe = Recipe(shape, sigmas=(1.0, 0.0), context=text, attention=options, **schedule.arguments())
    costs = recipe_costs(recipe)
    drawn: list[float | None] = [None if cost.by_keys else max(0.0, 1.0 - cost.density) for cost in costs]
    sparse = costs
    if rule is not None and rule.uses_sparsity and options.pool_rule is None:
        drawn, sparse = [*sparsities], schedule_costs(sparsities, lengths, recipe.window)
    known, sparse = None not in drawn, sparse[max(1, schedule.dense_chunks) :]
    skipped = sum((1.0 - chunk.density) * chunk.kv_frames for chunk in sparse)
    return {
        "title": schedule.title,
        "lengths": lengths,
        "policy": options.policy_text if options.policy != "light_forcing" else "",
        "sparsities": drawn,
        "target": schedule.target,
        "mean": skipped / sum(chunk.kv_frames for chunk in sparse) if skipped else None,
        "window": recipe.window,
        "sink_frames": schedule.sink_frames,
        "attention_ratio": flops_ratio(costs) if known else None,
        "model_ratio": model_ratio(costs) if known else None,
    }


def _listed(schedule: Schedule, options: AttentionOptions) -> str:
    """The schedule as text, for clients that do not draw the plot."""
    numbers = numbers_of(schedule, options)
    mean = numbers["mean"] if None in numbers["sparsities"] else numbers["mean"] or 0.0
    each, mean = ", ".join(map(_sparsity, numbers["sparsities"])), _sparsity(mean)
    title = ", ".join(filter(None, (schedule.title, numbers["policy"])))
    return f"{title}: {len(numbers['lengths'])} chunks, sparsity {each}; mean of the sparse chunks {mean}"


def _sparsity(value: float | None) -> str:
    return "by the keys" if value is None else f"{value:.3f}"
