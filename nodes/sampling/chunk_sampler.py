"""The chunk sampler behind both sampling nodes: our rollout decides the passes, ComfyUI's guider runs each."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from tqdm.auto import tqdm

from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.model.causal import Pass
from ...lightforcing_core.model.kv_storage import KVOptions
from ...lightforcing_core.rollout.loop import rollout
from ...lightforcing_core.rollout.recipe import Noise
from ...lightforcing_core.rollout.record import RunRecord, RunRecorder
from ...lightforcing_core.rollout.runtime import Chunk, Replay, Runtime, StepEvent
from ...lightforcing_core.rollout.schedule import video_frames_of
from ...lightforcing_core.rollout.state import RunState
from ..comfy import is_out_of_memory
from ..decode import FrameDecoder
from ..model.patch import KEY, RUN, conflicting_patch, settings_of
from .memory import plan_of
from .refusals import memory_advice, unsuitable_guider, unsuitable_latents, unsuitable_sigmas
from .request import Request, model_text, named_for_the_canvas

NO_PATCH = (
    "this MODEL carries no Light Forcing patch; load it with Light Forcing Model Loader or put Light Forcing Apply "
    "behind its loader"
)
log = logging.getLogger(__name__)


class ChunkSampler(comfy.samplers.Sampler):
    """The autoregressive rollout as a ComfyUI SAMPLER; the guider's cfg and negative prompt are followed.

    wanted: the inputs of the node, or a saved run to go on with, which decides everything but the model.
    replay: as in `Runtime`.
    kv: how the KV cache is kept; None chooses.
    decoder: decodes finished chunks; it is cut into tiles if memory is short.
    fresh_noise: the noise after each denoising step, as `Runtime.noise`; None takes the run's own.
    keep_finished: when the run is interrupted or memory runs out after the first finished chunk, the chunks so far
        are the result.
    on_plan: called with the memory plan before anything is loaded.
    on_step: called after each denoising step, before ComfyUI's callback.
    on_state: called with the run's state after each finished chunk.
    on_chunk: called then with the chunk (normalised latents), the steps done and the steps in all.
    on_cut: called with the reason if the run ends early.

    `record` is the record of the last run, once it has ended.
    """

    def __init__(
        self,
        wanted: Request | RunState | None = None,
        *,
        replay: Replay = "all",
        kv: KVOptions | None = None,
        decoder: FrameDecoder | None = None,
        fresh_noise: Noise | None = None,
        keep_finished: bool = False,
        on_plan: Callable[[MemoryPlan], object] | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        on_state: Callable[[RunState], object] | None = None,
        on_chunk: Callable[[Chunk, int, int], None] | None = None,
        on_cut: Callable[[str], None] | None = None,
    ) -> None:
        self.wanted, self.replay, self.kv = wanted or Request(), replay, kv
        self.decoder, self.fresh_noise, self.keep_finished = decoder, fresh_noise, keep_finished
        self.on_plan, self.on_step, self.on_state = on_plan, on_step, on_state
        self.on_chunk, self.on_cut = on_chunk, on_cut
        self.record: RunRecord | None = None
        self._prepared: tuple[RunState, MemoryPlan] | None = None

    def light_forcing_prepare(
        self,
        guider: Any,
        noise: Tensor,
        latent_image: Tensor,
        sigmas: Tensor,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **_: Any,
    ) -> None:
        """Check everything before weights are loaded, and add the KV cache to the run's memory request."""
        with named_for_the_canvas():
            reason = (
                conflicting_patch(guider.model_patcher, guider.model_options)
                or unsuitable_guider(guider)
                or unsuitable_latents(latent_image)
                or unsuitable_sigmas(sigmas)
            )
            if denoise_mask is not None:
                reason = "the latent carries a noise mask, which a rollout cannot follow; remove Set Latent Noise Mask"
            if reason:
                raise ValueError(reason)
            run = self._run(guider, sigmas, noise.shape, seed or 0)
        is_saved = isinstance(self.wanted, RunState)
        plan = plan_of(guider.model_patcher, run, self.kv, self.decoder, saved=is_saved)
        self._prepared = replace(run, kv_dtype=plan.kv.dtype), plan
        log.info("[Light Forcing] %s", plan)
        if self.decoder is not None:
            self.decoder.cut(plan.decode_tiles, beside=plan.overlap)
        if self.on_plan is not None:
            self.on_plan(plan)
        base, needed, longest = guider.model_patcher.model, plan.estimate, max(run.recipe.chunk_lengths())

        def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
            # ComfyUI's estimate grows linearly with the frames of its argument: speak in that unit.
            one_frame = base.memory_required([*noise_shape[:2], 1, *noise_shape[3:]])
            # It asks for the weights by itself, and its own estimate of a step holds the prompt.
            held = replace(needed, weights=0, vae=0, prompt=0, step=longest * one_frame).total
            frames = held / max(one_frame, 1)
            return executor(model, [*noise_shape[:2], -int(-frames // 1), *noise_shape[3:]], conds, *args, **kwargs)

        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare_sampling, guider.model_options, True)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The whole video [B, 16, frames, h, w] in the model's space; draw 0 comes from `noise`.

        A run that was cut short gives fewer frames.
        """
        inner = model_wrap.inner_model
        if settings_of(model_wrap.model_patcher) is None:
            raise ValueError(NO_PATCH)
        assert self._prepared is not None  # the patch's OUTER_SAMPLE wrapper has called light_forcing_prepare
        run, plan = self._prepared
        recipe, end = run.recipe, run.finished_frames
        lengths = recipe.chunk_lengths()
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        home = noise.device if plan.latents_on_device else torch.device("cpu")
        video, noisy = torch.zeros_like(noise, device=home), noise.to(home, copy=True)
        past = run.latents
        if past is not None:
            video[:, :, :end] = past
        fresh = self.fresh_noise or recipe.noise()
        options = extra_args["model_options"]["transformer_options"]
        guidance, model_wrap.cfg = model_wrap.cfg, 1.0  # each call is for one prompt; the rollout mixes them
        at = _Progress(wanted=sum(start >= end for start in starts), frames=noise.shape[2], end=end)
        begun = time.perf_counter()

        def draw(index: int, number: int, shape: tuple[int, ...]) -> Tensor:
            return fresh(index, number, shape) if number else noise[:, :, starts[index] : starts[index] + shape[2]]

        def denoise(x: Tensor, sigma: float, model_pass: Pass) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            options[RUN] = model_pass
            return model_wrap(x, x.new_full((x.shape[0],), sigma), **extra_args)

        def on_step(event: StepEvent) -> None:
            frames = slice(event.start_frame, event.start_frame + event.x0.shape[2])
            video[:, :, frames], noisy[:, :, frames] = event.x0, event.x
            at.done, at.total = event.done, event.total
            bar.total = event.total
            bar.update()
            if self.on_step is not None:
                self.on_step(event)
            if callback is not None:
                callback(event.done - 1, video.clone(), noisy, event.total)

        bar = tqdm(disable=disable_pbar, desc="Light Forcing")
        recorder = RunRecorder(self._facts(model_wrap.model_patcher, run, plan))
        try:
            runtime = Runtime(
                device=noise.device,
                dtype=inner.get_dtype_inference(),
                kv=plan.kv,
                dense_attention=_comfy_attention,
                noise=draw,
                denoise=denoise,
                replay=self.replay,
                on_step=on_step,
                recorder=recorder,
                cuda_graph="auto" if plan.cuda_graph else "off",
            )
            chunks = rollout(inner.diffusion_model, recipe, runtime, run.finished)
            with contextlib.closing(chunks):
                for chunk in chunks:
                    at.begin_output(chunk)
                    video[:, :, chunk.start_frame : at.end] = chunk.latents
                    if self.on_state is not None:
                        run = run.extended_by(chunk)
                        self.on_state(run)
                    if self.on_chunk is not None:
                        self.on_chunk(chunk, at.done, at.total)
                    at.in_output = None
        except (comfy.model_management.InterruptProcessingException, Exception) as error:
            self._accept_end(error, at, run, plan)
            video = video[:, :, : at.end].clone()
        finally:
            model_wrap.cfg = guidance
            options.pop(RUN, None)
            bar.close()
            seconds = time.perf_counter() - begun
            log.info("[Light Forcing] %s, %d of %d chunks in %.1f s", self._title, at.finished, at.wanted, seconds)
        self.record = recorder.finish(frames=at.end)
        return video

    @property
    def _title(self) -> str:
        return "saved run" if isinstance(self.wanted, RunState) else self.wanted.title

    def _facts(self, model: ModelPatcher, run: RunState, plan: MemoryPlan) -> dict[str, str]:
        """The facts that a report states in addition to the run's record."""
        settings, recipe = settings_of(model), run.recipe
        batch, _, frames, height, width = recipe.latent_shape
        videos = "" if batch == 1 else f"{batch} videos of "
        sinks = f", {recipe.sink_frames} of them sinks" if recipe.sink_frames else ""
        return {
            "model": f"{settings.family.title if settings else 'unknown'}, {run.model}",
            "video": f"{videos}{video_frames_of(frames)} frames ({frames} latent) at {8 * width}×{8 * height}",
            "schedule": self._title,
            "sees": "everything" if recipe.window is None else f"{recipe.window} latent frames{sinks}",
            "seed": str(recipe.seed),
            "memory": str(plan.kv),
        }

    def _accept_end(self, error: BaseException, at: "_Progress", run: RunState, plan: MemoryPlan) -> None:
        """Return if the finished chunks are the result; else raise the error for ComfyUI."""
        interrupted = isinstance(error, comfy.model_management.InterruptProcessingException)
        if interrupted and at.in_output:  # so that LATENT and frames end together
            at.finished, at.end = at.finished - 1, at.in_output.start_frame
        if not interrupted and not is_out_of_memory(error):
            raise error
        made = (
            f"{at.finished} of {at.wanted} chunks: {video_frames_of(at.end) if at.end else 0} of "
            f"{video_frames_of(at.frames)} frames"
        )
        reason = f"cancelled after {made}"
        if not interrupted:
            decoding = at.in_output is not None
            advice = memory_advice(run.recipe, plan, decoding=decoding)
            reason = f"out of memory while {'decoding' if decoding else 'sampling'} a chunk, after {made}; {advice}"
        if not (self.keep_finished and at.finished):
            raise error if interrupted else comfy.model_management.OOM_EXCEPTION(reason) from error
        log.warning("[Light Forcing] %s", reason)
        if self.on_cut is not None:
            self.on_cut(reason)

    def _run(self, guider: Any, sigmas: Tensor, shape: Sequence[int], seed: int) -> RunState:
        """The saved run, or a new one from the inputs. Raises ValueError."""
        model = guider.model_patcher
        if isinstance(self.wanted, RunState):
            self.wanted.check_model(model_text(model))
            return self.wanted
        settings = settings_of(model)
        if settings is None:
            raise ValueError(NO_PATCH)
        return RunState(self.wanted.recipe(guider, settings, sigmas.tolist(), shape, seed), model_text(model))


@dataclass
class _Progress:
    """How far a run is: chunks `finished` of `wanted`, latent frames up to `end` of `frames`, steps `done` of `total`.

    in_output: the chunk that is being saved and decoded, if any.
    """

    wanted: int
    frames: int
    end: int
    finished: int = 0
    done: int = 0
    total: int = 0
    in_output: Chunk | None = None

    def begin_output(self, chunk: Chunk) -> None:
        """The next chunk's latents are there."""
        self.finished, self.end, self.in_output = self.finished + 1, chunk.start_frame + chunk.latents.shape[2], chunk


def _comfy_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ComfyUI's own dense attention over [B, L, H, D]."""
    heads = q.shape[2]
    mixed = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=heads)
    return mixed.unflatten(-1, (heads, -1))
