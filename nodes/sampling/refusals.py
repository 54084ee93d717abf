"""Reasons to decline: what a rollout cannot follow, as a sentence that names the way out, or None.

Also what to say when memory runs out, with numbers.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...lightforcing_core.memory.estimate import gib
from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.rollout.schedule import Schedule, video_frames_of
from ...lightforcing_core.rollout.state import RunState
from ..model.patch import LATENT_CHANNELS
from ..timeline import unsuitable_prompt


def unsuitable_guider(guider: Any) -> str | None:
    """Why the guider's prompts or strength cannot drive a rollout, or None."""
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        return (
            f"the guider {type(guider).__name__} runs the model in a way of its own, which the KV cache cannot follow; "
            f"use BasicGuider or CFGGuider"
        )
    if guider.model_options.get("disable_cfg1_optimization") and guider.conds.get("negative"):
        return "a patch forces the negative prompt at cfg 1 (disable_cfg1_optimization); remove the node that adds it"
    if guider.cfg != 1.0:
        if not guider.conds.get("negative"):
            return f"cfg {guider.cfg:g} needs a negative prompt; connect one, or set cfg to 1"
        reason = unsuitable_prompt("negative prompt", guider.conds["negative"], may_be_empty=True)
        if reason:
            return reason
    return unsuitable_prompt("positive prompt", guider.conds.get("positive") or [])


def unsuitable_latents(latents: Tensor, initial: Tensor | None) -> str | None:
    """Why the latents cannot be filled by a rollout, or None."""
    for name, tensor in (("latent", latents), ("start_latent", initial)):
        if tensor is None:
            continue
        if tensor.ndim != 5 or tensor.shape[1] != LATENT_CHANNELS:
            return (
                f"the {name} has shape {list(tensor.shape)}, not [batch, {LATENT_CHANNELS}, frames, height, width]; "
                f"use Empty AR Video Latent, or a Wan 2.1 VAE to encode"
            )
        if not torch.isfinite(tensor).all():
            return f"the {name} holds NaN or infinity; encode or create it again"
    height, width = 8 * latents.shape[3], 8 * latents.shape[4]
    for side, size in (("height", height), ("width", width)):
        if size % 16:
            return f"{side} {size} is not a multiple of 16; use {size // 16 * 16 or 16} or {size // 16 * 16 + 16}"
    if torch.count_nonzero(latents):
        return (
            "the latent is not empty, but a rollout starts from noise; connect an empty video latent here and "
            "the encoded frames to start_latent"
        )
    if initial is None:
        return None
    if initial.shape[3:] != latents.shape[3:]:
        return (
            f"start_latent is {8 * initial.shape[4]}×{8 * initial.shape[3]} and the video {width}×{height}; "
            f"resize the start image to the video's size before encoding it"
        )
    if initial.shape[2] >= latents.shape[2]:
        return (
            f"start_latent already fills {initial.shape[2]} of the video's {latents.shape[2]} latent frames; "
            f"make the video longer"
        )
    if initial.shape[0] not in (1, latents.shape[0]):
        return f"start_latent is a batch of {initial.shape[0]}, the video one of {latents.shape[0]}; use 1 or the same"
    return None


def unsuitable_end(end: Tensor, latent_shape: Sequence[int], schedule: Schedule, initial_frames: int) -> str | None:
    """Why a video of `latent_shape`, [B, 16, frames, h, w], cannot end with the latents `end`, or None.

    initial_frames: latent frames that it starts with.
    """
    batch, _, frames, height, width = latent_shape
    if end.ndim != 5 or end.shape[1] != LATENT_CHANNELS:
        return (
            f"the end_latent has shape {list(end.shape)}, not [batch, {LATENT_CHANNELS}, frames, height, width]; "
            f"use Light Forcing Encode with place end and a Wan 2.1 VAE"
        )
    if not torch.isfinite(end).all():
        return "the end_latent holds NaN or infinity; encode it again"
    if end.shape[3:] != (height, width):
        return (
            f"end_latent is {8 * end.shape[4]}×{8 * end.shape[3]} and the video {8 * width}×{8 * height}; "
            f"resize the last image to the video's size before encoding it"
        )
    if end.shape[0] not in (1, batch):
        return f"end_latent is a batch of {end.shape[0]}, the video one of {batch}; use 1 or the same"
    usual, last = schedule.frames_per_chunk, schedule.chunk_lengths(initial_frames)[-1]
    if usual == 1:
        return (
            "end_latent cannot be met by a frame-wise model: the frame before it is finished before it is seen; use a "
            "chunk-wise checkpoint"
        )
    if end.shape[2] >= usual:
        return (
            f"end_latent holds {end.shape[2]} latent frames, and a chunk of {usual} can end with at most {usual - 1}; "
            f"encode one image, or the last {4 * (usual - 1)} frames of a video"
        )
    if end.shape[2] >= last:
        whole = video_frames_of(frames + usual - last)
        return (
            f"the video's {video_frames_of(frames)} frames leave its last chunk {last} latent frames, of which nothing "
            f"is left to lead to an end_latent of {end.shape[2]}; make the video {whole} frames long"
        )
    return None


def unsuitable_sigmas(sigmas: Tensor) -> str | None:
    """Why a list of noise levels cannot drive a rollout, or None."""
    values = [round(float(sigma), 4) for sigma in sigmas]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if len(values) < 2 or values[0] < 0.999 or values[-1] != 0.0 or not falling:
        return (
            f"sigmas {values} do not fall from 1 to 0; use BasicScheduler with simple, 4 steps and denoise 1 "
            f"on the patched MODEL"
        )
    return None


def memory_advice(state: RunState, plan: MemoryPlan, *, decoding: bool) -> str:
    """What to lower, and by how much, after a run of `state` ran out of memory although it was planned for."""
    ways = _ways_to_need_less(state, plan)
    said = f"lower {', or '.join(ways)}" if ways else "nothing is left to lower; end what else uses this memory"
    more = "; LightVAE (lightvaew2_1) decodes in about a quarter of the full VAE's memory" if decoding else ""
    return said + more


def _ways_to_need_less(state: RunState, plan: MemoryPlan) -> list[str]:
    """What of the run can still be lowered, each as `thing from old to new (GiB less)`."""
    batch, _, frames, h, w = state.latent_shape
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
    visible = min(state.window or frames, frames)
    window = max(visible * 3 // 4, state.sink_frames + state.frames_per_chunk)
    if window < visible:
        saved = cache * (visible - window) // visible
        ways.append(f"the schedule's window from {visible} to {window} latent frames ({gib(saved)} GiB less KV cache)")
    if state.cfg != 1.0:
        ways.append(f"cfg to 1 ({gib(cache // 2)} GiB less KV cache)")
    return ways


def _smaller_side(pixels: int) -> int:
    """A side of a picture with three quarters of the area, in steps of 16 pixels; less in any case, but for 16."""
    return max(16, min(round(pixels * 0.866 / 16) * 16, pixels - 16))
