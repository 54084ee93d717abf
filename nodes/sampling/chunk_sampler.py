"""The chunk sampler behind both sampling nodes: the host's guider runs the model, our rollout says what to run."""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
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

from ...lightforcing_core.attention.dispatch import AttentionOptions
from ...lightforcing_core.families import Family
from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.model.causal import Pass
from ...lightforcing_core.model.kv_storage import KVOptions
from ...lightforcing_core.rollout.record import RunRecord, RunRecorder
from ...lightforcing_core.rollout.rollout import Chunk, Noise, Replay, StepEvent, few_step_sigmas, rollout, seeded_noise
from ...lightforcing_core.rollout.schedule import Schedule, video_frames_of
from ...lightforcing_core.rollout.state import RunState, resume_arguments
from ..comfy import is_out_of_memory
from ..decode import FrameDecoder
from ..model.patch import KEY, RUN, conflicting_patch, settings_of
from ..timeline import PromptChange, prompts_of
from .memory import plan_of
from .refusals import (
    memory_advice,
    unsuitable_end,
    unsuitable_guider,
    unsuitable_latents,
    unsuitable_sigmas,
)

log = logging.getLogger(__name__)


class ChunkSampler(comfy.samplers.Sampler):
    """The autoregressive rollout as a host SAMPLER; the guider's cfg and negative prompt are followed.

    schedule: None takes the defaults of the model's family. initial_latents: [B or 1, 16, frames, h, w] in the
    VAE's space, what the video starts with; last_latents: what it ends with. timeline: prompts that take over later.
    chunk_seeds: chunk index → seed of its own. replay, context_noise: as in `rollout`. run: a saved run to go on
    with; it decides everything but the model, and the arguments above are not read.

    on_state: called with the run's state after each finished chunk, before on_chunk with the chunk (normalised
    latents), the steps done and the steps in all. decoder: what decodes finished chunks; it is cut into tiles where
    memory is short. kv: how the KV cache is kept, None chooses. on_plan: called with the plan before anything is
    loaded. on_step: called after each denoising step, before the host's callback.
    fresh_noise: where the noise after each denoising step comes from, see `rollout`; default the run's seed.
    keep_finished: when the run is interrupted or memory runs out behind the first finished chunk, the chunks so far
    are the result, and on_cut is called with the reason.

    `record` holds what the last run did, once it has ended.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        initial_latents: Tensor | None = None,
        last_latents: Tensor | None = None,
        timeline: Sequence[PromptChange] = (),
        chunk_seeds: Mapping[int, int] | None = None,
        replay: Replay = "all",
        context_noise: float = 0.0,
        run: RunState | None = None,
        on_state: Callable[[RunState], object] | None = None,
        on_chunk: Callable[[Chunk, int, int], None] | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        decoder: FrameDecoder | None = None,
        kv: KVOptions | None = None,
        on_plan: Callable[[MemoryPlan], object] | None = None,
        fresh_noise: Noise | None = None,
        keep_finished: bool = False,
        on_cut: Callable[[str], None] | None = None,
    ) -> None:
        self.schedule, self.initial_latents, self.timeline = schedule, initial_latents, timeline
        self.last_latents = last_latents
        self.chunk_seeds, self.replay, self.run = dict(chunk_seeds or {}), replay, run
        self.context_noise = context_noise
        self.on_state, self.on_chunk, self.fresh_noise = on_state, on_chunk, fresh_noise
        self.decoder, self.kv, self.on_plan = decoder, kv, on_plan
        self.plan: MemoryPlan | None = None
        self.record: RunRecord | None = None
        self.keep_finished, self.on_cut, self.on_step = keep_finished, on_cut, on_step

    def light_forcing_prepare(
        self, guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor, denoise_mask: Any = None, *_, **__
    ) -> None:
        """Check everything before weights are loaded, and add the KV cache to the run's memory request."""
        reason = (
            conflicting_patch(guider.model_patcher, guider.model_options)
            or unsuitable_guider(guider)
            or unsuitable_latents(latent_image, self.initial_latents)
            or unsuitable_sigmas(sigmas)
        )
        if denoise_mask is not None:
            reason = "the latent carries a noise mask, which a rollout cannot follow; remove Set Latent Noise Mask"
        if reason:
            raise ValueError(reason)
        run, base = self._run(guider, sigmas, noise.shape, 0), guider.model_patcher.model
        run.check_model(model_text(guider.model_patcher))
        self.plan = plan = plan_of(guider.model_patcher, run, self.kv, self.decoder, saved=self.run is not None)
        log.info("[Light Forcing] %s", plan)
        if self.decoder is not None:
            self.decoder.cut(plan.decode_tiles, beside=plan.overlap)
        if self.on_plan is not None:
            self.on_plan(plan)
        needed, longest = plan.estimate, max(run.chunk_lengths())

        def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
            # The host's estimate grows linearly with the frames of its argument: speak in that unit.
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
            raise ValueError(
                "this MODEL carries no Light Forcing patch; load it with Light Forcing Model Loader or put "
                "Light Forcing Apply between its loader and the guider"
            )
        plan = self.plan
        assert plan is not None  # the patch's OUTER_SAMPLE wrapper has called light_forcing_prepare
        run = self._run(model_wrap, sigmas, noise.shape, extra_args.get("seed") or 0)
        run = replace(run, kv_dtype=plan.kv.dtype)
        lengths, end = run.chunk_lengths(), run.finished_frames
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        home = noise.device if plan.latents_on_device else torch.device("cpu")
        video, noisy = torch.zeros_like(noise, device=home), noise.to(home, copy=True)
        past = run.latents
        if past is not None:
            video[:, :, :end] = past
        fresh = self.fresh_noise or seeded_noise(run.seed, run.chunk_seeds)
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
            chunks = rollout(
                inner.diffusion_model,
                **{**resume_arguments(run, replay=self.replay), "noise": draw, "kv": plan.kv},
                denoise=denoise,
                dense_attention=_host_attention,
                on_step=on_step,
                recorder=recorder,
                cuda_graph="auto" if plan.cuda_graph else "off",
                dtype=inner.get_dtype_inference(),
                device=noise.device,
            )
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
            recipe = self._recipe()
            log.info("[Light Forcing] %s, %d of %d chunks in %.1f s", recipe, at.finished, at.wanted, seconds)
        self.record = recorder.finish(frames=at.end)
        return video

    def _recipe(self) -> str:
        return "saved run" if self.run else self.schedule.title if self.schedule else "the family's schedule"

    def _facts(self, model: ModelPatcher, run: RunState, plan: MemoryPlan) -> dict[str, str]:
        """What a report says of the run besides its record."""
        settings = settings_of(model)
        batch, _, frames, height, width = run.latent_shape
        videos = "" if batch == 1 else f"{batch} videos of "
        sinks = f", {run.sink_frames} of them sinks" if run.sink_frames else ""
        return {
            "model": f"{settings.family.title if settings else 'unknown'}, {run.model}",
            "video": f"{videos}{video_frames_of(frames)} frames ({frames} latent) at {8 * width}×{8 * height}",
            "schedule": self._recipe(),
            "sees": "everything" if run.window is None else f"{run.window} latent frames{sinks}",
            "seed": str(run.seed),
            "memory": str(plan.kv),
        }

    def _accept_end(self, error: BaseException, at: "_Progress", run: RunState, plan: MemoryPlan) -> None:
        """Return when the finished chunks shall be the result; else raise what the host shall see."""
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
            advice = memory_advice(run, plan, decoding=decoding)
            reason = f"out of memory while {'decoding' if decoding else 'sampling'} a chunk, after {made}; {advice}"
        if not (self.keep_finished and at.finished):
            raise error if interrupted else comfy.model_management.OOM_EXCEPTION(reason) from error
        log.warning("[Light Forcing] %s", reason)
        if self.on_cut is not None:
            self.on_cut(reason)

    def _run(self, guider: Any, sigmas: Tensor, shape: Sequence[int], seed: int) -> RunState:
        """All that decides the video: the saved run, or the one that the inputs ask for. Raises ValueError."""
        if self.run is not None:
            return self.run
        model = guider.model_patcher
        settings = settings_of(model)
        family = settings.family if settings else None
        schedule = self._schedule(family, shape)
        start = 0 if self.initial_latents is None else self.initial_latents.shape[2]
        if self.last_latents is not None and (reason := unsuitable_end(self.last_latents, shape, schedule, start)):
            raise ValueError(reason)
        given, end = (
            latents if latents is None else model.model.process_latent_in(latents.to("cpu", torch.float32))
            for latents in (self.initial_latents, self.last_latents)
        )
        growth, last = schedule.sparsities(start), len(schedule.chunk_lengths(start)) - 1
        if beyond := [chunk for chunk in self.chunk_seeds if chunk > last]:
            raise ValueError(f"chunk_seeds names chunk {beyond[0]}; this video has chunks 0 to {last}")
        text = guider.conds["positive"][0]["cross_attn"]
        negative = guider.conds["negative"][0]["cross_attn"] if guider.cfg != 1.0 else None
        return RunState(
            model=model_text(model),
            latent_shape=tuple(shape),  # type: ignore[arg-type]
            frames_per_chunk=schedule.frames_per_chunk,
            sigmas=tuple(sigmas.tolist()),
            first_sigmas=first_levels(family, sigmas.tolist()),
            prompts=tuple(prompts_of(text, self.timeline, schedule.chunk_lengths(start))),
            growth=None if growth is None else tuple(growth),
            window=schedule.window,
            sink_frames=schedule.sink_frames,
            sink_rope=schedule.sink_rope,
            seed=seed,
            chunk_seeds=self.chunk_seeds,
            context_noise=self.context_noise,
            cfg=guider.cfg,
            negative=negative,
            attention=settings.attention if settings else AttentionOptions(),
            given=given,
            last_latents=end,
        )

    def _schedule(self, family: Family | None, shape: Sequence[int]) -> Schedule:
        """The run's schedule; ValueError when it is for another length or another kind of checkpoint."""
        schedule = self.schedule
        if schedule is None:
            assert family is not None
            return Schedule.of_family(family, shape[2])
        if schedule.latent_frames != shape[2]:
            raise ValueError(
                f"the schedule is for {video_frames_of(schedule.latent_frames)} video frames "
                f"({schedule.latent_frames} latent) but the latent holds {video_frames_of(shape[2])} ({shape[2]}); "
                f"feed both from one length"
            )
        if family and family.id != "unknown" and family.frames_per_chunk != schedule.frames_per_chunk:
            raise ValueError(
                f"the schedule's chunks of {schedule.frames_per_chunk} latent frames do not match the checkpoint: "
                f"{family.title} was trained on chunks of {family.frames_per_chunk}; set frames_per_chunk to that, or "
                f"the model's family to unknown"
            )
        return schedule


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


def model_text(model: ModelPatcher) -> str:
    """What tells a MODEL from another: its sizes, a checksum of some weights, and one of the LoRAs on it."""
    dit = model.get_model_object("diffusion_model")
    some = (dit.head.modulation, dit.blocks[0].modulation, dit.blocks[-1].modulation)
    weights = b"".join(part.detach().to("cpu", torch.float32).numpy().tobytes() for part in some)
    text = f"Wan 2.1, {dit.dim} wide, {len(dit.blocks)} layers, weights {zlib.crc32(weights):08x}"
    if model.patches:
        loras = sorted((str(key), [patch[0] for patch in patches]) for key, patches in model.patches.items())
        text += f", LoRA {zlib.crc32(repr(loras).encode()):08x}"
    return text


def first_levels(family: Family | None, levels: Sequence[float]) -> tuple[float, ...] | None:
    """Noise levels of the first chunk where the family has its own and `levels` are the family's, else None."""
    if family is None or family.first_denoising_steps is None:
        return None
    usual = few_step_sigmas(family.denoising_steps, family.shift)
    same = len(usual) == len(levels) and all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-3), usual, levels))
    if not same:
        return None
    # In float32, as the host's own lists are.
    return tuple(torch.tensor(few_step_sigmas(family.first_denoising_steps, family.shift)).tolist())


def _host_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The host's own dense attention over [B, L, H, D]."""
    heads = q.shape[2]
    mixed = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=heads)
    return mixed.unflatten(-1, (heads, -1))
