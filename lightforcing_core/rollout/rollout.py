"""The autoregressive rollout: chunk after chunk, a few denoising steps each, then a clean pass that commits it.

`for chunk in rollout(...)` is the whole interface: finished chunks come out as they are made, closing the generator
cancels, and an error leaves every chunk already yielded in the caller's hands.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from ..attention.dispatch import AttentionOptions
from ..families import SinkRope
from ..model.causal import DenseAttention, sdpa
from ..model.cuda_graph import CudaGraph, why_no_graph
from ..model.kv_storage import CacheShape, KVOptions
from .growth import chunk_lengths, first_chunk_length
from .loop import Chunk, ChunkLoop, Denoise, Noise, Replay, StepEvent
from .record import Recorder, RunRecorder
from .timeline import Prompt, Timeline


def few_step_sigmas(denoising_steps: Sequence[int] = (1000, 750, 500, 250), shift: float = 5.0) -> list[float]:
    """Noise levels of a few-step list on the 1000-step scale, warped by the flow shift and closed with 0.

    `σ = shift · s / (1 + (shift − 1) · s)`, s = step / 1000; the Self Forcing list gives 1, 0.9375, 0.8333, 0.625, 0.
    """
    fractions = [step / 1000.0 for step in denoising_steps]
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in fractions] + [0.0]


def seeded_noise(seed: int, chunk_seeds: Mapping[int, int] | None = None) -> Noise:
    """Standard normal noise that depends only on (seed, chunk index, draw), drawn on the CPU in float32.

    `chunk_seeds` gives single chunks a seed of their own.
    """
    own = dict(chunk_seeds or {})

    def draw(chunk_index: int, draw_index: int, shape: tuple[int, ...]) -> Tensor:
        key = f"{own.get(chunk_index, seed)}/{chunk_index}/{draw_index}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator)

    return draw


def rollout(
    dit: Any,
    context: Tensor | Sequence[Prompt],
    *,
    latent_shape: Sequence[int],
    frames_per_chunk: int,
    sigmas: Sequence[float],
    first_sigmas: Sequence[float] | None = None,
    growth: Sequence[float] | None = None,
    window: int | None = None,
    sink_frames: int = 0,
    sink_rope: SinkRope = "fixed",
    seed: int = 0,
    noise: Noise | None = None,
    initial_latents: Tensor | None = None,
    last_latents: Tensor | None = None,
    replay: Replay = "all",
    context_noise: float = 0.0,
    cfg: float = 1.0,
    negative: Tensor | None = None,
    attention: AttentionOptions | None = None,
    kv: KVOptions | None = None,
    denoise: Denoise | None = None,
    dense_attention: DenseAttention = sdpa,
    on_step: Callable[[StepEvent], None] | None = None,
    recorder: RunRecorder | None = None,
    cuda_graph: CudaGraph = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Generator[Chunk, None, None]:
    """Generate a video chunk by chunk; a generator of finished `Chunk`s in the model's normalised latent space.

    dit: a Wan 2.1 T2V module tree (`wan.wan_from_state_dict` or the host's). context: [B or 1, tokens, text_dim],
    or the prompts of a timeline. latent_shape: (B, C, frames, h, w), initial and last latents included.
    sigmas: falling noise levels in (0, 1], closed by 0; first_sigmas: another list for the video's first chunk.
    growth: one sparsity per chunk of the video (the last one is kept beyond the list), None for dense.
    window: visible latent frames, `sink_frames` and the current chunk included; None sees everything.
    sink_rope: where sinks stand once the window has moved on, see `KVCache`.

    noise: called as noise(chunk_index, draw, shape); draw 0 is the chunk's first noise, draw s ≥ 1 the fresh noise
    after denoising step s. Without it `seeded_noise(seed)`.
    initial_latents: [B or 1, C, frames, h, w], fed clean through the model before anything is generated
    (image-to-video, continuation); they are not yielded. Where `frames_per_chunk` does not divide them the first
    chunk takes the rest, so one image and chunks of three give 1, 3, 3, … Chunk indices, and with them growth,
    prompts and noise, count from the start of the video. `replay` "all" feeds every initial frame, so that a
    continued run equals the uninterrupted one; "window" only the sinks and the frames that are still visible, so
    that continuing a long video costs no more than a short one.
    last_latents: [B or 1, C, frames, h, w], clean, with which the video ends; fewer than the last chunk has, so that
    something is left to lead to them. They stand in that chunk throughout its steps, with `GIVEN_NOISE` of each
    step's noise and a timestep to match, and in its x0 as they are. Chunks before it know nothing of them.
    context_noise: the timestep, 0…1000, at which finished chunks are committed.
    cfg, negative: classifier-free guidance with a negative prompt [B or 1, tokens, text_dim] and a cache of its own,
    for models that are not distilled; 1 runs the prompt alone.
    attention, kv: how sparse attention is done, and how the KV cache is kept.
    denoise: denoise(x, sigma, model_pass) → x0, the way ComfyUI runs the model itself; x is float32 [B, C, f, h, w]
    and model_pass(dit, x, timestep) the model's flow, see `causal.Pass`.
    dense_attention: dense attention over [B, L, H, D]. on_step: called after every denoising step.
    recorder: notes what the run keeps and how long it takes.
    cuda_graph: whether a chunk's steps are launched as one CUDA graph, see `cuda_graph`; "auto" does so if it can and
    says why if not, "on" refuses to run without.
    dtype, device: of the KV cache and the computation; default the model's dtype and the context's device.

    The KV cache is allocated when iteration starts and freed when it ends, however it ends. Raises ValueError for
    requests that cannot work, before any of them runs. Source: Self Forcing's few-step rollout.
    """
    prompts = [Prompt(context)] if isinstance(context, Tensor) else list(context)
    if cfg != 1.0 and negative is None:
        raise ValueError(f"cfg {cfg} needs a negative prompt; pass negative, or cfg 1")
    guides = [Timeline(prompts)] + ([Timeline([Prompt(negative)])] if negative is not None and cfg != 1.0 else [])
    levels, first_levels = list(map(float, sigmas)), list(map(float, first_sigmas or sigmas))
    for steps in (levels, first_levels):
        _check_levels(steps)
    if not 0.0 <= context_noise <= 1000.0:
        raise ValueError(f"context_noise {context_noise} is not a timestep between 0 and 1000")
    if growth is not None and (not growth or not all(0.0 <= sparsity < 1.0 for sparsity in growth)):
        raise ValueError(f"growth {growth} must hold at least one sparsity, all in [0, 1)")
    choices = (("sink_rope", sink_rope, SinkRope), ("replay", replay, Replay), ("cuda_graph", cuda_graph, CudaGraph))
    for name, value, known in choices:
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(get_args(known))}")
    if sink_frames < 0:
        raise ValueError(f"sink_frames {sink_frames} is negative; use 0 or more latent frames")
    for guide in guides:
        _check_tensors(dit, latent_shape, guide, initial_latents)
    frames = latent_shape[2]
    initial_frames = 0 if initial_latents is None else initial_latents.shape[2]
    lengths = chunk_lengths(frames, frames_per_chunk, first_chunk_length(frames_per_chunk, initial_frames))
    if last_latents is not None:
        check_last_latents(last_latents, latent_shape, frames_per_chunk, lengths[-1])
    if window is not None and window < sink_frames + max(lengths):
        raise ValueError(
            f"window {window} cannot hold {sink_frames} sink frames and a chunk of {max(lengths)}; "
            f"use at least {sink_frames + max(lengths)} latent frames"
        )
    heads = dit.blocks[0].self_attn.num_heads
    cache = CacheShape.of_run(
        attention or AttentionOptions(),
        latent_shape,
        layers=len(dit.blocks),
        heads=heads,
        head_dim=dit.dim // heads,
        window=window,
        sink_frames=sink_frames,
        sink_rope=sink_rope,
        sparse=growth is not None and any(sparsity > 0.0 for sparsity in growth[: len(lengths)]),
        dtype=dtype or dit.dtype,
    )
    place = torch.device(device) if device is not None else prompts[0].context.device
    why_no_graphs = None
    if cuda_graph != "off":
        why_no_graphs = why_no_graph(dit, place, kv_in_host_memory=(kv or KVOptions()).host)
        if why_no_graphs and cuda_graph == "on":
            raise ValueError(f"cuda_graph 'on' cannot run: {why_no_graphs}; use 'auto' or 'off'")
    loop = ChunkLoop(
        dit=dit,
        guides=guides,
        cfg=cfg,
        shape=tuple(latent_shape),
        lengths=lengths,
        first_index=[0, *accumulate(lengths)].index(initial_frames),
        levels=levels,
        first_levels=first_levels,
        growth=growth,
        cache=cache,
        noise=noise or seeded_noise(seed),
        initial_latents=initial_latents,
        last_latents=last_latents,
        replay=replay,
        context_noise=context_noise,
        attention=attention or AttentionOptions(),
        kv=kv or KVOptions(),
        denoise=denoise,
        dense_attention=dense_attention,
        on_step=on_step,
        recorder=recorder or Recorder(),
        cuda_graph=cuda_graph,
        why_no_graphs=why_no_graphs,
        dtype=dtype or dit.dtype,
        device=place,
    )
    return loop.chunks()


def _check_levels(steps: list[float]) -> None:
    """ValueError unless noise levels fall from at most 1 to 0."""
    if len(steps) < 2 or steps[-1] != 0.0 or any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"sigmas {steps} must fall from step to step and end with 0, like {few_step_sigmas()}")
    if not 0.0 < steps[0] <= 1.0:
        raise ValueError(f"sigmas start at {steps[0]}, which is outside (0, 1]")


def _check_tensors(dit: Any, latent_shape: Sequence[int], guide: Timeline, initial_latents: Tensor | None) -> None:
    """ValueError unless the video's shape fits the model, and the prompts and the initial latents fit both."""
    if len(latent_shape) != 5:
        raise ValueError(f"latent_shape {tuple(latent_shape)} is not (batch, channels, frames, height, width)")
    batch, channels, frames, height, width = latent_shape
    if channels != dit.patch_embedding.in_channels:
        raise ValueError(f"latent_shape has {channels} channels, the model takes {dit.patch_embedding.in_channels}")
    if min(latent_shape) < 1:
        raise ValueError(f"latent_shape {tuple(latent_shape)} has an empty side; every side must be at least 1")
    if height % 2 or width % 2:
        raise ValueError(
            f"latents of {height}×{width} cannot be cut into 2×2 patches: the video's height {8 * height} and width "
            f"{8 * width} must be multiples of 16"
        )
    text_width = dit.text_embedding[0].in_features
    for context in (prompt.context for prompt in guide.prompts):
        if context.shape[0] not in (1, batch):
            raise ValueError(f"context is a batch of {context.shape[0]}; pass {_either(1, batch)}")
        if context.shape[2] != text_width:
            raise ValueError(f"context is {context.shape[2]} wide, the model takes {text_width}: another text encoder?")
        if not _is_finite(context):
            raise ValueError("context holds NaN or infinity; encode the text again")
    if initial_latents is None:
        return
    _check_given("initial_latents", initial_latents, latent_shape)
    if initial_latents.shape[2] >= frames:
        raise ValueError(
            f"initial_latents already fill {initial_latents.shape[2]} of {frames} latent frames; ask for a longer video"
        )


def check_last_latents(last: Tensor, latent_shape: Sequence[int], frames_per_chunk: int, last_chunk: int) -> None:
    """ValueError unless a video of `latent_shape` can end with the latents `last`.

    frames_per_chunk, last_chunk: latent frames of a whole chunk, and of the video's last one.
    """
    _check_given("last_latents", last, latent_shape)
    count, frames = last.shape[2], latent_shape[2]
    if count < last_chunk:
        return
    nothing = f"last_latents of {count} latent frames leave none of the last chunk's {last_chunk} to lead to them"
    if frames_per_chunk == 1:
        raise ValueError(f"{nothing}; a model that works frame by frame cannot do it: use a chunk-wise checkpoint")
    if count < frames_per_chunk:
        whole = frames + frames_per_chunk - last_chunk
        raise ValueError(f"{nothing}; ask for {whole} latent frames instead of {frames}, then that chunk is whole")
    raise ValueError(f"{nothing}; give at most {frames_per_chunk - 1}")


def _check_given(name: str, given: Tensor, latent_shape: Sequence[int]) -> None:
    """ValueError unless given latents fit a video of `latent_shape` and are finite."""
    batch, channels, _, height, width = latent_shape
    shape = tuple(given.shape)
    fits = len(shape) == 5 and (shape[1], *shape[3:]) == (channels, height, width) and shape[0] in (1, batch)
    if not fits or not shape[2]:
        expected = f"[{_either(1, batch)}, {channels}, frames, {height}, {width}]"
        raise ValueError(f"{name} have shape {shape}; expected {expected}")
    if not _is_finite(given):
        raise ValueError(f"{name} hold NaN or infinity; encode the frames again")


def _either(one: int, other: int) -> str:
    return str(one) if one == other else f"{one} or {other}"


def _is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity, without a copy: the extremes pass NaN on."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())
