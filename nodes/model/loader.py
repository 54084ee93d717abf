"""Nodes that make a patched MODEL: from a checkpoint file of any published layout, or from another loader's MODEL."""

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ...lightforcing_core.checkpoint.load import CheckpointError, inspect_checkpoint, load_dit_state_dict
from ...lightforcing_core.checkpoint.scaled import BY_ROWS
from ...lightforcing_core.families import FAMILIES, Family, family_of
from .options import AUTO, option_inputs, settings_from
from .patch import patched

NONE = "none"
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
        return io.Schema(
            node_id="LightForcingModelLoader",
            display_name="Light Forcing Model Loader",
            category="Light Forcing",
            description="Loads an autoregressive Wan 2.1 checkpoint in any published layout (Self Forcing, Causal "
            "Forcing, LongLive, Light Forcing, Infinite Forcing, Krea), .pt or .safetensors, ready to sample.",
            search_aliases=["self forcing", "causal forcing", "longlive", "krea realtime"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A checkpoint in models/diffusion_models. Training files (.pt with generator or "
                    "generator_ema) load as they are.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="fp8 halves the weights' memory; quality drops a little. _fast also computes in fp8 on "
                    "RTX 40 and later. fp8_rowwise does too and scales every channel and token, which keeps outliers "
                    "that the others cut off. Leave default for a checkpoint that is fp8 already.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "weights",
                    options=[AUTO, "ema", "plain"],
                    default=AUTO,
                    tooltip="Which set to load where a file holds several. auto follows the checkpoint's authors: EMA, "
                    "except for LongLive and chunk-wise Causal Forcing.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *folder_paths.get_filename_list("loras")],
                    default=NONE,
                    tooltip="A LoRA that belongs to the checkpoint and is merged at strength 1, such as LongLive's "
                    "lora.pt. Style LoRAs go into a Load LoRA node behind this one.",
                ),
                *option_inputs(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Patched: use it with Light Forcing Sampler.")],
        )

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, weights: str, lora_name: str, family: str, **options: Any
    ) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        lora = None if lora_name == NONE else folder_paths.get_full_path_or_raise("loras", lora_name)
        chosen = chosen_family(family, path)
        model = load_checkpoint(path, weights, lora, weight_dtype, chosen)
        return io.NodeOutput(patched(model, settings_from(chosen, **options)), ui=assumed(chosen, family))


class LightForcingApply(io.ComfyNode):
    """Patch a MODEL that another loader made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingApply",
            display_name="Light Forcing Apply",
            category="Light Forcing",
            description="Makes a Wan 2.1 text-to-video MODEL from any loader (Load Diffusion Model, GGUF, with LoRAs) "
            "ready for Light Forcing Sampler. Bypass it and the stock model is back.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan 2.1 T2V model that was fine-tuned to be autoregressive. Plain Wan 2.1 loads too, "
                    "but was not trained for this and drifts into noise.",
                ),
                *option_inputs(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="A patched clone; the input stays as it was.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, family: str, **options: Any) -> io.NodeOutput:
        chosen = chosen_family(family, _file_of(model))
        return io.NodeOutput(patched(model, settings_from(chosen, **options)), ui=assumed(chosen, family))


def chosen_family(family: str, path: str) -> Family:
    """The family named in the widget; on auto, the one that the checkpoint's path suggests."""
    return family_of(path)[0] if family == AUTO else FAMILIES[family]


def assumed(family: Family, widget: str) -> ui.PreviewText | None:
    """The defaults that apply because no name tells the family, as text on the node and in the log; else None."""
    if widget != AUTO or family.id != "unknown":
        return None
    steps = ", ".join(map(str, family.denoising_steps))
    text = (
        f"No file name tells which checkpoint this is. Assumed: chunks of {family.frames_per_chunk} latent frames, "
        f"no window, steps {steps}, {family.target:.0%} sparsity. If that is wrong, set `family`."
    )
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
    """A MODEL from a checkpoint file; ComfyUI calls this again if it needs a second copy."""
    prefer_ema, group = weights != "plain", None
    if weights == "ema":
        info = inspect_checkpoint(path)
        group = next((name for name in (info.weights, *info.other_weights) if "ema" in name), None)
        if group is None:
            raise CheckpointError(f"{path} holds no EMA weights; set weights to auto")
    state_dict, info = load_dit_state_dict(path, prefer_ema=prefer_ema, weights=group, family=family, lora=lora)
    for note in info.notes:
        log.info("[Light Forcing] %s: %s", Path(path).name, note)
    if weight_dtype == ROWWISE and info.quantised is not None:
        raise CheckpointError(f"{path} is quantised already ({info.quantised}); set weight_dtype to default")
    by_rows = weight_dtype == ROWWISE or BY_ROWS in (info.quantised or "")
    if by_rows:
        from .rowwise import adopt, opened, quantized  # not every ComfyUI has comfy-kitchen, which it builds on

        state_dict = quantized(state_dict, info.layers) if weight_dtype == ROWWISE else opened(state_dict)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options=dict(WEIGHT_DTYPES[weight_dtype]),
        metadata=info.metadata,
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise CheckpointError(f"{path} is Wan 2.1 in a form that this ComfyUI does not load; update ComfyUI")
    if by_rows:
        adopt(model)
    model.cached_patcher_init = (load_checkpoint, (path, weights, lora, weight_dtype, family))
    return model


def _file_of(model: ModelPatcher) -> str:
    """The path of the file that a MODEL came from, "" if its loader does not say."""
    made_by = model.cached_patcher_init
    return next((part for part in made_by[1] if isinstance(part, str)), "") if made_by else ""
