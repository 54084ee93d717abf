"""The attention options that the loader and the apply node share: widgets, and the settings that they make."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...lightforcing_core.attention.backends import BACKEND_NAMES
from ...lightforcing_core.attention.options import AttentionOptions
from ...lightforcing_core.attention.selection import ESTIMATORS
from ...lightforcing_core.families import FAMILIES, Family
from .patch import Settings

AUTO = "auto"
AS_FAMILY = -1


def option_inputs() -> list[io.Input]:
    """The inputs that loader and apply node share; `settings_from` reads them."""
    frames = {"default": AS_FAMILY, "min": AS_FAMILY, "max": 64, "step": 1, "advanced": True}
    return [
        io.Combo.Input("family", options=[AUTO, *FAMILIES], default=AUTO),
        io.Combo.Input("backend", options=[AUTO, *BACKEND_NAMES], default=AUTO, advanced=True),
        io.Combo.Input("block", options=["16", "32", "64", "128"], default="64", advanced=True),
        io.Int.Input("keep_frames", **frames),
        io.Int.Input("keep_sink", **frames),
        io.Int.Input("keep_near", **frames),
        io.Combo.Input("estimator", options=[AUTO, *ESTIMATORS], default=AUTO, optional=True, advanced=True),
        io.Combo.Input("tail", options=[AUTO, "on", "off"], default=AUTO, optional=True, advanced=True),
        io.Boolean.Input("tiles", default=False, optional=True, advanced=True),
        io.Int.Input("reuse_steps", default=1, min=1, max=16, step=1, optional=True, advanced=True),
    ]


def settings_from(
    family: Family,
    backend: str = AUTO,
    block: str = "64",
    keep_frames: int = AS_FAMILY,
    keep_sink: int = AS_FAMILY,
    keep_near: int = AS_FAMILY,
    estimator: str = AUTO,
    tail: str = AUTO,
    reuse_steps: int = 1,
    **beyond: Any,
) -> Settings:
    """The patch settings that `option_inputs` describe.

    reuse_steps has no effect; saved graphs hold it. beyond: the other options of `AttentionOptions` that go beyond the
    published method. Raises ValueError for values that do not fit together.
    """
    asked: dict[str, Any] = {"keep_frames": keep_frames, "keep_sink": keep_sink, "keep_near": keep_near}
    kept = replace(family.sparse, **{name: frames for name, frames in asked.items() if frames != AS_FAMILY})
    budget = kept.keep_frames, kept.keep_sink, kept.keep_near
    beyond["estimator"] = family.sparse.estimator if estimator == AUTO else estimator
    beyond["tail"] = family.sparse.tail if tail == AUTO else tail == "on"
    return Settings(family, AttentionOptions(backend, (int(block), int(block)), *budget, **beyond))
