"""The autoregressive rollout: chunk after chunk, a few denoising steps each, then a clean pass that commits it.

`for chunk in rollout(...)` is the whole interface: finished chunks come out as they are made, closing the generator
cancels, and an error leaves every chunk already yielded in the caller's hands.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .attention import AttentionOptions
from .causal_wan import CausalState, DenseAttention, forward, sdpa
from .families import SinkRope
from .growth import chunk_lengths, first_chunk_length
from .kv_cache import KVCache, slots_and_sinks
from .kv_storage import KVOptions
from .run_record import RunRecorder
from .timeline import Prompt, Timeline

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
Denoise = Callable[[Tensor, float, CausalState], Tensor]
Replay = Literal["all", "window"]


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its index in the video, its first latent frame and latents [B, C, frames, h, w]."""

    index: int
    start_frame: int
    latents: Tensor


@dataclass(frozen=True)
class StepEvent:
    """One finished denoising step: the `step`-th of `steps` (from 0) of the `chunk`-th of `chunks` generated chunks.

    `index` is the chunk's index in the video, initial latents included; `done` of `total` counts the steps of the
    whole run. x, x0: [B, C, frames, h, w], the step's input and its prediction. density: the share of visible key
    blocks that the chunk attends to.
    """

    chunk: int
    chunks: int
    index: int
    start_frame: int
    step: int
    steps: int
    done: int
    total: int
    x: Tensor
    x0: Tensor
    density: float


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
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Generator[Chunk, None, None]:
    """Generate a video chunk by chunk; a generator of finished `Chunk`s in the model's normalised latent space.

    dit: a Wan 2.1 T2V module tree (`wan.wan_from_state_dict` or the host's). context: [B or 1, tokens, text_dim],
    or the prompts of a timeline. latent_shape: (B, C, frames, h, w), initial latents included.
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
    context_noise: the timestep, 0…1000, at which finished chunks are committed.
    cfg, negative: classifier-free guidance with a negative prompt [B or 1, tokens, text_dim] and a cache of its own,
    for models that are not distilled; 1 runs the prompt alone.
    attention, kv: how sparse attention is done, and how the KV cache is kept.
    denoise: denoise(x, sigma, state) → x0, the way a host runs the model itself; x is float32 [B, C, f, h, w] and
    `state.text` the text to follow. dense_attention: dense attention over [B, L, H, D]. on_step: called after every
    denoising step. recorder: notes what the run keeps and how long it takes. dtype, device: of the KV cache and the
    computation; default the model's dtype and the context's device.

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
    for name, value, known in (("sink_rope", sink_rope, SinkRope), ("replay", replay, Replay)):
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(get_args(known))}")
    if sink_frames < 0:
        raise ValueError(f"sink_frames {sink_frames} is negative; use 0 or more latent frames")
    for guide in guides:
        _check_tensors(dit, latent_shape, guide, initial_latents)
    frames = latent_shape[2]
    initial_frames = 0 if initial_latents is None else initial_latents.shape[2]
    lengths = chunk_lengths(frames, frames_per_chunk, first_chunk_length(frames_per_chunk, initial_frames))
    if window is not None and window < sink_frames + max(lengths):
        raise ValueError(
            f"window {window} cannot hold {sink_frames} sink frames and a chunk of {max(lengths)}; "
            f"use at least {sink_frames + max(lengths)} latent frames"
        )
    slots, sinks, rope = slots_and_sinks(frames, window, sink_frames, sink_rope)
    run = _Run(
        dit=dit,
        guides=guides,
        cfg=cfg,
        shape=tuple(latent_shape),
        lengths=lengths,
        first_index=[0, *accumulate(lengths)].index(initial_frames),
        levels=levels,
        first_levels=first_levels,
        growth=growth,
        slots=slots,
        sink_frames=sinks,
        sink_rope=rope,
        noise=noise or seeded_noise(seed),
        initial_latents=initial_latents,
        replay=replay,
        context_noise=context_noise,
        attention=attention or AttentionOptions(),
        kv=kv or KVOptions(),
        denoise=denoise,
        dense_attention=dense_attention,
        on_step=on_step,
        recorder=recorder,
        dtype=dtype or dit.dtype,
        device=torch.device(device) if device is not None else prompts[0].context.device,
    )
    return run.chunks()


@dataclass
class _Run:
    """One checked request, and the chunk × step loop that fulfils it. Fields as in `rollout`."""

    dit: Any
    guides: list[Timeline]  # the prompts and, with guidance, the negative prompt; one cache each
    cfg: float
    shape: tuple[int, ...]
    lengths: list[int]
    first_index: int  # the first chunk that is generated
    levels: list[float]
    first_levels: list[float]
    growth: Sequence[float] | None
    slots: int
    sink_frames: int
    sink_rope: SinkRope
    noise: Noise
    initial_latents: Tensor | None
    replay: Replay
    context_noise: float
    attention: AttentionOptions
    kv: KVOptions
    denoise: Denoise | None
    dense_attention: DenseAttention
    on_step: Callable[[StepEvent], None] | None
    recorder: RunRecorder | None
    dtype: torch.dtype
    device: torch.device

    def chunks(self) -> Generator[Chunk, None, None]:
        """The loop; memory lives from the first `next` to the end."""
        states: list[CausalState] = []
        past: list[Tensor] = []  # clean chunks as far back as any of them is visible
        done = 0
        if self.recorder is not None:
            self.recorder.start(self.dit, self.shape, self.device)
        try:
            states += (self._new_state() for _ in self.guides)
            for index, length in enumerate(self.lengths):
                start = sum(self.lengths[:index])
                self._follow_prompts(states, index, past)
                if index < self.first_index and not self._is_replayed(index):
                    for state in states:
                        state.cache.skip(length)
                    past.append(self._given(start, length))
                    continue
                for state in states:
                    state.open_chunk(length, self._sparsity(index), self.device)
                is_given = index < self.first_index
                if is_given:
                    latents = self._given(start, length)
                else:
                    latents, done = self._denoise_chunk(states, index, start, done)
                    self._lap(index, "denoise")
                    yield Chunk(index, start, latents)
                    self._lap(index, "output")
                if index < len(self.lengths) - 1:
                    for state in states:
                        self._clean_pass(state, latents)
                    self._lap(index, "replay" if is_given else "clean pass")
                past = [*past, latents][-self.slots :]
        finally:
            # A traceback or a host's hook may still hold the states; the memory must go all the same.
            for state in states:
                state.close()

    def _lap(self, index: int, stage: str) -> None:
        """Everything since the last lap belongs to this stage."""
        if self.recorder is not None:
            self.recorder.lap(index, stage)

    def _new_state(self) -> CausalState:
        heads = self.dit.blocks[0].self_attn.num_heads
        batch, _, _, height, width = self.shape
        cache = KVCache(
            layers=len(self.dit.blocks),
            batch=batch,
            slots=self.slots,
            tokens_per_frame=(height // 2) * (width // 2),
            heads=heads,
            head_dim=self.dit.dim // heads,
            block_k=self.attention.block[1],
            sink_frames=self.sink_frames,
            sink_rope=self.sink_rope,
            options=self.kv,
            pooled=any(self._sparsity(index) > 0.0 for index in range(len(self.lengths))),
            value_means=self.attention.tail,
            sub_blocks=self.attention.estimator == "lse",
            dtype=self.dtype,
            device=self.device,
        )
        return CausalState(cache, self.attention, self.dense_attention)

    def _sparsity(self, index: int) -> float:
        return self.growth[min(index, len(self.growth) - 1)] if self.growth is not None else 0.0

    def _is_replayed(self, index: int) -> bool:
        """Whether an initial chunk is fed through the model: all are, or those that hold sinks or are still visible."""
        start, given = sum(self.lengths[:index]), sum(self.lengths[: self.first_index])
        still_visible = start + self.lengths[index] > given - (self.slots - self.sink_frames)
        return self.replay == "all" or start < self.sink_frames or still_visible

    def _given(self, start: int, length: int) -> Tensor:
        assert self.initial_latents is not None
        given = self.initial_latents[:, :, start : start + length].to(self.device, torch.float32)
        return given.expand(self.shape[0], -1, -1, -1, -1)

    @torch.no_grad()
    def _follow_prompts(self, states: list[CausalState], index: int, past: list[Tensor]) -> None:
        """Give each cache its text when it changes; a hard switch recomputes the visible past under the new one."""
        for guide, state in zip(self.guides, states, strict=True):
            change = guide.changes_at(index)
            if index == 0 or change:
                text = guide.text(index).to(device=self.device, dtype=self.dtype)
                state.follow(text.expand(self.shape[0], -1, -1))
            if change == "hard":
                state.reopen_visible()
                if state.frames:
                    self._clean_pass(state, torch.cat(past, dim=2)[:, :, -state.frames :])
                    if self.recorder is not None:
                        self.recorder.note(f"the hard prompt switch at chunk {index} read {state.frames} frames again")
                        self.recorder.lap(index, "recompute")

    @torch.no_grad()
    def _denoise_chunk(self, states: list[CausalState], index: int, start: int, done: int) -> tuple[Tensor, int]:
        """A finished chunk from noise, and the steps done so far."""
        batch, channels, _, height, width = self.shape
        shape = (batch, channels, self.lengths[index], height, width)
        levels = self.first_levels if index == 0 else self.levels

        def draw(number: int) -> Tensor:
            drawn = self.noise(index, number, shape)
            if drawn.shape != shape:
                raise ValueError(f"noise({index}, {number}, …) has shape {tuple(drawn.shape)}; expected {shape}")
            return drawn.to(device=self.device, dtype=torch.float32)

        if self.recorder is not None:
            self.recorder.open(index, self._sparsity(index), len(levels) - 1, states[0])
        x = levels[0] * draw(0) if levels[0] < 1.0 else draw(0)
        for step, (sigma, following) in enumerate(pairwise(levels)):
            if self.recorder is not None and following == 0.0:
                states[0].watch = self.recorder.saw
            x0 = self._predict(x, sigma, states)
            done += 1
            if self.on_step is not None:
                generated = len(self.lengths) - self.first_index
                total = generated * (len(self.levels) - 1)
                if self.first_index == 0:
                    total += len(self.first_levels) - len(self.levels)
                chunk, steps, density = index - self.first_index, len(levels) - 1, states[0].density
                self.on_step(StepEvent(chunk, generated, index, start, step, steps, done, total, x, x0, density))
            if following > 0.0:
                x = (1.0 - following) * x0 + following * draw(step + 1)
        if self.recorder is not None:
            states[0].watch = None
            self.recorder.close()
        return x0, done

    @torch.no_grad()
    def _clean_pass(self, state: CausalState, latents: Tensor) -> None:
        """Commit clean latents as history."""
        state.clean = True
        self._predict(latents, self.context_noise / 1000.0, [state])
        state.clean = False
        state.cache.commit()

    def _predict(self, x: Tensor, sigma: float, states: list[CausalState]) -> Tensor:
        """x0 of the open chunk, guided when there is a second cache."""
        run = self.denoise or self._run_model
        x0 = run(x, sigma, states[0])
        if len(states) > 1:
            unguided = run(x, sigma, states[1])
            x0 = unguided + self.cfg * (x0 - unguided)
        return x0

    def _run_model(self, x: Tensor, sigma: float, state: CausalState) -> Tensor:
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=self.device)
        assert state.text is not None
        return x - sigma * forward(self.dit, x.to(self.dtype), timestep, state.text, state).float()


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
    shape = tuple(initial_latents.shape)
    if len(shape) != 5 or (shape[1], *shape[3:]) != (channels, height, width) or shape[0] not in (1, batch):
        expected = f"[{_either(1, batch)}, {channels}, frames, {height}, {width}]"
        raise ValueError(f"initial_latents have shape {shape}; expected {expected}")
    if shape[2] >= frames:
        raise ValueError(f"initial_latents already fill {shape[2]} of {frames} latent frames; ask for a longer video")
    if not _is_finite(initial_latents):
        raise ValueError("initial_latents hold NaN or infinity; encode the start frames again")


def _either(one: int, other: int) -> str:
    return str(one) if one == other else f"{one} or {other}"


def _is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity, without a copy: the extremes pass NaN on."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())
