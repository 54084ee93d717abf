"""The inputs of a sampling node, their checks, and the recipe they make with a model, prompts and a size."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lightforcing_core.families import Family
from ...lightforcing_core.model.kv_storage import KVOptions
from ...lightforcing_core.refusal import Refusal, check_finite
from ...lightforcing_core.rollout.recipe import (
    Guidance,
    NoiseOptions,
    Recipe,
    check_given,
    check_guidance,
    few_step_sigmas,
)
from ...lightforcing_core.rollout.runtime import Replay
from ...lightforcing_core.rollout.schedule import Schedule
from ..comfy import ModelPatcher, flow_shift, guidance_of, is_plain_guider, name_of
from ..model.patch import LATENT_CHANNELS, Settings
from ..schedule import numbers_per_chunk
from ..timeline import PromptChange, prompts_of, unsuitable_prompt

# The choices of kv_cache; auto lets the memory plan choose.
KV_CACHES: dict[str, KVOptions | None] = {
    "auto": None,
    "full": KVOptions(),
    "int8": KVOptions("int8"),
    "fp8": KVOptions("fp8"),
    "host": KVOptions(host=True),
    "int8_host": KVOptions("int8", host=True),
}
# A recipe's fields as the canvas calls them.
SOCKETS = {
    "latent_shape": "the latent",
    "context": "the positive prompt",
    "negative": "the negative prompt",
    "initial_latents": "start_latent",
    "last_latents": "end_latent",
    "window": "the schedule's window",
    "sink_frames": "the schedule's sink_frames",
    "growth": "the schedule's sparsity",
}


def run_inputs() -> list[io.Input]:
    """The inputs at the end of both sampling nodes."""
    return [
        io.Combo.Input("replay", options=["all", "window"], default="all", optional=True, advanced=True),
        io.Boolean.Input("keep_finished", default=True, optional=True, advanced=True),
        io.Combo.Input("kv_cache", options=list(KV_CACHES), default="auto", optional=True, advanced=True),
        io.Float.Input("context_noise", default=0.0, min=0.0, max=1000.0, step=1.0, optional=True, advanced=True),
        io.Latent.Input("end_latent", optional=True),
        io.Combo.Input("speed", options=["auto", "safe"], default="auto", optional=True, advanced=True),
    ]


@contextmanager
def named_for_the_canvas() -> Iterator[None]:
    """Raise the core's refusals under the names of the sockets that they concern."""
    try:
        yield
    except Refusal as refusal:
        raise refusal.named(SOCKETS.get(refusal.field, refusal.field)) from None


@dataclass(frozen=True, eq=False)
class Request:
    """The inputs that both sampling nodes have, and `chunk_seeds`, by name.

    schedule: for any length, since the latent's counts; None takes the defaults of the model's family.
    start_latent, end_latent: LATENTs of [B or 1, 16, frames, h, w] in the VAE's space.
    timeline: prompts that take over later.
    speed: "auto" measures this machine and runs what was proved to be faster, "safe" does neither.
    """

    schedule: Schedule | None = None
    start_latent: Mapping[str, Any] | None = None
    end_latent: Mapping[str, Any] | None = None
    timeline: Sequence[PromptChange] = ()
    chunk_seeds: str = ""
    replay: Replay = "all"
    keep_finished: bool = True
    kv_cache: str = "auto"
    context_noise: float = 0.0
    speed: str = "auto"

    def start(self, model_options: Mapping[str, Any]) -> Tensor | None:
        """The latents that the video starts with: the input's or those of ARVideoI2V; ValueError if there are both."""
        of_model = model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
        if self.start_latent and of_model is not None:
            problem = "start_latent is connected, and ARVideoI2V has given this MODEL a start image too"
            raise ValueError(f"{problem}; disconnect start_latent, or take the MODEL from before ARVideoI2V")
        return self.start_latent["samples"] if self.start_latent else of_model

    @property
    def title(self) -> str:
        return self.schedule.title if self.schedule else "the family's schedule"

    def recipe(
        self, guider: Any, settings: Settings, sigmas: Sequence[float], shape: Sequence[int], seed: int
    ) -> Recipe:
        """The recipe for a guider's model and prompts; shape: of the latents."""
        family, shift = settings.family, flow_shift(guider.model_patcher)
        planned = self.schedule
        schedule = replace(planned, latent_frames=shape[2]) if planned else Schedule.of_family(family, shape[2])
        if family.id != "unknown" and family.frames_per_chunk != schedule.frames_per_chunk:
            raise ValueError(
                f"the schedule's chunks of {schedule.frames_per_chunk} latent frames do not match the checkpoint: "
                f"{family.title} was trained on chunks of {family.frames_per_chunk}; set frames_per_chunk to that, or "
                f"the model's family to unknown"
            )
        given: dict[str, Any] = {}
        start, end = self.start(guider.model_options), self.end_latent["samples"] if self.end_latent else None
        for name, latents in (("initial_latents", start), ("last_latents", end)):
            if latents is not None:
                check_given(name, latents, shape)
                given[name] = guider.model_patcher.model.process_latent_in(latents.to("cpu", torch.float32))
        initial_frames = 0 if start is None else start.shape[2]
        lengths = schedule.chunk_lengths(initial_frames)
        seeds = numbers_per_chunk(self.chunk_seeds, "chunk_seeds", int, lists=False)
        if beyond := [chunk for chunk in seeds if chunk >= len(lengths)]:
            raise ValueError(f"chunk_seeds names chunk {beyond[0]}; this video has chunks 0 to {len(lengths) - 1}")
        negative = guider.conds["negative"][0]["cross_attn"] if guider.cfg != 1.0 else None
        return Recipe(
            latent_shape=shape,
            sigmas=sigmas,
            context=prompts_of(guider.conds["positive"][0]["cross_attn"], self.timeline, lengths),
            seed=seed,
            attention=settings.attention,
            guidance=Guidance(guider.cfg, negative),
            noise_options=NoiseOptions(_first_levels(family, sigmas, shift), seeds, self.context_noise),
            **given,
            **schedule.arguments(initial_frames),
        )


def _first_levels(family: Family, levels: Sequence[float], shift: float) -> tuple[float, ...] | None:
    """The first chunk's noise levels if `levels` are the family's steps, or None."""
    if family.first_denoising_steps is None:
        return None
    usual = few_step_sigmas(family.denoising_steps, shift)
    if len(usual) != len(levels) or any(abs(a - b) > 1e-3 for a, b in zip(usual, levels, strict=True)):
        return None
    # In float32, as ComfyUI's own lists are.
    return tuple(torch.tensor(few_step_sigmas(family.first_denoising_steps, shift)).tolist())


def model_text(model: ModelPatcher) -> str:
    """A text that identifies a MODEL: sizes, and checksums of weights and LoRAs."""
    dit = model.get_model_object("diffusion_model")
    some = (dit.head.modulation, dit.blocks[0].modulation, dit.blocks[-1].modulation)
    weights = b"".join(part.detach().to("cpu", torch.float32).numpy().tobytes() for part in some)
    text = f"Wan 2.1, {dit.dim} wide, {len(dit.blocks)} layers, weights {zlib.crc32(weights):08x}"
    if model.patches:
        loras = sorted((str(key), [patch[0] for patch in patches]) for key, patches in model.patches.items())
        text += f", LoRA {zlib.crc32(repr(loras).encode()):08x}"
    return text


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


def unsuitable_start(latents: Tensor, sigmas: Tensor, denoise_mask: Tensor | None) -> str | None:
    """Why a rollout cannot begin with the latents and noise levels, or None; Refusal if not finite."""
    if denoise_mask is not None:
        return "the latent has a noise mask, which a rollout cannot follow; remove Set Latent Noise Mask"
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        return f"the latent is {list(latents.shape)}, not [batch, 16, frames, height, width]; use Empty AR Video Latent"
    check_finite("the latent", latents, "create it again")
    if torch.count_nonzero(latents):
        return "the latent is not empty; connect an empty one here, and the encoded frames to start_latent"
    if len(sigmas) and float(sigmas[0]) < 0.999:
        return f"sigmas start at {float(sigmas[0]):.4f}, not at 1; use BasicScheduler with simple, 4 steps, denoise 1"
    return None
