"""The memory plan of a run on the GPU that ComfyUI manages, and advice for a run that is out of memory."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...lightforcing_core.attention.backends.base import DenseAttention
from ...lightforcing_core.attention.dispatch import choose_backend
from ...lightforcing_core.memory.estimate import MemoryEstimate, estimate, gib, size_of
from ...lightforcing_core.memory.plan import LADDER, MemoryPlan, plan_memory
from ...lightforcing_core.model.kv_storage import KVOptions
from ...lightforcing_core.model.wan import HEAD_DIM
from ...lightforcing_core.rollout.look import Looks
from ...lightforcing_core.rollout.recipe import Recipe
from ...lightforcing_core.rollout.state import RunState
from ..comfy import ModelPatcher, memory_for_a_run, weight_bytes_on_device
from ..vae.decode import FrameDecoder

# Whole videos of latents that sampling can keep in CPU memory: the result, the noisy one, and a preview's copy.
LATENT_COPIES = 3


def plan_of(
    model: ModelPatcher, run: RunState, kv: KVOptions | None, decoder: FrameDecoder | None, *, saved: bool
) -> MemoryPlan:
    """Plan the memory of `run` on the model's device.

    kv: how to keep the KV cache; None chooses.
    decoder: what decodes the run's frames, if anything.
    saved: the run continues a saved one, with the precision that it began with.
    """
    base, device = model.model, model.load_device
    dtype = base.get_dtype_inference()
    recipe = run.recipe
    batch, _, _, height, width = recipe.latent_shape
    size, weights = size_of(model.get_model_object("diffusion_model")), weight_bytes_on_device(model)
    tokens = height * width // 4
    visible, _ = recipe.ring
    q, k = (
        torch.empty(1, dtype=dtype, device=device).expand(batch, length * tokens, size.dim // HEAD_DIM, HEAD_DIM)
        for length in (recipe.pass_frames, visible)
    )
    backend, block, tail = recipe.attention.backend, recipe.attention.block, recipe.attention.tail
    backend = choose_backend(q, k, tokens_per_frame=tokens, block=block, backend=backend, tail=tail).name

    def needed_with(kv: KVOptions, tiles: int) -> MemoryEstimate:
        with torch.inference_mode(False):  # inference mode hides the operations that others consist of
            needed = estimate(size, recipe, weights=weights, kv=kv, backend=backend, dtype=dtype)
        return needed if decoder is None else replace(needed, **decoder.bytes_of(tiles))

    ladder: Sequence[KVOptions] = LADDER
    if saved:
        ladder = [run.kv, replace(run.kv, host=True)]
    elif kv is not None:
        ladder = [kv]
    on_device, is_cuda = device.type != "cpu", device.type == "cuda"
    if not on_device:
        ladder = [one for one in ladder if not one.host] or ladder
    return plan_memory(
        needed_with,
        memory_for_a_run(device),
        ladder=ladder,
        most_tiles=1 if decoder is None else decoder.most_tiles,
        latents=LATENT_COPIES * 4 * math.prod(recipe.latent_shape) if on_device else 0,
        overlap=is_cuda and decoder is not None and decoder.can_overlap,
        cuda_graph=is_cuda and not recipe.attention.joint,
    )


def looks_of(model: ModelPatcher, run: RunState, dense_attention: DenseAttention) -> Looks:
    """The chunks of `run` as `machine` sees them, before the model is loaded."""
    recipe, dit = run.recipe, model.get_model_object("diffusion_model")
    shape = recipe.cache_shape(
        layers=1, heads=dit.dim // HEAD_DIM, head_dim=HEAD_DIM, dtype=model.model.get_dtype_inference()
    )
    return Looks(recipe, shape, run.kv, model.load_device, dense_attention)


def memory_advice(recipe: Recipe, plan: MemoryPlan, *, decoding: bool) -> str:
    """The settings to lower, and by how much, after a run ran out of memory."""
    ways = _ways_to_need_less(recipe, plan)
    advice = f"lower {', or '.join(ways)}" if ways else "every setting is at its lowest; close other programs"
    more = "; LightVAE (lightvaew2_1) decodes in about a quarter of the full VAE's memory" if decoding else ""
    return advice + more


def _ways_to_need_less(recipe: Recipe, plan: MemoryPlan) -> list[str]:
    """Settings that can be lowered, as `setting from old to new (GiB less)`."""
    batch, _, _, h, w = recipe.latent_shape
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
    visible, _ = recipe.ring
    if window := next((few for few in range(visible * 3 // 4, visible) if _is_allowed(recipe, few)), 0):
        saved = cache * (visible - window) // visible
        ways.append(f"the schedule's window from {visible} to {window} latent frames ({gib(saved)} GiB less KV cache)")
    if len(recipe.guides) > 1:
        ways.append(f"cfg to 1 ({gib(cache // 2)} GiB less KV cache)")
    return ways


def _is_allowed(recipe: Recipe, window: int) -> bool:
    try:
        return bool(replace(recipe, window=window))
    except ValueError:
        return False


def _smaller_side(pixels: int) -> int:
    """A side for three quarters of the area, in steps of 16; smaller, down to 16."""
    return max(16, min(round(pixels * 0.866 / 16) * 16, pixels - 16))
