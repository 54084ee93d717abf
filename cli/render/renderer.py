"""One model, loaded once, that renders videos: each whole or absent, and from where an earlier try ended."""

import gc
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ...lightforcing_core.attention.options import AttentionOptions
from ...lightforcing_core.checkpoint.load import load_dit_state_dict
from ...lightforcing_core.demo.captions import context_of_caption
from ...lightforcing_core.demo.model import FPS, SHIPPED, load_demo_model
from ...lightforcing_core.families import FAMILIES
from ...lightforcing_core.fast_path import one_line
from ...lightforcing_core.files.tensors import read_tensors
from ...lightforcing_core.files.video import VideoWriter
from ...lightforcing_core.model.wan import wan_from_state_dict
from ...lightforcing_core.parallel.shares import Exchange
from ...lightforcing_core.refusal import Refusal
from ...lightforcing_core.rollout.loop import rollout
from ...lightforcing_core.rollout.recipe import NoiseOptions, Recipe, few_step_sigmas
from ...lightforcing_core.rollout.runtime import Chunk, Runtime
from ...lightforcing_core.rollout.schedule import Schedule, latent_frames_of
from ...lightforcing_core.rollout.state import RunState, StateError, load_run_state, save_run_state
from ...lightforcing_core.rollout.text_embeds import load_embeds
from ...lightforcing_core.rollout.timeline import Prompt
from ...lightforcing_core.vae.streaming import StreamingDecoder
from ...lightforcing_core.vae.wan_vae import vae_from_state_dict
from .batch import Model
from .jobs import RenderJob
from .store import Store

# Called with the chunks that are done and all chunks, after each.
OnChunk = Callable[[int, int], object]
MOST_TRIES = 3  # that end a process before a chunk is finished


class JobFailed(ValueError):
    """A job that cannot be rendered. All ranks raise it at the same point."""


class Renderer:
    """A loaded model. exchange: the ranks that render each video together, each with a renderer of its own."""

    def __init__(self, model: Model, device: torch.device, exchange: Exchange | None = None) -> None:
        self.name, self.device, self.exchange = str(model), device, exchange
        self.size = {"height": 480, "width": 832, "length": 81}
        self.texts: dict[str, Tensor] | None = None
        if model.vae is None:
            demo = load_demo_model(SHIPPED if model.file is None else Path(model.file), device)
            self.dit, self.vae, self.texts, self.family = demo.dit, demo.vae, demo.table, FAMILIES["demo"]
            self.size = {"height": demo.video.height, "width": demo.video.width, "length": demo.video.frames}
            self.check = demo.video.check
        else:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            weights, info = load_dit_state_dict(str(model.file))
            self.family = info.family
            self.dit = wan_from_state_dict(weights, dtype=dtype, device=device)
            self.vae = vae_from_state_dict(read_tensors(Path(model.vae))[0], dtype=dtype, device=device)

    def recipe(self, job: RenderJob) -> Recipe:
        """The job's video. Raises ValueError for a prompt or numbers that this model cannot render."""
        height, width, length = (getattr(job, name) or size for name, size in self.size.items())
        family, sparse = self.family, self.family.sparse
        schedule = Schedule.of_family(family, latent_frames_of(length))
        if job.target is not None:
            schedule = replace(schedule, target=job.target, base=None) if job.target else schedule.dense()
        changes = [dict(change) for change in job.timeline]
        later = [Prompt(self._context(one.pop("text", None), one.pop("embeds", None)), **one) for one in changes]
        options: dict[str, Any] = {"estimator": sparse.estimator, "tail": sparse.tail, "policy": sparse.policy}
        frames = sparse.keep_frames, sparse.keep_sink, sparse.keep_near
        first = family.first_denoising_steps
        return Recipe(
            latent_shape=(1, 16, schedule.latent_frames, height // 8, width // 8),
            sigmas=few_step_sigmas(family.denoising_steps, family.shift),
            context=[Prompt(self._context(job.text, job.embeds)), *later],
            seed=job.seed,
            attention=AttentionOptions("auto", (sparse.block, sparse.block), *frames, **options),
            noise_options=NoiseOptions(first_sigmas=few_step_sigmas(first, family.shift) if first else None),
            **schedule.arguments(),
        )

    def _context(self, text: str | None, embeds: str | None) -> Tensor:
        dtype = self.dit.dtype
        if embeds is not None:
            context: Tensor = load_embeds(Path(embeds))[0][0]
            return context.to(dtype)
        if self.texts is None:
            raise ValueError(
                "a text needs the demo model; give embeds, a file of Light Forcing Save Text Embeds, or render a graph"
            )
        self.check(str(text))
        return context_of_caption(self.texts, str(text)).to(dtype)

    def attempt(self, job: RenderJob, store: Store, on_chunk: OnChunk = lambda done, total: None) -> dict[str, Any]:
        """What `render` returns, or an error that concerns this job alone, as {"error": …}."""
        try:
            return self.render(job, store, on_chunk)
        except JobFailed as error:
            return {"error": str(error)}
        except Exception as error:
            if self.exchange is not None:  # the other ranks wait for this one
                raise
            return {"error": str(error) if isinstance(error, ValueError) else one_line(error)}

    def render(self, job: RenderJob, store: Store, on_chunk: OnChunk = lambda done, total: None) -> dict[str, Any]:
        """Render one video into `store` unless it is there; with an exchange, rank 0 alone writes.

        Returns the names of its files, and how many chunks were made now and found. The finished chunks of a try that
        ended are kept as a run state, from which the next try continues with any number of ranks.
        """
        target, tries = f"{job.name}.mp4", f".{job.name}.tries"
        if store.has(target):
            return {"files": [store.path(target)], "made": 0, "found": 0}
        before = int(store.read(tries)) if store.has(tries) else 0
        if not self._agree(before < MOST_TRIES):
            self._remove(store, tries)
            problem = f"{MOST_TRIES} processes ended while they made one chunk of it"
            raise JobFailed(f"{problem}; render it by itself to see why")
        if self._writes:
            store.write(tries, b"%d" % (before + 1))
        try:
            made, found = self._render(job, store, target, tries, on_chunk)
        except BaseException as error:
            if self.exchange is None or isinstance(error, JobFailed | KeyboardInterrupt):
                self._remove(store, tries)
            raise
        self._remove(store, tries)
        return {"files": [store.path(target)], "made": made, "found": found}

    def _render(self, job: RenderJob, store: Store, target: str, tries: str, on_chunk: OnChunk) -> tuple[int, int]:
        kept = f".{job.name}.state.safetensors"
        with TemporaryDirectory() as folder, ExitStack() as at_end:
            state = self._state(job, store, kept, Path(folder))
            found, total = len(state.finished), len(state.recipe.chunk_lengths())
            path, decoder, video = Path(folder) / target, StreamingDecoder(self.vae), None
            if self._writes:
                _, _, _, height, width = state.recipe.latent_shape
                video = at_end.enter_context(VideoWriter(path, height=8 * height, width=8 * width, fps=FPS))
                for latents in state.finished:
                    video.write(decoder.decode(latents.to(self.device))[0])
            for chunk in at_end.enter_context(closing(self._chunks(state))):
                state = state.extended_by(chunk)
                if video is not None:
                    if len(state.finished) == found + 1:
                        store.remove(tries)
                    store.put(save_run_state(state, Path(folder) / "state.safetensors"), kept)
                    video.write(decoder.decode(chunk.latents)[0])
                on_chunk(len(state.finished), total)
            at_end.close()
            if self._writes:
                store.put(path, target)
                store.remove(kept)
        gc.collect()  # what a failed fast path keeps in cycles is memory of the next video
        return total - found, found

    def _chunks(self, state: RunState) -> Generator[Chunk, None, None]:
        """The chunks that are missing; JobFailed for what all ranks refuse."""
        runtime = Runtime(device=self.device, exchange=self.exchange)
        if state.is_complete:
            return
        try:
            yield from rollout(self.dit, state.recipe, runtime, state.finished, state.begun)
        except Refusal as error:
            raise JobFailed(str(error)) from error

    @property
    def _writes(self) -> bool:
        return self.exchange is None or self.exchange.rank == 0

    def _agree(self, yes: bool) -> bool:
        return yes if self.exchange is None else self.exchange.agree(yes)

    def _remove(self, store: Store, name: str) -> None:
        if self._writes:
            store.remove(name)

    def _state(self, job: RenderJob, store: Store, name: str, folder: Path) -> RunState:
        """The run as far as an earlier try came, or a new one if any rank cannot use it; JobFailed for a bad job."""
        found, fresh, problem = None, None, ""
        try:
            model = job.digest(self.name)
            fresh = RunState(self.recipe(job), model)
            if store.has(name):
                found = load_run_state(store.get(name, folder / "found.safetensors"))
                found.check_model(model)
        except StateError:
            found = None
        except (ValueError, OSError) as error:
            problem = str(error)
        if not self._agree(not problem):
            raise JobFailed(problem or "another rank cannot read its prompt")
        assert fresh is not None
        return found if self._agree(found is not None) and found is not None else fresh
