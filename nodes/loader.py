"""Nodes that make a patched MODEL: from a checkpoint file of any published layout, or from another loader's MODEL."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..lightforcing_core.attention import BACKENDS, AttentionOptions
from ..lightforcing_core.checkpoint import CheckpointError, inspect_checkpoint, load_dit_state_dict
from ..lightforcing_core.families import FAMILIES, guess_family
from .patch import Settings, patched

AUTO, NONE = "auto", "none"
AS_FAMILY = -1
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
log = logging.getLogger(__name__)


def option_inputs() -> list[io.Input]:
    """The inputs that loader and apply node share; `settings_from` reads them."""
    frames = {"default": AS_FAMILY, "min": AS_FAMILY, "max": 64, "step": 1, "advanced": True}
    return [
        io.Combo.Input(
            "family",
            options=[AUTO, *FAMILIES],
            default=AUTO,
            tooltip="Which checkpoint this is: sets the chunk length, window, sparsity and shift that the samplers "
            "use. auto reads the file's name; weights alone cannot tell.",
        ),
        io.Combo.Input(
            "backend",
            options=[AUTO, *BACKENDS],
            default=AUTO,
            tooltip="What computes sparse attention. auto takes the fastest that runs here; a named one that cannot "
            "run is an error instead of a silent fallback.",
            advanced=True,
        ),
        io.Combo.Input(
            "block",
            options=["16", "32", "64", "128"],
            default="64",
            tooltip="Tokens per attention block. Smaller blocks choose more precisely and run slower; 64 is what the "
            "method was published with.",
            advanced=True,
        ),
        io.Int.Input(
            "keep_frames",
            tooltip="Past latent frames that stay eligible for sparse attention, sinks and nearest included. Fewer "
            "is faster and forgets more; -1 takes the family's value.",
            **frames,
        ),
        io.Int.Input(
            "keep_sink",
            tooltip="How many of the kept frames are always the video's first ones. -1 takes the family's value.",
            **frames,
        ),
        io.Int.Input(
            "keep_near",
            tooltip="How many of the kept frames are always the nearest ones: motion stays smooth. -1 takes the "
            "family's value.",
            **frames,
        ),
    ]


def settings_from(
    file_name: str, family: str, backend: str, block: str, keep_frames: int, keep_sink: int, keep_near: int
) -> Settings:
    """The patch settings that `option_inputs` describe; `file_name` decides the family on auto."""
    chosen = guess_family(file_name) if family == AUTO else FAMILIES[family]

    def or_family(value: int, default: int) -> int:
        return default if value == AS_FAMILY else value

    kept = replace(
        chosen,
        keep_frames=or_family(keep_frames, chosen.keep_frames),
        keep_sink=or_family(keep_sink, chosen.keep_sink),
        keep_near=or_family(keep_near, chosen.keep_near),
    )
    options = AttentionOptions(backend, (int(block), int(block)), kept.keep_frames, kept.keep_sink, kept.keep_near)
    return Settings(chosen, options)


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
                    "RTX 40 and later.",
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
        settings = settings_from(model_name, family, **options)
        return io.NodeOutput(patched(load_checkpoint(path, weights, lora, weight_dtype), settings))


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
        return io.NodeOutput(patched(model, settings_from(_file_name(model), family, **options)))


def load_checkpoint(
    path: str, weights: str, lora: str | None, weight_dtype: str, disable_dynamic: bool = False
) -> ModelPatcher:
    """A MODEL from a checkpoint file; the host calls this again when it needs a second copy."""
    prefer_ema, group = weights != "plain", None
    if weights == "ema":
        info = inspect_checkpoint(path)
        group = next((name for name in (info.weights, *info.other_weights) if "ema" in name), None)
        if group is None:
            raise CheckpointError(f"{path} holds no EMA weights; set weights to auto")
    state_dict, info = load_dit_state_dict(path, prefer_ema=prefer_ema, weights=group, lora=lora)
    for note in info.notes:
        log.info("[Light Forcing] %s: %s", Path(path).name, note)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options=dict(WEIGHT_DTYPES[weight_dtype]),
        metadata=info.metadata,
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise CheckpointError(f"{path} is Wan 2.1 in a form that this ComfyUI does not load; update ComfyUI")
    model.cached_patcher_init = (load_checkpoint, (path, weights, lora, weight_dtype))
    return model


def _file_name(model: ModelPatcher) -> str:
    """The name of the file that a MODEL came from, "" where its loader does not tell."""
    made_by = model.cached_patcher_init
    return next((Path(part).name for part in made_by[1] if isinstance(part, str)), "") if made_by else ""
