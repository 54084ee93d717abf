"""The patch: a clone of a Wan 2.1 T2V MODEL whose forward is ours while one of our samplers runs, and stock otherwise.

It hangs on the host's DIFFUSION_MODEL wrapper, which chains with others and leaves with the clone, so bypassing or
deleting the node gives the stock model back. A patch that the causal forward would silently drop is refused by name.
"""

import logging
from dataclasses import dataclass
from typing import Any

from ...lightforcing_core.attention.dispatch import AttentionOptions
from ...lightforcing_core.families import Family
from ..comfy import WAN_T2V, ModelPatcher, WrappersMP, flow_sampling, forward_patches

KEY = "light_forcing"
RUN = "light_forcing_run"  # the key in transformer_options of the pass that a sampler runs
LATENT_CHANNELS = 16
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
    clone.add_object_patch("model_sampling", flow_sampling(clone, settings.family.shift))
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
    """Why a patch on a MODEL, or on one run's options, would be dropped by the causal forward, or None."""
    found = next(forward_patches(model, model_options, KEY), None)
    return found and f"this MODEL has {found}, which Light Forcing would silently drop; remove the node that adds it"


def _forward(executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
    """The DIFFUSION_MODEL wrapper: the causal forward while a sampler of ours runs, else the next wrapper."""
    model_pass = (transformer_options or {}).get(RUN)
    if model_pass is None:
        return executor(x, timestep, context, clip_fea, time_dim_concat, transformer_options or {}, **kwargs)
    return model_pass(executor.class_obj, x, timestep)


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
