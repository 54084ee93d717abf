"""Observers of a run: the interface by which the chunk sampler reports progress, and the small ones."""

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.rollout.recipe import Recipe
from ...lightforcing_core.rollout.runtime import Chunk, StepEvent
from ...lightforcing_core.rollout.schedule import video_frames_of
from ...lightforcing_core.rollout.state import RunState, save_run_state
from ..comfy import show_text

LINE_PAUSE = 0.2  # seconds between lines
# How many runs of each node were cut short or directed by a client. ComfyUI compares the number as the node's
# fingerprint: it caches the result of such a run like any other, but must not return it when the graph is queued again.
runs_off_plan: Counter[str | None] = Counter()


class Observer:
    """Receives the events of a run; the methods do nothing unless overridden."""

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        """The run is checked and its memory planned; nothing has been loaded yet."""

    def step(self, event: StepEvent) -> None:
        """A denoising step is done."""

    def chunk(self, chunk: Chunk, *, is_last: bool) -> None:
        """A chunk is finished, with normalised latents."""

    def directed(self, recipe: Recipe, said: str) -> None:
        """A client has changed the prompts: the recipe from now on, and the change or its failure in words."""

    def cut(self, reason: str) -> None:
        """The run ended early, and its finished chunks are the result."""


class StateWriter(Observer):
    """Writes the state of a run to a file after every chunk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        self._run = run

    def directed(self, recipe: Recipe, said: str) -> None:
        self._run = replace(self._run, recipe=recipe)

    def chunk(self, chunk: Chunk, *, is_last: bool) -> None:
        self._run = self._run.extended_by(chunk)
        save_run_state(self._run, self._path)


class ProgressLine(Observer):
    """The line on the running node: chunk, density, pace and time left; with notes, and the plan as details.

    why_dense: why attention runs dense although sparsity was asked for, once that is known.
    warning: what the start image will probably do, if it is too short for the model.
    why_cut: why the run ended early, if it did; it then runs again when queued.
    changes: the prompts that clients gave meanwhile, in words; such a run, too, runs again.
    """

    def __init__(self, node_id: str | None) -> None:
        self._node_id, self._plan, self._pace, self._left = node_id, "", "", ""
        self.why_dense: str | None = None
        self.warning: str | None = None
        self.why_cut: str | None = None
        self.changes: list[str] = []
        self._shown = self._begun = 0.0
        self._last: StepEvent | None = None

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        self._plan, many = str(plan), run.recipe.frames_per_chunk
        if run.recipe.initial_frames == 1 < many:
            fault = (
                f"one start image fills 1 of the {many} latent frames that this model makes at a time, and may dissolve"
            )
            self.warning = f"{fault}; repeat the image {video_frames_of(many)} times, or use a frame-wise checkpoint"
        self._show("loading the model")

    def step(self, event: StepEvent) -> None:
        now, self._last = time.perf_counter(), event
        if event.no_backend and self.why_dense is None:
            self.why_dense = f"dense attention: {event.no_backend}"
        if event.done == 1:
            self._shown, self._begun, self._pace, self._left = -math.inf, now, "", ""
        elif event.step == 0:
            pace = (now - self._begun) / event.chunk
            left = (now - self._begun) / (event.done - 1) * (event.total - event.done + 1)
            self._pace = f" · {pace:.1f} s per chunk"
            self._left = f" · {left:.0f} s left" if left < 100 else f" · {left / 60:.0f} min left"
        if now - self._shown >= LINE_PAUSE:
            self._shown = now
            density = "decided by the keys" if event.density is None else f"{100 * event.density:.0f} %"
            chunk = f"chunk {event.chunk + 1}/{event.chunks}"
            self._show(f"{chunk} · density {density}{self._pace}{self._left}", f"step {event.step + 1}/{event.steps}")

    def directed(self, recipe: Recipe, said: str) -> None:
        self.changes.append(said)
        runs_off_plan[self._node_id] += 1

    def cut(self, reason: str) -> None:
        self.why_cut = reason
        runs_off_plan[self._node_id] += 1

    def end(self) -> None:
        if self.why_cut:
            self._show(self.why_cut)
        elif self._last is not None:
            self._show(f"{self._last.chunk + 1} of {self._last.chunks} chunks{self._pace} · done")

    def _show(self, line: str, step: str = "") -> None:
        notes = [note for note in (self.why_dense, self.warning, *self.changes[-1:]) if note]
        show_text(line, notes, "\n".join(filter(None, (step, self._plan))))
