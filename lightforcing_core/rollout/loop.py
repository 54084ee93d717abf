"""The chunk × step loop behind `rollout`, what it yields, and what it tells while it runs."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import fast_path
from ..attention.dispatch import AttentionOptions
from ..model.causal import GIVEN_NOISE, DenseAttention, ModelState, Pass, Predict
from ..model.cuda_graph import CudaGraph, step_graphs
from ..model.kv_cache import KVCache
from ..model.kv_storage import CacheShape, KVOptions
from ..pinned import to_device
from .record import Recorder
from .timeline import Timeline

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
Denoise = Callable[[Tensor, float, Pass], Tensor]
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


@dataclass
class ChunkLoop:
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
    cache: CacheShape
    noise: Noise
    initial_latents: Tensor | None
    last_latents: Tensor | None
    replay: Replay
    context_noise: float
    attention: AttentionOptions
    kv: KVOptions
    denoise: Denoise | None
    dense_attention: DenseAttention
    on_step: Callable[[StepEvent], None] | None
    recorder: Recorder
    cuda_graph: CudaGraph
    why_no_graphs: str | None
    dtype: torch.dtype
    device: torch.device

    def chunks(self) -> Generator[Chunk, None, None]:
        """The loop; memory lives from the first `next` to the end."""
        fast_path.begin_run()
        states: list[ModelState] = []
        past: list[Tensor] = []  # clean chunks as far back as any of them is visible
        done = 0
        self.recorder.start(self.dit, self.shape, self.device)
        try:
            states += (self._new_state() for _ in self.guides)
            with step_graphs(self.cuda_graph, self.why_no_graphs, self.device, len(states), self._note_graphs) as runs:
                for index, length in enumerate(self.lengths):
                    start = sum(self.lengths[:index])
                    self._follow_prompts(states, index, past)
                    if index < self.first_index and not self._is_replayed(index):
                        for state in states:
                            state.cache.skip(length)
                        past.append(self._given(start, length))
                        continue
                    is_given = index < self.first_index
                    self._open_chunk(states, index)
                    if is_given:
                        latents = self._given(start, length)
                    else:
                        latents, done = self._denoise_chunk(states, runs, index, start, done)
                        self.recorder.lap(index, "denoise")
                        yield Chunk(index, start, latents)
                        self.recorder.lap(index, "output")
                    if index < len(self.lengths) - 1:
                        for state in states:
                            self._clean_pass(state, latents)
                        self.recorder.lap(index, "replay" if is_given else "clean pass")
                    past = [*past, latents][-self.cache.slots :]
        finally:
            # A traceback or a hook of ComfyUI may still hold the states; the memory must go all the same.
            for state in states:
                state.close()

    def _new_state(self) -> ModelState:
        return ModelState(KVCache(self.cache, self.kv, self.device), self.attention, self.dense_attention)

    def _note_graphs(self, text: str) -> None:
        self.recorder.fact("CUDA graphs", text)

    def _open_chunk(self, states: list[ModelState], index: int) -> None:
        end = self._end_of(index)
        steps, given = len(self._levels(index)) - 1, 0 if end is None else end.shape[2]
        for state in states:
            state.open_chunk(self.lengths[index], self._sparsity(index), self.device, steps=steps, given=given)

    def _levels(self, index: int) -> list[float]:
        return self.first_levels if index == 0 else self.levels

    def _sparsity(self, index: int) -> float:
        return self.growth[min(index, len(self.growth) - 1)] if self.growth is not None else 0.0

    def _is_replayed(self, index: int) -> bool:
        """Whether an initial chunk is fed through the model: all are, or those that hold sinks or are still visible."""
        start, given = sum(self.lengths[:index]), sum(self.lengths[: self.first_index])
        still_visible = start + self.lengths[index] > given - (self.cache.slots - self.cache.sink_frames)
        return self.replay == "all" or start < self.cache.sink_frames or still_visible

    def _given(self, start: int, length: int) -> Tensor:
        assert self.initial_latents is not None
        return self._for_each_video(self.initial_latents[:, :, start : start + length])

    def _end_of(self, index: int) -> Tensor | None:
        """What the chunk ends with, if anything: [B, C, frames, h, w]."""
        if self.last_latents is None or index < len(self.lengths) - 1:
            return None
        return self._for_each_video(self.last_latents)

    def _for_each_video(self, given: Tensor) -> Tensor:
        return to_device(given.float(), self.device).expand(self.shape[0], -1, -1, -1, -1)

    @torch.no_grad()
    def _follow_prompts(self, states: list[ModelState], index: int, past: list[Tensor]) -> None:
        """Give each cache its text when it changes; a hard switch recomputes the visible past under the new one."""
        for guide, state in zip(self.guides, states, strict=True):
            change = guide.changes_at(index)
            if index == 0 or change:
                text = to_device(guide.text(index).to(self.dtype), self.device)
                state.follow(text.expand(self.shape[0], -1, -1))
            if change == "hard":
                state.reopen_visible()
                if frames := state.chunk.frames:
                    self._clean_pass(state, torch.cat(past, dim=2)[:, :, -frames:])
                    self.recorder.note(f"the hard prompt switch at chunk {index} read {frames} frames again")
                    self.recorder.lap(index, "recompute")

    @torch.no_grad()
    def _denoise_chunk(
        self, states: list[ModelState], runs: list[Predict], index: int, start: int, done: int
    ) -> tuple[Tensor, int]:
        """A finished chunk from noise, and the steps done so far. runs: how each state predicts."""
        batch, channels, _, height, width = self.shape
        shape = (batch, channels, self.lengths[index], height, width)
        levels = self._levels(index)

        def draw(number: int) -> Tensor:
            drawn = self.noise(index, number, shape)
            if drawn.shape != shape:
                raise ValueError(f"noise({index}, {number}, …) has shape {tuple(drawn.shape)}; expected {shape}")
            return to_device(drawn.float(), self.device)

        self.recorder.open(index, self._sparsity(index), len(levels) - 1, states[0])
        end = self._end_of(index)
        noise = draw(0)
        x = levels[0] * noise if levels[0] < 1.0 else noise
        for step, (sigma, following) in enumerate(pairwise(levels)):
            watch = self.recorder.watch if following == 0.0 else None
            if end is not None:
                less = GIVEN_NOISE * sigma
                x = _with_end(x, (1.0 - less) * end + less * noise[:, :, -end.shape[2] :])
            passes = [Pass(state, predict=run) for state, run in zip(states, runs, strict=True)]
            passes[0] = replace(passes[0], watch=watch)
            x0 = self._guided(x, sigma, passes)
            if end is not None:
                x0 = _with_end(x0, end)
            done += 1
            if self.on_step is not None:
                generated = len(self.lengths) - self.first_index
                total = generated * (len(self.levels) - 1)
                if self.first_index == 0:
                    total += len(self.first_levels) - len(self.levels)
                chunk, steps, density = index - self.first_index, len(levels) - 1, states[0].chunk.density
                self.on_step(StepEvent(chunk, generated, index, start, step, steps, done, total, x, x0, density))
            if following > 0.0:
                noise = draw(step + 1)
                x = (1.0 - following) * x0 + following * noise
        self.recorder.close()
        return x0, done

    @torch.no_grad()
    def _clean_pass(self, state: ModelState, latents: Tensor) -> None:
        """Commit clean latents as history."""
        self._run(latents, self.context_noise / 1000.0, Pass(state, commits=True))
        state.cache.commit()  # even if a `denoise` function ran no model

    def _guided(self, x: Tensor, sigma: float, passes: list[Pass]) -> Tensor:
        """x0 of the open chunk, guided when there is a second cache."""
        x0 = self._run(x, sigma, passes[0])
        if len(passes) > 1:
            unguided = self._run(x, sigma, passes[1])
            x0 = unguided + self.cfg * (x0 - unguided)
        return x0

    def _run(self, x: Tensor, sigma: float, model_pass: Pass) -> Tensor:
        """x0 of one pass."""
        if self.denoise is not None:
            return self.denoise(x, sigma, model_pass)
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=self.device)
        return x - sigma * model_pass(self.dit, x.to(self.dtype), timestep).float()


def _with_end(x: Tensor, end: Tensor) -> Tensor:
    """x [B, C, frames, h, w] with `end` in the place of its last frames."""
    return torch.cat([x[:, :, : -end.shape[2]], end], dim=2)
