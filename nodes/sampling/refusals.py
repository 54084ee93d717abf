"""Reasons why a rollout cannot follow some inputs, each with a remedy, and advice for a run out of memory."""

from typing import Any

import torch
from torch import Tensor

from ...lightforcing_core.memory.estimate import gib
from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.refusal import check_finite
from ...lightforcing_core.rollout.recipe import Recipe, check_guidance
from ..comfy import guidance_of, is_plain_guider, name_of
from ..model.patch import LATENT_CHANNELS
from ..timeline import unsuitable_prompt


def unsuitable_guider(guider: Any) -> str | None:
    """Why the guider's prompts or strength cannot drive a rollout, or None."""
    if not is_plain_guider(guider):
        return f"the KV cache cannot follow the guider {type(guider).__name__}; use BasicGuider or CFGGuider"
    if guider.cfg == 1.0 and guider.model_options.get("disable_cfg1_optimization"):
        names = ", ".join(map(name_of, guidance_of(guider.model_options))) or "an unknown node"
        return f"a patch needs the negative prompt at cfg 1 (disable_cfg1_optimization, by {names}); remove that node"
    if guider.cfg != 1.0:
        check_guidance(guider.cfg, guider.conds.get("negative") or None)
        reason = unsuitable_prompt("negative prompt", guider.conds["negative"], may_be_empty=True)
        if reason:
            return reason
    return unsuitable_prompt("positive prompt", guider.conds.get("positive") or [])


def unsuitable_latents(latents: Tensor) -> str | None:
    """Why a rollout cannot fill the latents, or None; Refusal if not finite."""
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        return f"the latent is {list(latents.shape)}, not [batch, 16, frames, height, width]; use Empty AR Video Latent"
    check_finite("the latent", latents, "create it again")
    if torch.count_nonzero(latents):
        return "the latent is not empty; connect an empty one here, and the encoded frames to start_latent"
    return None


def unsuitable_sigmas(sigmas: Tensor) -> str | None:
    """Why noise levels do not start at pure noise, or None."""
    if len(sigmas) and float(sigmas[0]) < 0.999:
        return f"sigmas start at {float(sigmas[0]):.4f}, not at 1; use BasicScheduler with simple, 4 steps, denoise 1"
    return None


def memory_advice(recipe: Recipe, plan: MemoryPlan, *, decoding: bool) -> str:
    """The settings to lower, and by how much, after a run ran out of memory."""
    ways = _ways_to_need_less(recipe, plan)
    advice = f"lower {', or '.join(ways)}" if ways else "every setting is at its lowest; close other programs"
    more = "; LightVAE (lightvaew2_1) decodes in about a quarter of the full VAE's memory" if decoding else ""
    return advice + more


def _ways_to_need_less(recipe: Recipe, plan: MemoryPlan) -> list[str]:
    """Settings that can be lowered, as `setting from old to new (GiB less)`."""
    batch, _, frames, h, w = recipe.latent_shape
    cache = plan.estimate.cache
    ways = []
    if batch > 1:
        ways.append(f"the batch from {batch} to {batch // 2}")
    smaller = [_smaller_side(8 * side) for side in (w, h)]
    if smaller != [8 * w, 8 * h]:
        share = plan.estimate.total - plan.estimate.weights - plan.estimate.vae
        saved = share - share * smaller[0] * smaller[1] // (64 * w * h)
        ways.append(f"the size from {8 * w}×{8 * h} to {smaller[0]}×{smaller[1]} ({gib(saved)} GiB less)")
    if plan.kv.dtype == "same" and not plan.kv.host:
        ways.append(f"kv_cache to int8 ({gib(cache * 15 // 32)} GiB less)")
    elif not plan.kv.host:
        ways.append(f"kv_cache to int8_host ({gib(cache * 9 // 10)} GiB less, slower)")
    visible = min(recipe.window or frames, frames)
    window = max(visible * 3 // 4, recipe.sink_frames + recipe.frames_per_chunk)
    if window < visible:
        saved = cache * (visible - window) // visible
        ways.append(f"the schedule's window from {visible} to {window} latent frames ({gib(saved)} GiB less KV cache)")
    if len(recipe.guides) > 1:
        ways.append(f"cfg to 1 ({gib(cache // 2)} GiB less KV cache)")
    return ways


def _smaller_side(pixels: int) -> int:
    """A side for three quarters of the area, in steps of 16; smaller, down to 16."""
    return max(16, min(round(pixels * 0.866 / 16) * 16, pixels - 16))
