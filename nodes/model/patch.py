"""The patch: a clone of a Wan 2.1 T2V MODEL that runs causally under this pack's samplers, and stock otherwise.

ComfyUI calls a sampler, and the sampler calls the model through ComfyUI, so that hooks, LoRAs and offloading work. The
patch adds two ways from the sampler into the model, both as wrappers that chain with others and belong to the clone:

1. Before sampling, `CausalSampler.prepare_run` checks the inputs and requests memory, while no weights are loaded yet.
2. In each forward, the passes of the rollout arrive in `transformer_options`, the one argument that ComfyUI hands from
   a sampler to the model unchanged (`run_passes` puts them there, `_forward` takes them out). The text comes from the
   pass, because prompts change during a run; ComfyUI's own conditioning is computed as usual, and not used.

ComfyUI mixes the predictions of a step, so guidance patches act as with other samplers. Without our sampler neither
way is taken, and bypassing or deleting the node gives the stock model back. A patch that a rollout cannot follow is
refused by name.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lightforcing_core.attention.options import AttentionOptions
from ...lightforcing_core.families import Family
from ...lightforcing_core.model.causal import Pass
from ..comfy import (
    WAN_T2V,
    ModelPatcher,
    Sampler,
    WrappersMP,
    calc_cond_batch,
    conflicting_patches,
    flow_shift,
    guidance_of,
    name_of,
    set_shift,
)

KEY = "light_forcing"
RUN = "light_forcing_run"  # the key in transformer_options of the passes that a sampler runs
MODEL_WRAPPERS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)  # these may run the model more than once
LATENT_CHANNELS = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The patch's settings: the checkpoint's family and the attention options."""

    family: Family
    attention: AttentionOptions


class CausalSampler(Sampler):
    """A SAMPLER of this pack; `prepare_run` checks a run and plans its memory before any weight is loaded."""

    prepare_run: Callable[..., None]


def settings_of(model: ModelPatcher) -> Settings | None:
    return model.get_attachment(KEY)


def required_settings(model: ModelPatcher) -> Settings:
    settings = settings_of(model)
    if settings is None:
        raise ValueError("this MODEL has no Light Forcing patch; put Light Forcing Apply after its loader")
    return settings


def patched(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """A clone with the patch and, unless a node set another, the family's shift; ValueError if unsuitable."""
    reason = conflicting_patch(model, model.model_options) or unsuitable_model(model)
    if reason:
        raise ValueError(reason)
    clone = model.clone()
    for kind, wrapper in ((WrappersMP.DIFFUSION_MODEL, _forward), (WrappersMP.OUTER_SAMPLE, _outer_sample)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_attachments(KEY, settings)
    set_shift(clone, settings.family.shift)
    flow_shift(clone)
    return clone


def unsuitable_model(model: ModelPatcher) -> str | None:
    """Why `model` is not a Wan 2.1 text-to-video model, or None."""
    kind = type(model.model)
    if kind not in WAN_T2V:
        return (
            f"this MODEL is {kind.__name__}, not Wan 2.1 text-to-video; Light Forcing needs a Wan 2.1 T2V checkpoint "
            f"fine-tuned to be autoregressive, such as Self Forcing or LongLive (not LongLive 2, based on Wan 2.2 TI2V)"
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
    """Why a rollout cannot follow a patch on a MODEL or a run, or None."""
    found = next(conflicting_patches(model, model_options, KEY), None)
    return found and f"this MODEL has {found}, which Light Forcing cannot follow; remove the node that adds it"


def _outer_sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Sampler,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **named: Any,
) -> Tensor:
    """The OUTER_SAMPLE wrapper, around a whole sampling: the first way in."""
    if isinstance(sampler, CausalSampler):
        sampler.prepare_run(executor.class_obj, noise, latent_image, sigmas, denoise_mask, seed or 0)
    else:
        log.warning(
            "[Light Forcing] this sampler is not Light Forcing's, so the model runs as an ordinary bidirectional one. "
            "Use Light Forcing Sampler, or Light Forcing Sampler Select with SamplerCustomAdvanced."
        )
    return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **named)


def run_passes(model_wrap: Any, x: Tensor, sigma: float, passes: Sequence[Pass], extra_args: dict[str, Any]) -> Tensor:
    """x0 of the open chunk [B, 16, f, h, w]: ComfyUI runs the model's passes, each once, and mixes their predictions.

    A commit has no prediction, so no guidance sees it.
    """
    model_options, levels = extra_args["model_options"], x.new_full((x.shape[0],), sigma)
    options, left = model_options["transformer_options"], {one.state.guide: one for one in passes}

    def run(dit: Any, x: Tensor, timestep: Tensor, guides: Sequence[int]) -> Tensor:
        if not left.keys() >= set(guides):
            wrappers = [by_key for kind, by_key in options.get("wrappers", {}).items() if kind in MODEL_WRAPPERS]
            found = [one for by_key in wrappers for functions in by_key.values() for one in functions]
            found += filter(None, [model_options.get("model_function_wrapper")])
            names = ", ".join(map(name_of, guidance_of(model_options) + found))
            raise ValueError(
                f"this MODEL has a patch that runs it twice in one step, or for the negative prompt at cfg 1, which "
                f"Light Forcing cannot follow; remove the node that adds it, one of: {names}"
            )
        parts = zip(guides, x.chunk(len(guides)), timestep.chunk(len(guides)), strict=True)
        return torch.cat([left.pop(guide)(dit, part, at) for guide, part, at in parts])

    options[RUN] = run
    try:
        if not passes[0].commits:
            return model_wrap(x, levels, **extra_args)
        prompts = [model_wrap.conds["positive"], model_wrap.conds["negative"]]
        prompts = [prompt if guide in left else None for guide, prompt in enumerate(prompts)]
        return calc_cond_batch(model_wrap.inner_model, prompts, x, levels, model_options)[passes[0].state.guide]
    finally:
        del options[RUN]


def _forward(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    clip_fea: Any = None,
    time_dim_concat: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **named: Any,
) -> Tensor:
    """The DIFFUSION_MODEL wrapper, around the model's forward: the second way in."""
    options = transformer_options or {}
    if RUN not in options:
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **named)
    return options[RUN](executor.class_obj, x, timestep, options["cond_or_uncond"])
