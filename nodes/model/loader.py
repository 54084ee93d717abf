"""Nodes that make a patched MODEL: from a checkpoint file of any published layout, or from another loader's MODEL."""

import contextlib
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...lightforcing_core.attention.backends import BACKEND_NAMES
from ...lightforcing_core.attention.options import AttentionOptions
from ...lightforcing_core.attention.policies import POLICIES
from ...lightforcing_core.attention.roles import read_roles
from ...lightforcing_core.attention.selection import ESTIMATORS
from ...lightforcing_core.checkpoint.files import CheckpointError, name_list
from ...lightforcing_core.checkpoint.load import load_dit_state_dict
from ...lightforcing_core.checkpoint.scaled import BY_ROWS, read_quantisation
from ...lightforcing_core.families import FAMILIES, Family, doubt_of, family_of
from ..comfy import (
    FORMATS,
    ModelPatcher,
    file_of,
    is_out_of_memory,
    load_model,
    model_files,
    model_path,
    why_no_rows,
    with_lora,
)
from ..texts import node_schema
from .patch import Settings, patched

AUTO, NONE = "auto", "none"
AS_FAMILY = -1
ROWWISE = "fp8_rowwise"
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    ROWWISE: {},
}
log = logging.getLogger(__name__)


class LightForcingModelLoader(io.ComfyNode):
    """Load any published autoregressive Wan 2.1 checkpoint, already patched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingModelLoader",
            search_aliases=[
                "autoregressive",
                "real-time",
                "self forcing",
                "causal forcing",
                "longlive",
                "krea realtime",
            ],
            inputs=[
                io.Combo.Input("model_name", options=model_files("diffusion_models")),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True),
                io.Combo.Input("weights", options=[AUTO, "ema", "plain"], default=AUTO, advanced=True),
                io.Combo.Input("lora_name", options=[NONE, *model_files("loras")], default=NONE),
                *option_inputs(),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
            accept_all_inputs=True,  # otherwise ComfyUI drops a policy that this version does not have
        )

    @classmethod
    def validate_inputs(cls, policy: Any = None) -> bool:
        return check_policy(policy)

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, weights: str, lora_name: str, family: str, **options: Any
    ) -> io.NodeOutput:
        path = model_path("diffusion_models", model_name)
        lora = None if lora_name == NONE else model_path("loras", lora_name)
        chosen = chosen_family(family, path)
        settings = settings_from(chosen, **options)
        model = load_checkpoint(path, weights, lora, weight_dtype, chosen)
        return io.NodeOutput(patched(model, settings), ui=assumed(chosen, family, path))


class LightForcingApply(io.ComfyNode):
    """Patch a MODEL that another loader made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingApply",
            inputs=[io.Model.Input("model"), *option_inputs()],
            outputs=[io.Model.Output(display_name="MODEL")],
            accept_all_inputs=True,  # otherwise ComfyUI drops a policy that this version does not have
        )

    @classmethod
    def validate_inputs(cls, policy: Any = None) -> bool:
        return check_policy(policy)

    @classmethod
    def execute(cls, model: ModelPatcher, family: str, **options: Any) -> io.NodeOutput:
        path = file_of(model)
        chosen = chosen_family(family, path)
        return io.NodeOutput(patched(model, settings_from(chosen, **options)), ui=assumed(chosen, family, path))


def option_inputs() -> list[io.Input]:
    """The inputs that loader and apply node share; `settings_from` reads them."""
    frames = {"default": AS_FAMILY, "min": AS_FAMILY, "max": 64, "step": 1, "advanced": True}
    return [
        io.Combo.Input("family", options=[AUTO, *FAMILIES], default=AUTO),
        io.Combo.Input("backend", options=[AUTO, *BACKEND_NAMES], default=AUTO, advanced=True),
        io.Combo.Input("block", options=[AUTO, "16", "32", "64", "128"], default=AUTO, advanced=True),
        io.Int.Input("keep_frames", **frames),
        io.Int.Input("keep_sink", **frames),
        io.Int.Input("keep_near", **frames),
        io.Combo.Input("estimator", options=[AUTO, *ESTIMATORS], default=AUTO, optional=True, advanced=True),
        io.Combo.Input("tail", options=[AUTO, "on", "off"], default=AUTO, optional=True, advanced=True),
        io.Boolean.Input("tiles", default=False, optional=True, advanced=True),
        io.Int.Input("reuse_steps", default=1, min=1, max=16, step=1, optional=True, advanced=True),
        io.DynamicCombo.Input("policy", options=policy_options(), optional=True),
    ]


def policy_options() -> list[io.DynamicCombo.Option]:
    """Every attention policy with the settings of its rule, in bounds that ComfyUI checks when a graph is queued."""

    def is_allowed(policy: str, name: str, value: float) -> bool:
        with contextlib.suppress(ValueError):
            return bool(AttentionOptions(policy=policy, settings=((name, value),)))
        return False

    def field(policy: str, name: str, value: float) -> io.Input:
        kind, low, high, step = (io.Int, 0, 100, 1) if isinstance(value, int) else (io.Float, 0.0, 1.0, 0.01)
        low += 0 if is_allowed(policy, name, low) else step
        high -= 0 if is_allowed(policy, name, high) else step
        return kind.Input(name, default=value, min=low, max=high, step=step, optional=True)

    listed = {name: [field(name, *one) for one in policy.settings.items()] for name, policy in POLICIES.items()}
    listed["forcing_kv"].append(io.String.Input("roles", default="", multiline=True, optional=True))
    return [io.DynamicCombo.Option(name, inputs) for name, inputs in ({AUTO: []} | listed).items()]


def check_policy(policy: Any) -> bool:
    """Refuse a policy that is not there when a graph is queued; ComfyUI checks its settings by their bounds."""
    settings_from(FAMILIES["unknown"], policy=AUTO if policy is None else policy)  # a linked input is None
    return True


def settings_from(family: Family, **widgets: Any) -> Settings:
    """The patch settings that `option_inputs` describe. Raises ValueError for values that do not fit together.

    A graph may lack the optional ones; `reuse_steps` has no effect, and saved graphs hold it. The settings of a policy
    come with its name, as {"policy": "mass", "top_p": 0.9}, or as "policy.top_p".
    """
    rule = {name.removeprefix("policy."): value for name, value in widgets.items() if name.startswith("policy.")}
    if isinstance(chosen := widgets.get("policy"), dict):
        rule |= chosen
        widgets["policy"] = rule.pop("policy")
    given = {name: value for name, value in widgets.items() if value not in (AUTO, AS_FAMILY)}
    if "tail" in given:
        given["tail"] = given["tail"] == "on"
    sparse = replace(family.sparse, **{name: given[name] for name in given.keys() & vars(family.sparse).keys()})
    block, frames = int(sparse.block), (sparse.keep_frames, sparse.keep_sink, sparse.keep_near)
    beyond = sparse.estimator, sparse.tail, given.get("tiles", False)
    roles = rule.pop("roles", None)
    settings = tuple((name, value) for name, value in rule.items() if value is not None)  # None: not in the graph
    policy: dict[str, Any] = {
        "policy": sparse.policy,
        "settings": settings,
        "roles": read_roles(roles) if roles else (),
    }
    return Settings(family, AttentionOptions(given.get("backend", AUTO), (block, block), *frames, *beyond, **policy))


def chosen_family(family: str, path: str) -> Family:
    """The widget's family; on auto, the one that the checkpoint's path suggests."""
    return family_of(path)[0] if family == AUTO else FAMILIES[family]


def assumed(family: Family, widget: str, path: str) -> ui.PreviewText | None:
    """The assumed defaults, shown and logged, if no name decides the family; or None."""
    text = doubt_of(path, family)
    if family.id == "unknown":
        steps = ", ".join(map(str, family.denoising_steps))
        text = (
            f"No file name shows which checkpoint this is. Assumed: chunks of {family.frames_per_chunk} latent frames, "
            f"no window, steps {steps}, {family.target:.0%} sparsity. If that is wrong, set `family`."
        )
    if widget != AUTO or text is None:
        return None
    log.warning("[Light Forcing] %s", text)
    return ui.PreviewText(text)


def load_checkpoint(
    path: str,
    weights: str,
    lora: str | None,
    weight_dtype: str,
    family: Family | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL from a checkpoint file; ComfyUI calls this for second copies too."""
    group = "ema" if weights == "ema" else None
    options: dict[str, Any] = {"weights": group, "family": family, "lora": lora, "lora_adapter": with_lora}
    load = partial(load_dit_state_dict, path, prefer_ema=weights != "plain", **options)
    state_dict, info = load()
    for note in info.notes:
        log.info("[Light Forcing] %s: %s", Path(path).name, note)
    if weight_dtype == ROWWISE and info.quantised is not None:
        raise CheckpointError(f"{path} is quantised already ({info.quantised}); set weight_dtype to default")
    formats = set(read_quantisation(state_dict).comfyui_layers.values())
    by_rows = weight_dtype == ROWWISE or BY_ROWS in formats
    if by_rows and weight_dtype != ROWWISE and (reason := why_no_rows()):
        log.warning("[Light Forcing] %s: its FP8 layers are read as bfloat16, because %s", Path(path).name, reason)
        by_rows, formats, (state_dict, info) = False, set(), load(dequantise_all=True)
    if by_rows:
        from .rowwise import quantized, restored, use_rows  # needs comfy-kitchen, which not every ComfyUI has

        state_dict = restored(quantized(state_dict, info.size.layers) if weight_dtype == ROWWISE else state_dict)
    if unknown := {kind.removesuffix(" with convrot") for kind in formats - {BY_ROWS}} - FORMATS.keys():
        names = name_list(map(repr, unknown))
        raise CheckpointError(f"{path} needs {names}, which this ComfyUI does not know; update ComfyUI")
    try:
        model = load_model(
            state_dict,
            options=WEIGHT_DTYPES[weight_dtype],
            metadata=info.metadata,
            disable_dynamic=disable_dynamic,
            again=(load_checkpoint, (path, weights, lora, weight_dtype, family)),
        )
    except Exception as error:  # a damaged file can raise anything in ComfyUI
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error!s:.300}"
        raise CheckpointError(f"{path}: ComfyUI cannot load it ({reason}); download it again or use bf16") from error
    if model is None:
        raise CheckpointError(f"{path} is Wan 2.1 in a form that this ComfyUI does not load; update ComfyUI")
    if by_rows:
        use_rows(model)
    return model
