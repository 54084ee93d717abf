"""The chunk sampler behind both sampling nodes: the core's rollout plans the passes, ComfyUI's guider runs them."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...lightforcing_core import fast_path, machine
from ...lightforcing_core.attention.backends.dense import FastestDense
from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.model.causal import Pass, prompt_modules
from ...lightforcing_core.refusal import NotFinite
from ...lightforcing_core.rollout.cost import flops_ratio, recipe_costs
from ...lightforcing_core.rollout.loop import rollout
from ...lightforcing_core.rollout.recipe import Recipe
from ...lightforcing_core.rollout.record import RunRecord, RunRecorder
from ...lightforcing_core.rollout.runtime import Chunk, Runtime, StepEvent
from ...lightforcing_core.rollout.schedule import video_frames_of
from ...lightforcing_core.rollout.state import RunState
from ..comfy import (
    Interrupted,
    ModelPatcher,
    dense_attentions,
    executing_node,
    is_interrupted,
    is_out_of_memory,
    is_prompt_waiting,
    load_if_away,
    out_of_memory,
    preferred_attentions,
    raise_if_interrupted,
    request_memory,
    show_text,
    weights_of,
)
from ..model.patch import KEY, CausalSampler, conflicting_patch, required_settings, run_passes
from ..vae.decode import FrameDecoder
from .direction import Direction
from .memory import looks_of, memory_advice, plan_of
from .observer import Observer
from .request import KV_CACHES, Request, model_text, named_for_the_canvas, unsuitable_guider, unsuitable_start

log = logging.getLogger(__name__)


class ChunkSampler(CausalSampler):
    """The rollout as a ComfyUI SAMPLER, with the guider's cfg and prompts.

    request: the inputs of the node.
    observers: receive the events of the run, in this order.
    saved: a run to continue; it decides the video instead of the request.
    decoder: decodes finished chunks, so the memory plan includes it.
    own_noise: whether chunks start from the run's own noise instead of the one that ComfyUI gives.
    direction: what clients ask of the run while it is made; None takes no requests.

    `record` is the record of the last run, once it has ended.
    """

    def __init__(
        self,
        request: Request,
        observers: Sequence[Observer] = (),
        *,
        saved: RunState | None = None,
        decoder: FrameDecoder | None = None,
        own_noise: bool = False,
        direction: Direction | None = None,
    ) -> None:
        self.request, self.observers, self.saved = request, observers, saved
        self.decoder, self.own_noise, self.direction = decoder, own_noise, direction
        self.record: RunRecord | None = None
        self._prepared: tuple[RunState, MemoryPlan, dict[str, str]] | None = None

    def prepare_run(
        self, guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor, denoise_mask: Tensor | None, seed: int
    ) -> None:
        """Check everything and plan the memory, before any weight is loaded. Raises ValueError."""
        model = guider.model_patcher
        preferred = preferred_attentions(model.get_model_object("diffusion_model"))
        self._dense_attention = FastestDense(dense_attentions(), preferred)
        with named_for_the_canvas():
            reason = (
                conflicting_patch(model, guider.model_options)
                or unsuitable_guider(guider)
                or unsuitable_start(latent_image, sigmas, denoise_mask)
            )
            if reason:
                raise ValueError(reason)
            run = self.saved
            if run is None:
                recipe = self.request.recipe(guider, required_settings(model), sigmas.tolist(), noise.shape, seed)
                run = RunState(recipe, model_text(model))
        plan = plan_of(model, run, KV_CACHES[self.request.kv_cache], self.decoder, saved=self.saved is not None)
        run = replace(run, kv_dtype=plan.kv.dtype)
        fast_path.begin_run()
        if self.saved is None and self.request.speed != "safe":
            with machine.measuring(show_text, is_interrupted):
                run = replace(run, recipe=looks_of(model, run, self._dense_attention).dense_where_faster())
        self._prepared = run, plan, fast_path.notes()
        log.info("[Light Forcing] %s", plan)
        for observer in self.observers:
            observer.begin(run, plan)

        def memory(one_frame: int) -> int:
            # ComfyUI adds the weights itself, and its estimate of a step includes the prompt.
            return replace(plan.estimate, weights=0, vae=0, prompt=0, step=run.recipe.pass_frames * one_frame).total

        request_memory(guider, KEY, memory)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[int, Tensor, Tensor, int], object] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The video [B, 16, frames, h, w], normalised, or its start if the run was cut short."""
        required_settings(model_wrap.model_patcher)
        assert self._prepared is not None  # with the patch, ComfyUI has called `prepare_run` before
        (run, plan, notes), self._prepared = self._prepared, None
        inner = model_wrap.inner_model
        dit, fresh = inner.diffusion_model, run.recipe.noise()
        video = _Video(run, noise.to(noise.device if plan.latents_on_device else "cpu", copy=True))
        starts = [0, *accumulate(run.recipe.chunk_lengths())]
        bar = tqdm(disable=disable_pbar, desc="Light Forcing")

        def draw(index: int, number: int, shape: tuple[int, ...]) -> Tensor:
            is_ours = number or self.own_noise
            return fresh(index, number, shape) if is_ours else noise[:, :, starts[index] : starts[index + 1]]

        def denoise(x: Tensor, sigma: float, passes: Sequence[Pass]) -> Tensor:
            raise_if_interrupted()
            return run_passes(model_wrap, x, sigma, passes, extra_args)

        def on_step(event: StepEvent) -> None:
            video.update(event)
            bar.total = event.total
            bar.update()
            for observer in self.observers:
                observer.step(event)
            if callback is not None:
                callback(event.done - 1, video.clean.clone(), video.noisy, event.total)

        def direct(recipe: Recipe, index: int) -> Recipe:
            assert self.direction is not None
            recipe, said = self.direction.follow(recipe, index)
            if said:
                load_if_away(model_wrap.model_patcher, 0)  # the text encoder may have taken its place
                recorder.fact(f"live prompt {index}", said)
                for observer in self.observers:
                    observer.directed(recipe, said)
            return recipe

        def should_stop() -> bool:
            return is_interrupted() or (video.is_complete and is_prompt_waiting())

        recorder = RunRecorder(self._facts(model_wrap.model_patcher, run, plan) | notes)
        runtime = Runtime(
            device=noise.device,
            dtype=inner.get_dtype_inference(),
            kv=plan.kv,
            dense_attention=self._dense_attention,
            noise=draw,
            denoise=denoise,
            replay=self.request.replay,
            on_step=on_step,
            direct=direct if self.direction else None,
            recorder=recorder,
            cuda_graph="auto" if plan.cuda_graph else "off",
            measuring=partial(machine.measuring, show_text, should_stop),
            weights=weights_of(model_wrap.model_patcher, dit, prompt_modules(dit)),
        )
        # A saved run has its own guidance; its prompts come with the passes, so any other serves as the negative one.
        cfg, model_wrap.cfg = model_wrap.cfg, run.recipe.guidance.cfg
        model_wrap.conds.setdefault("negative", model_wrap.conds["positive"])
        begun = time.perf_counter()
        speed = machine.safe() if self.request.speed == "safe" else contextlib.nullcontext()
        try:
            with named_for_the_canvas():
                chunks = rollout(dit, run.recipe, runtime, run.finished, run.begun)
            node = executing_node()
            requests: AbstractContextManager[None] = contextlib.nullcontext()
            if self.direction is not None and node is not None:
                requests = self.direction.open(node[1], run.recipe, run.recipe.first_index + len(run.finished))
            with speed, requests, contextlib.closing(chunks):
                for chunk in chunks:
                    video.add(chunk)
                    for observer in self.observers:
                        observer.chunk(chunk, is_last=video.is_complete)
                    video.in_output = None
                    if self.direction is not None and self.direction.stops and not video.is_complete:
                        for observer in self.observers:
                            observer.cut(f"stopped after {video.progress}")
                        break
        except (Interrupted, Exception) as error:
            self._accept_end(error, video, run, plan)
        finally:
            model_wrap.cfg = cfg
            bar.close()
            seconds = time.perf_counter() - begun
            counts = video.finished, video.wanted, seconds
            log.info("[Light Forcing] %s, %d of %d chunks in %.1f s", self._title, *counts)
        self.record = recorder.finish(frames=video.end)
        return video.result()

    @property
    def _title(self) -> str:
        return "saved run" if self.saved else self.request.title

    def _facts(self, model: ModelPatcher, run: RunState, plan: MemoryPlan) -> dict[str, str]:
        """The facts about a run that its report shows in addition to its record."""
        recipe = run.recipe
        batch, _, frames, height, width = recipe.latent_shape
        videos = "" if batch == 1 else f"{batch} videos of "
        sinks = f", {recipe.sink_frames} of them sinks" if recipe.sink_frames else ""
        costs = recipe_costs(recipe)
        ratio = f"{flops_ratio(costs):.1%} of dense attention FLOPs planned"
        planned = "the keys decide how much is read" if any(cost.by_keys for cost in costs) else ratio
        return {
            "model": f"{required_settings(model).family.title}, {run.model}",
            "video": f"{videos}{video_frames_of(frames)} frames ({frames} latent) at {8 * width}×{8 * height}",
            "schedule": f"{self._title}, {planned}",
            "policy": recipe.attention.policy_text,
            "sees": "everything" if recipe.window is None else f"{recipe.window} latent frames{sinks}",
            "seed": str(recipe.seed),
            "memory": str(plan.kv),
            "speed": self.request.speed,
        }

    def _accept_end(self, error: BaseException, video: "_Video", run: RunState, plan: MemoryPlan) -> None:
        """Accept the finished chunks of a run that `error` ended, or raise it."""
        if isinstance(error, Interrupted):
            video.drop_output()  # so that LATENT and the frames end together
            reason = f"cancelled after {video.progress}"
        elif isinstance(error, NotFinite):
            reason = f"{error}; stopped after {video.progress}"
        elif is_out_of_memory(error):
            decoding = video.in_output is not None
            advice = memory_advice(run.recipe, plan, decoding=decoding)
            doing = "decoding" if decoding else "sampling"
            reason = f"out of memory while {doing} a chunk, after {video.progress}; {advice}"
            error = out_of_memory(reason)
        else:
            raise error
        if not (self.request.keep_finished and video.finished):
            raise error
        log.warning("[Light Forcing] %s", reason)
        for observer in self.observers:
            observer.cut(reason)


class _Video:
    """The latents of a run so far, and how much of them is finished.

    clean, noisy: [B, 16, frames, h, w], where the current chunk holds its latest prediction and that step's input.
    end: latent frames that are finished. finished, wanted: chunks of this run.
    in_output: the chunk that observers are working on, if any.
    """

    def __init__(self, run: RunState, noisy: Tensor) -> None:
        self.clean, self.noisy, self.end = torch.zeros_like(noisy), noisy, run.finished_frames
        if (past := run.latents) is not None:
            self.clean[:, :, : self.end] = past
        self.finished = 0
        self.wanted = len(run.recipe.chunk_lengths()) - run.recipe.first_index - len(run.finished)
        self.in_output: Chunk | None = None

    @property
    def is_complete(self) -> bool:
        return self.finished == self.wanted

    @property
    def progress(self) -> str:
        """How far the run is, in chunks and video frames."""
        frames = (video_frames_of(latent) if latent else 0 for latent in (self.end, self.clean.shape[2]))
        return f"{self.finished} of {self.wanted} chunks: {' of '.join(map(str, frames))} frames"

    def update(self, event: StepEvent) -> None:
        frames = slice(event.start_frame, event.start_frame + event.x0.shape[2])
        self.clean[:, :, frames], self.noisy[:, :, frames] = event.x0, event.x

    def add(self, chunk: Chunk) -> None:
        """A chunk is finished, and its output begins."""
        self.finished, self.end, self.in_output = self.finished + 1, chunk.start_frame + chunk.latents.shape[2], chunk
        self.clean[:, :, chunk.start_frame : self.end] = chunk.latents

    def drop_output(self) -> None:
        """Give up the chunk whose output was interrupted, if any."""
        if self.in_output is not None:
            self.finished, self.end = self.finished - 1, self.in_output.start_frame

    def result(self) -> Tensor:
        return self.clean if self.end == self.clean.shape[2] else self.clean[:, :, : self.end].clone()
