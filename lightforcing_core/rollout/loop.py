"""The chunk × step loop behind `rollout`, what it yields, and what it tells while it runs."""

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import fast_path
from ..attention.dispatch import AttentionOptions
from ..families import SinkRope
from ..model import cuda_graph as step_graph
from ..model.causal import GIVEN_NOISE, CausalState, DenseAttention, forward
from ..model.cuda_graph import CudaGraph, StepGraph
from ..model.kv_cache import KVCache
from ..model.kv_storage import KVOptions
from ..pinned import sent
from .record import RunRecorder
from .timeline import Timeline

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
Denoise = Callable[[Tensor, float, CausalState], Tensor]
Replay = Literal["all", "window"]

_log = logging.getLogger(__name__)


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
    slots: int
    sink_frames: int
    sink_rope: SinkRope
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
    recorder: RunRecorder | None
    cuda_graph: CudaGraph
    why_no_graphs: str | None
    dtype: torch.dtype
    device: torch.device

    def chunks(self) -> Generator[Chunk, None, None]:
        """The loop; memory lives from the first `next` to the end."""
        fast_path.begin_run()
        states: list[CausalState] = []
        past: list[Tensor] = []  # clean chunks as far back as any of them is visible
        done = 0
        if self.recorder is not None:
            self.recorder.start(self.dit, self.shape, self.device)
        try:
            states += (self._new_state() for _ in self.guides)
            self._prepare_graphs(states)
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
            self._tell_graphs(states)
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

    def _prepare_graphs(self, states: list[CausalState]) -> None:
        """Let the states run their steps as CUDA graphs, where that was asked for and can be."""
        if self.cuda_graph == "off":
            return
        if self.why_no_graphs is not None:
            self._say_of_graphs(f"not used: {self.why_no_graphs}")
            return

        def stopped(reason: str) -> None:
            _log.warning("[Light Forcing] CUDA graphs are no longer used in this run: %s", reason)
            self._say_of_graphs(f"no longer used: {reason}")

        recorder = step_graph.CudaRecorder(self.device)
        for state in states:
            state.graph = StepGraph(recorder, stopped, must=self.cuda_graph == "on")

    def _tell_graphs(self, states: list[CausalState]) -> None:
        """Note, at the end, how many steps were launched as graphs."""
        graphs = [state.graph for state in states if state.graph is not None]
        if graphs and not any(graph.why_off for graph in graphs):
            self._say_of_graphs(f"{sum(graph.launches for graph in graphs)} steps launched as graphs")

    def _say_of_graphs(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.fact("CUDA graphs", text)

    def _sparsity(self, index: int) -> float:
        return self.growth[min(index, len(self.growth) - 1)] if self.growth is not None else 0.0

    def _is_replayed(self, index: int) -> bool:
        """Whether an initial chunk is fed through the model: all are, or those that hold sinks or are still visible."""
        start, given = sum(self.lengths[:index]), sum(self.lengths[: self.first_index])
        still_visible = start + self.lengths[index] > given - (self.slots - self.sink_frames)
        return self.replay == "all" or start < self.sink_frames or still_visible

    def _given(self, start: int, length: int) -> Tensor:
        assert self.initial_latents is not None
        return self._for_each_video(self.initial_latents[:, :, start : start + length])

    def _end_of(self, index: int) -> Tensor | None:
        """What the chunk ends with, if anything: [B, C, frames, h, w]."""
        if self.last_latents is None or index < len(self.lengths) - 1:
            return None
        return self._for_each_video(self.last_latents)

    def _for_each_video(self, given: Tensor) -> Tensor:
        return sent(given.float(), self.device).expand(self.shape[0], -1, -1, -1, -1)

    @torch.no_grad()
    def _follow_prompts(self, states: list[CausalState], index: int, past: list[Tensor]) -> None:
        """Give each cache its text when it changes; a hard switch recomputes the visible past under the new one."""
        for guide, state in zip(self.guides, states, strict=True):
            change = guide.changes_at(index)
            if index == 0 or change:
                text = sent(guide.text(index).to(self.dtype), self.device)
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
            return sent(drawn.float(), self.device)

        if self.recorder is not None:
            self.recorder.open(index, self._sparsity(index), len(levels) - 1, states[0])
        end = self._end_of(index)
        for state in states:
            state.steps, state.given = len(levels) - 1, 0 if end is None else end.shape[2]
        noise = draw(0)
        x = levels[0] * noise if levels[0] < 1.0 else noise
        for step, (sigma, following) in enumerate(pairwise(levels)):
            if self.recorder is not None and following == 0.0:
                states[0].watch = self.recorder.saw
            if end is not None:
                less = GIVEN_NOISE * sigma
                x = _with_end(x, (1.0 - less) * end + less * noise[:, :, -end.shape[2] :])
            x0 = self._predict(x, sigma, states)
            if end is not None:
                x0 = _with_end(x0, end)
            done += 1
            if self.on_step is not None:
                generated = len(self.lengths) - self.first_index
                total = generated * (len(self.levels) - 1)
                if self.first_index == 0:
                    total += len(self.first_levels) - len(self.levels)
                chunk, steps, density = index - self.first_index, len(levels) - 1, states[0].density
                self.on_step(StepEvent(chunk, generated, index, start, step, steps, done, total, x, x0, density))
            if following > 0.0:
                noise = draw(step + 1)
                x = (1.0 - following) * x0 + following * noise
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


def _with_end(x: Tensor, end: Tensor) -> Tensor:
    """x [B, C, frames, h, w] with `end` in the place of its last frames."""
    return torch.cat([x[:, :, : -end.shape[2]], end], dim=2)
