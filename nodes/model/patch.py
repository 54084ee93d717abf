"""The patch: a clone of a Wan 2.1 T2V MODEL whose forward is ours while one of our samplers runs, and stock otherwise.

It hangs on the host's DIFFUSION_MODEL wrapper, which chains with others and leaves with the clone, so bypassing or
deleting the node gives the stock model back. A patch that the causal forward would silently drop is refused by name.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_sampling
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...lightforcing_core.attention.dispatch import AttentionOptions
from ...lightforcing_core.families import Family
from ...lightforcing_core.model.causal import forward

KEY = "light_forcing"
RUN = "light_forcing_run"  # where a sampler puts its rollout state in transformer_options
WAN_T2V = (comfy.model_base.WAN21, comfy.model_base.WAN21_CausalAR)
LATENT_CHANNELS = 16
CACHES = ("easycache", "lazycache")  # core's step caches: they skip forwards that the KV cache needs
FORWARD_PATCH = re.compile(r"^diffusion_model(\..*forward\w*|\.blocks\.\d+(\.(self|cross)_attn)?)?$")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the patch remembers for the samplers: the checkpoint's family and the attention options."""

    family: Family
    attention: AttentionOptions


def settings_of(model: ModelPatcher) -> Settings | None:
    """The patch's settings on a MODEL, None on one that carries no patch."""
    return model.get_attachment(KEY)


def patched(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """A clone of `model` with the patch and the family's shift. Raises ValueError for a MODEL that cannot carry it."""
    reason = conflicting_patch(model, model.model_options) or unsuitable_model(model)
    if reason:
        raise ValueError(reason)
    clone = model.clone()
    for kind, wrapper in ((WrappersMP.DIFFUSION_MODEL, _forward), (WrappersMP.OUTER_SAMPLE, _outer_sample)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_attachments(KEY, settings)
    clone.add_object_patch("model_sampling", _flow_sampling(clone, settings.family.shift))
    return clone


def unsuitable_model(model: ModelPatcher) -> str | None:
    """Why `model` is no Wan 2.1 text-to-video model, or None."""
    kind = type(model.model)
    if kind not in WAN_T2V:
        return (
            f"this MODEL is {kind.__name__}, not Wan 2.1 text-to-video; Light Forcing needs a Wan 2.1 T2V checkpoint "
            f"fine-tuned to be autoregressive, such as Self Forcing, Causal Forcing or LongLive"
        )
    dit = model.get_model_object("diffusion_model")
    channels = dit.in_dim, dit.out_dim
    if channels != (LATENT_CHANNELS, LATENT_CHANNELS) or dit.img_emb is not None or dit.ref_conv is not None:
        return (
            f"this MODEL is a Wan model of another kind ({channels[0]} channels in, {channels[1]} out, "
            f"{'with' if dit.img_emb is not None else 'without'} image embedding); Light Forcing needs Wan 2.1 "
            f"text-to-video with {LATENT_CHANNELS} in and out"
        )
    return None


def conflicting_patch(model: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    """The patch on a MODEL, or on one run's options, that the causal forward would silently drop, or None."""
    options = model_options.get("transformer_options", {})
    found = None
    if "optimized_attention_override" in options:
        found = "an attention override (optimized_attention_override)"
    for name, replaced in options.get("patches_replace", {}).items():
        if replaced:
            found = f"replaced blocks ({name} {', '.join(str(block) for block in list(replaced)[:3])})"
    for name in ("attn1_patch", "attn2_patch"):
        if options.get("patches", {}).get(name):
            found = f"an attention patch ({name})"
    if options.get("rope_options"):
        found = "scaled RoPE (rope_options)"
    if "context_handler" in model_options:
        found = "context windows (context_handler)"
    if model.get_additional_models_with_key("multigpu"):
        found = "a split over several GPUs (multigpu)"
    for table in (model.wrappers, options.get("wrappers", {})):
        for kind, by_key in table.items():
            for key, functions in by_key.items():
                if functions and key != KEY and (kind == WrappersMP.DIFFUSION_MODEL or key in CACHES):
                    found = f"another patch of the model's forward ({key or _name(functions[0])})"
    for name in model.object_patches:
        if FORWARD_PATCH.search(name):
            found = f"another patch of the model's forward ({name})"
    if found is None:
        return None
    return f"this MODEL carries {found}, which Light Forcing would silently drop; remove the node that adds it"


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _forward(executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
    """The DIFFUSION_MODEL wrapper: the causal forward while a run's state is in reach, else what comes next."""
    state = (transformer_options or {}).get(RUN)
    if state is None:
        return executor(x, timestep, context, clip_fea, time_dim_concat, transformer_options or {}, **kwargs)
    return forward(executor.class_obj, x, timestep, state.text, state)


def _outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
    """The OUTER_SAMPLE wrapper: our sampler checks its inputs and states its memory before any weight is loaded."""
    prepare = getattr(sampler, "light_forcing_prepare", None)
    if prepare is None:
        log.warning(
            "[Light Forcing] this sampler is not Light Forcing's, so the model runs as an ordinary bidirectional one. "
            "Use Light Forcing Sampler, or Light Forcing Sampler Select with SamplerCustomAdvanced."
        )
    else:
        prepare(executor.class_obj, noise, latent_image, *args, **kwargs)
    return executor(noise, latent_image, sampler, *args, **kwargs)


def _flow_sampling(model: ModelPatcher, shift: float) -> Any:
    """Flow matching with `shift` in the host's terms, as its own model-sampling nodes build it."""

    class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = FlowSampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    return sampling
