"""The autoregressive rollout: chunk after chunk, a few denoising steps each, then a clean pass that commits it.

`for chunk in rollout(...)` is the whole interface: finished chunks come out as they are made, closing the generator
cancels, and an error leaves every chunk already yielded in the caller's hands.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionOptions
from .causal_wan import CausalState, DenseAttention, forward, sdpa
from .families import SinkRope
from .growth import chunk_lengths
from .kv_cache import KVCache

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
Denoise = Callable[[Tensor, float, CausalState], Tensor]


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its index in the video, its first latent frame and latents [B, C, frames, h, w]."""

    index: int
    start_frame: int
    latents: Tensor


@dataclass(frozen=True)
class StepEvent:
    """One finished denoising step: `step` of `steps` (from 0) in the `chunk`-th of `chunks` generated chunks.

    `index` is the chunk's index in the video, initial latents included. x, x0: [B, C, frames, h, w], the step's
    input and its prediction. density: the share of visible key blocks that the chunk attends to.
    """

    chunk: int
    chunks: int
    index: int
    start_frame: int
    step: int
    steps: int
    x: Tensor
    x0: Tensor
    density: float


def few_step_sigmas(denoising_steps: Sequence[int] = (1000, 750, 500, 250), shift: float = 5.0) -> list[float]:
    """Noise levels of a few-step list on the 1000-step scale, warped by the flow shift and closed with 0.

    `σ = shift · s / (1 + (shift − 1) · s)`, s = step / 1000; the Self Forcing list gives 1, 0.9375, 0.8333, 0.625, 0.
    """
    fractions = [step / 1000.0 for step in denoising_steps]
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in fractions] + [0.0]


def seeded_noise(seed: int) -> Noise:
    """Standard normal noise that depends only on (seed, chunk index, draw), drawn on the CPU in float32."""

    def draw(chunk_index: int, draw_index: int, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.blake2b(f"{seed}/{chunk_index}/{draw_index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator)

    return draw


def rollout(
    dit: Any,
    context: Tensor,
    *,
    latent_shape: Sequence[int],
    frames_per_chunk: int,
    sigmas: Sequence[float],
    growth: Sequence[float] | None = None,
    window: int | None = None,
    sink_frames: int = 0,
    sink_rope: SinkRope = "fixed",
    seed: int = 0,
    noise: Noise | None = None,
    initial_latents: Tensor | None = None,
    context_noise: float = 0.0,
    attention: AttentionOptions | None = None,
    denoise: Denoise | None = None,
    dense_attention: DenseAttention = sdpa,
    on_step: Callable[[StepEvent], None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Chunk]:
    """Generate a video chunk by chunk; a generator of finished `Chunk`s in the model's normalised latent space.

    dit: a Wan 2.1 T2V module tree (`wan.wan_from_state_dict` or the host's). context: [B or 1, tokens, text_dim].
    latent_shape: (B, C, frames, h, w), initial latents included. sigmas: falling noise levels in (0, 1], closed
    by 0. growth: one sparsity per chunk of the video (the last one is kept beyond the list), None for dense.
    window: visible latent frames, `sink_frames` and the current chunk included; None sees everything.
    sink_rope: where sinks stand once the window has moved on, see `KVCache`.

    noise: called as noise(chunk_index, draw, shape); draw 0 is the chunk's first noise, draw s ≥ 1 the fresh noise
    after denoising step s. Without it `seeded_noise(seed)`.
    initial_latents: [B or 1, C, frames, h, w], fed clean through the model before anything is generated
    (image-to-video, continuation); they are not yielded. Where `frames_per_chunk` does not divide them the first
    chunk takes the rest, so one image and chunks of three give 1, 3, 3, … Chunk indices, and with them growth and
    noise, count from the start of the video: a continued run equals the uninterrupted one.
    context_noise: the timestep, 0…1000, at which finished chunks are committed.
    denoise: denoise(x, sigma, state) → x0, the way a host runs the model itself; x is float32 [B, C, f, h, w].
    dense_attention: dense attention over [B, L, H, D]. on_step: called after every denoising step.
    dtype, device: of the KV cache and the computation; default the model's dtype and the context's device.

    The KV cache is allocated when iteration starts and freed when it ends, however it ends. Raises ValueError for
    requests that cannot work, before any of them runs. Source: Self Forcing's few-step rollout.
    """
    options = attention or AttentionOptions()
    batch, channels, frames, height, width = latent_shape
    steps = [float(sigma) for sigma in sigmas]
    _check_levels(steps, growth, context_noise)
    _check_tensors(latent_shape, context, initial_latents)
    initial_frames = 0 if initial_latents is None else initial_latents.shape[2]
    lengths = video_chunks(frames, frames_per_chunk, initial_frames)
    if window is not None and window < sink_frames + max(lengths):
        raise ValueError(
            f"window {window} cannot hold {sink_frames} sink frames and a chunk of {max(lengths)}; "
            f"use at least {sink_frames + max(lengths)} latent frames"
        )
    slots = frames if window is None else min(window, frames)
    device = torch.device(device) if device is not None else context.device
    dtype = dtype or dit.dtype

    def default_denoise(x: Tensor, sigma: float, state: CausalState) -> Tensor:
        timestep = torch.full((batch,), sigma * 1000.0, device=device)
        flow = forward(dit, x.to(dtype), timestep, text, state)
        return x - sigma * flow.float()

    run = denoise or default_denoise
    draw = noise or seeded_noise(seed)
    text = context.to(device=device, dtype=dtype).expand(batch, -1, -1)

    def sparsity(index: int) -> float:
        return growth[min(index, len(growth) - 1)] if growth is not None else 0.0

    @torch.no_grad()
    def clean_pass(state: CausalState, latents: Tensor) -> None:
        state.clean = True
        run(latents.to(device, torch.float32).expand(batch, -1, -1, -1, -1), context_noise / 1000.0, state)
        state.clean = False
        state.cache.commit()

    @torch.no_grad()
    def denoise_chunk(state: CausalState, index: int, start: int, length: int) -> Tensor:
        shape = (batch, channels, length, height, width)
        x = draw(index, 0, shape).to(device=device, dtype=torch.float32)
        if steps[0] < 1.0:
            x = steps[0] * x
        for step, (sigma, following) in enumerate(itertools.pairwise(steps)):
            x0 = run(x, sigma, state)
            if on_step is not None:
                generated = (index - first_index, len(lengths) - first_index)
                on_step(StepEvent(*generated, index, start, step, len(steps) - 1, x, x0, state.density))
            if following > 0.0:
                fresh = draw(index, step + 1, shape).to(device=device, dtype=torch.float32)
                x = (1.0 - following) * x0 + following * fresh
        return x0

    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    first_index = starts.index(initial_frames)

    def generate() -> Iterator[Chunk]:
        block = dit.blocks[0].self_attn
        heads = block.num_heads
        state = CausalState(
            KVCache(
                layers=len(dit.blocks),
                batch=batch,
                slots=slots,
                tokens_per_frame=(height // 2) * (width // 2),
                heads=heads,
                head_dim=dit.dim // heads,
                block_k=options.block[1],
                sink_frames=sink_frames if slots < frames else 0,
                sink_rope=sink_rope,
                pooled=any(sparsity(i) > 0.0 for i in range(len(lengths))),
                dtype=dtype,
                device=device,
            ),
            options,
            dense_attention,
        )
        try:
            for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                state.open_chunk(length, sparsity(index), device)
                if index < first_index:
                    assert initial_latents is not None
                    clean_pass(state, initial_latents[:, :, start : start + length])
                    continue
                latents = denoise_chunk(state, index, start, length)
                yield Chunk(index, start, latents)
                if index < len(lengths) - 1:
                    clean_pass(state, latents)
        finally:
            # A traceback or a host's hook may still hold the state; the memory must go all the same.
            state.close()

    return generate()


def video_chunks(frames: int, frames_per_chunk: int, initial_frames: int = 0) -> list[int]:
    """Latent frames of every chunk of a video that starts with `initial_frames` given ones.

    The given frames make whole chunks; where they do not, the first chunk takes the rest: one image → 1, n, n, …
    """
    whole = chunk_lengths(frames, frames_per_chunk)  # also checks both numbers
    first = initial_frames % frames_per_chunk
    return chunk_lengths(frames, frames_per_chunk, first) if first else whole


def _check_levels(steps: list[float], growth: Sequence[float] | None, context_noise: float) -> None:
    """ValueError unless noise levels, sparsities and the clean pass's timestep are in their ranges."""
    if len(steps) < 2 or steps[-1] != 0.0 or any(a <= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"sigmas {steps} must fall from step to step and end with 0, like {few_step_sigmas()}")
    if not 0.0 < steps[0] <= 1.0:
        raise ValueError(f"sigmas start at {steps[0]}, which is outside (0, 1]")
    if not 0.0 <= context_noise <= 1000.0:
        raise ValueError(f"context_noise {context_noise} is not a timestep between 0 and 1000")
    if growth is not None and (not growth or not all(0.0 <= sparsity < 1.0 for sparsity in growth)):
        raise ValueError(f"growth {growth} must hold at least one sparsity, all in [0, 1)")


def _check_tensors(latent_shape: Sequence[int], context: Tensor, initial_latents: Tensor | None) -> None:
    """ValueError unless the prompt and the initial latents fit the video's shape."""
    batch, channels, frames, height, width = latent_shape
    if min(latent_shape) < 1:
        raise ValueError(f"latent_shape {tuple(latent_shape)} has an empty side; every side must be at least 1")
    if height % 2 or width % 2:
        raise ValueError(
            f"latents of {height}×{width} cannot be cut into 2×2 patches: the video's height {8 * height} and width "
            f"{8 * width} must be multiples of 16"
        )
    if context.ndim != 3 or not context.shape[1]:
        raise ValueError(f"context has shape {tuple(context.shape)}; expected [batch, tokens, text_dim] with tokens")
    if context.shape[0] not in (1, batch):
        raise ValueError(f"context is a batch of {context.shape[0]}, latents a batch of {batch}; pass 1 or {batch}")
    if initial_latents is None:
        return
    shape = tuple(initial_latents.shape)
    if len(shape) != 5 or (shape[1], *shape[3:]) != (channels, height, width) or shape[0] not in (1, batch):
        expected = f"[{batch if batch == 1 else f'1 or {batch}'}, {channels}, frames, {height}, {width}]"
        raise ValueError(f"initial_latents have shape {shape}; expected {expected}")
    if shape[2] >= frames:
        raise ValueError(f"initial_latents already fill {shape[2]} of {frames} latent frames; ask for a longer video")
    if not torch.isfinite(initial_latents).all():
        raise ValueError("initial_latents hold NaN or infinity; encode the start frames again")
