"""Degrade a run, step by step, until it fits in memory.

CUDA graphs and overlapped decode only save time, decode tiles cost a little of it, an 8-bit KV cache a little
precision, one in CPU memory a copy per forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attention.options import AttentionOptions
from ..checkpoint.load import WanSize
from ..families import Family
from ..model.kv_storage import KVOptions
from ..refusal import check_size
from ..rollout.recipe import Recipe, few_step_sigmas
from ..rollout.schedule import Schedule, latent_frames_of
from ..vae.wan_vae import LATENT_CHANNELS
from .estimate import MemoryEstimate, decode_bytes, estimate, gib

# The share that an allocator loses between tensors and a GPU needs for itself.
HEADROOM = 0.08
LIGHT_VAE, WAN_VAE = 24, 96  # widths
TEXT_TOKENS = 512  # the umt5 encoder's slots
# Ways to keep a KV cache, the best first.
LADDER = (KVOptions(), KVOptions("int8"), KVOptions("int8", host=True))


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is kept in memory, and the bytes that it then needs; other fields as in `plan_memory`.

    estimate, before: with these choices, and without them.
    decode_tiles: tiles per side in decode; 0 also decodes several frames at once.
    """

    estimate: MemoryEstimate
    before: MemoryEstimate
    free: int
    kv: KVOptions
    decode_tiles: int = 0
    latents: int = 0
    latents_on_device: bool = True
    overlap: bool = False
    cuda_graph: bool = False

    @property
    def needed(self) -> int:
        return self.estimate.total + (self.latents if self.latents_on_device else 0)

    @property
    def fits(self) -> bool:
        return self.needed * (1 + HEADROOM) <= self.free

    @property
    def given_up(self) -> list[str]:
        """The choices that differ from the plain run, in words."""
        choices = {
            "no CUDA graphs": self.before.graph and not self.cuda_graph,
            "decode between the chunks": self.before.overlapped and not self.overlap,
            "decode frame by frame": self.decode_tiles == 1,
            f"decode in {self.decode_tiles}×{self.decode_tiles} tiles": self.decode_tiles > 1,
            str(self.kv): self.kv != KVOptions(),
            "latents in CPU memory": not self.latents_on_device,
        }
        return [words for words, differs in choices.items() if differs]

    def __str__(self) -> str:
        line = f"{self.estimate}, {gib(self.free)} GiB free"
        if self.given_up:
            line += f": {', '.join(self.given_up)} (without: {gib(self.before.total + self.latents)} GiB)"
        if not self.fits:
            short = gib(int(self.needed * (1 + HEADROOM)) - self.free)
            line += f"; {short} GiB too little, so ComfyUI will offload weights: lower the size or the window"
        return line


def plan_memory(
    estimate_of: Callable[[KVOptions, int], MemoryEstimate],
    free: int,
    *,
    ladder: Sequence[KVOptions] = LADDER,
    most_tiles: int = 1,
    latents: int = 0,
    overlap: bool = False,
    cuda_graph: bool = False,
) -> MemoryPlan:
    """The cheapest way to fit a run into `free` bytes, or all ways if none fits.

    estimate_of: the estimate for a KV cache and a number of decode tiles per side.
    ladder: the ways in which the cache may be kept, the best first.
    most_tiles: the most tiles per side in decode; 1 for a decoder that cannot be cut.
    latents: bytes of the whole video's latents on the device; 0 if the device is the CPU.
    overlap, cuda_graph: whether the run would decode while it samples, and record steps, if that fits.
    """

    def fill(plan: MemoryPlan) -> MemoryPlan:
        recorded = plan.cuda_graph and not plan.kv.host
        needed = estimate_of(plan.kv, plan.decode_tiles).sped_up(overlap=plan.overlap, cuda_graph=recorded)
        return replace(plan, estimate=needed)

    plain = estimate_of(ladder[0], 0).sped_up(overlap=overlap, cuda_graph=cuda_graph and not ladder[0].host)
    best = MemoryPlan(plain, plain, free, ladder[0], latents=latents, overlap=overlap, cuda_graph=cuda_graph)
    changes: list[dict[str, Any]] = [
        {"decode_tiles": 1},
        {"cuda_graph": False},
        {"overlap": False},
        *({"decode_tiles": tiles} for tiles in range(2, most_tiles + 1)),
        *({"kv": kv} for kv in ladder[1:]),
        {"latents_on_device": False},
    ]
    for change in changes:
        if best.fits:
            break
        plan = fill(replace(best, **change))
        if plan.needed < best.needed:
            best = plan
    return best


def describe_memory(model: WanSize, family: Family, *, height: int, width: int, length: int) -> list[tuple[str, str]]:
    """(label, value) rows: a video's memory on a GPU for each kind of KV cache."""
    check_size(height, width)
    schedule = Schedule.of_family(family, latent_frames_of(length))
    recipe = Recipe(
        latent_shape=(1, LATENT_CHANNELS, schedule.latent_frames, height // 8, width // 8),
        sigmas=few_step_sigmas(family.denoising_steps, family.shift),
        context=torch.empty(1, TEXT_TOKENS, model.text_dim, device="meta"),
        attention=AttentionOptions(policy=family.sparse.policy),
        **schedule.arguments(),
    )
    plain, small, far = (estimate(model, recipe, weights=2 * model.parameters, kv=kv) for kv in LADDER)
    chunk = (*recipe.latent_shape[:2], max(recipe.chunk_lengths()), *recipe.latent_shape[3:])
    light, full = (decode_bytes(chunk, dim, torch.bfloat16) for dim in (LIGHT_VAE, WAN_VAE))
    return [
        ("memory", f"{length} frames at {height}x{width} in bfloat16, LightVAE decoding: {replace(plain, **light)}"),
        ("8-bit KV cache", str(replace(small, **light))),
        ("... in CPU memory", str(replace(far, **light))),
        ("full Wan VAE", str(replace(plain, **full))),
    ]
