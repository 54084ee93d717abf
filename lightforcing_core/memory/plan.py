"""What to give up when a run does not fit: speed-ups, then decode tiles, an 8-bit KV cache, one in host memory.

The choices are taken in the order of what they cost: CUDA graphs and a decode beside the sampling only save time,
tiles cost a little of it, eight bits a little precision, host memory a copy of the cache per forward. One that does
not help is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..families import Family
from ..model.kv_storage import KVOptions
from ..refusal import check_size
from ..rollout.recipe import Recipe, few_step_sigmas
from ..rollout.schedule import Schedule, latent_frames_of
from ..vae.wan_vae import LATENT_CHANNELS
from .estimate import MemoryEstimate, ModelSize, estimate, gib

# What an allocator loses between tensors, and what a card needs for itself.
HEADROOM = 0.08
LIGHT_VAE, WAN_VAE = 24, 96  # widths
TEXT_TOKENS = 512  # the umt5 encoder's slots
# How a KV cache is kept, the best first.
LADDER = (KVOptions(), KVOptions("int8"), KVOptions("int8", host=True))

Reckon = Callable[[KVOptions, int], MemoryEstimate]


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is kept in memory, what it then needs, and what there is.

    estimate: with these choices; before: without them. free: bytes that the run may take. latents: bytes of the
    video's latents beside the chunk's own, and whether they are kept on the device. overlap, cuda_graph: whether
    chunks are decoded beside the sampling, and steps recorded; both only where they were asked for.
    """

    estimate: MemoryEstimate
    before: MemoryEstimate
    free: int
    kv: KVOptions
    decode_tiles: int = 1
    latents: int = 0
    latents_on_device: bool = True
    overlap: bool = False
    cuda_graph: bool = False

    @property
    def needed(self) -> int:
        """The peak in bytes, latents included."""
        return self.estimate.total + (self.latents if self.latents_on_device else 0)

    @property
    def fits(self) -> bool:
        """Whether the peak, with room for an allocator's waste, is no more than what is free."""
        return self.needed * (1 + HEADROOM) <= self.free

    @property
    def given_up(self) -> list[str]:
        """The choices that differ from the plain run, in words."""
        words = []
        if self.before.graph and not self.cuda_graph:
            words.append("no CUDA graphs")
        if self.before.overlapped and not self.overlap:
            words.append("decode between the chunks")
        if self.decode_tiles > 1:
            words.append(f"decode in {self.decode_tiles}×{self.decode_tiles} tiles")
        if self.kv != KVOptions():
            words.append(str(self.kv))
        if not self.latents_on_device:
            words.append("latents in host memory")
        return words

    def __str__(self) -> str:
        """One line: what is needed, what there is, and what is done about it."""
        line = f"{self.estimate}, {gib(self.free)} GiB free"
        if self.given_up:
            line += f": {', '.join(self.given_up)} (without: {gib(self.before.total + self.latents)} GiB)"
        if not self.fits:
            short = gib(int(self.needed * (1 + HEADROOM)) - self.free)
            line += f"; {short} GiB too little, so weights will be moved in and out: lower the size or the window"
        return line


def plan_memory(
    reckon: Reckon,
    free: int,
    *,
    ladder: Sequence[KVOptions] = LADDER,
    most_tiles: int = 1,
    latents: int = 0,
    overlap: bool = False,
    cuda_graph: bool = False,
) -> MemoryPlan:
    """The cheapest way to make a run fit into `free` bytes, or all of them together when it cannot.

    reckon: the estimate for a KV cache and a number of decode tiles per side. ladder: the ways in which the cache may
    be kept, the best first. most_tiles: how far decode may be cut, 1 for a decoder that cannot. latents: bytes that
    the video's latents take on the device, 0 where the device is the host. overlap, cuda_graph: what the run would
    like to do where there is room.
    """

    def fill(plan: MemoryPlan) -> MemoryPlan:
        needed = reckon(plan.kv, plan.decode_tiles)
        recorded = plan.cuda_graph and not plan.kv.host
        return replace(plan, estimate=needed.sped_up(overlap=plan.overlap, cuda_graph=recorded))

    plain = reckon(ladder[0], 1)
    best = fill(MemoryPlan(plain, plain, free, ladder[0], latents=latents, overlap=overlap, cuda_graph=cuda_graph))
    best = replace(best, before=best.estimate)
    changes: list[dict[str, Any]] = [{"cuda_graph": False}] if cuda_graph else []
    changes += [{"overlap": False}] if overlap else []
    changes += [{"decode_tiles": tiles} for tiles in range(2, most_tiles + 1)]
    changes += [{"kv": kv} for kv in ladder[1:]]
    if latents:
        changes.append({"latents_on_device": False})
    for change in changes:
        if best.fits:
            break
        plan = fill(replace(best, **change))
        if plan.needed < best.needed:
            best = plan
    return best


def describe_memory(model: ModelSize, family: Family, *, height: int, width: int, length: int) -> list[tuple[str, str]]:
    """(label, value) rows of what `length` video frames need on a GPU, for each way to keep the KV cache."""
    check_size(height, width)
    schedule = Schedule.of_family(family, latent_frames_of(length))
    recipe = Recipe(
        latent_shape=(1, LATENT_CHANNELS, schedule.latent_frames, height // 8, width // 8),
        sigmas=few_step_sigmas(family.denoising_steps, family.shift),
        context=torch.empty(1, TEXT_TOKENS, model.text_dim, device="meta"),
        **schedule.arguments(),
    )
    rows = []
    for label, vae_dim, kv in (
        ("memory", LIGHT_VAE, KVOptions()),
        ("8-bit KV cache", LIGHT_VAE, KVOptions("int8")),
        ("... in host memory", LIGHT_VAE, KVOptions("int8", host=True)),
        ("full Wan VAE", WAN_VAE, KVOptions()),
    ):
        rows.append((label, str(estimate(model, recipe, kv=kv, vae_dim=vae_dim))))
    first, *others = rows
    what = f"{length} frames at {height}x{width} in bfloat16, LightVAE decoding"
    return [(first[0], f"{what}: {first[1]}"), *others]
