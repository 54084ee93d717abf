"""Observers of a run: the interface by which the chunk sampler reports progress, and two small observers."""

from collections import Counter
from pathlib import Path

from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.rollout.runtime import Chunk, StepEvent
from ...lightforcing_core.rollout.state import RunState, save_run_state

# How many runs of each node were cut short. ComfyUI compares the number as the node's fingerprint: it caches the result
# of such a run like any other, but must not return it when the graph is queued again.
runs_cut_short: Counter[str | None] = Counter()


class Observer:
    """Receives the events of a run; the methods do nothing unless overridden."""

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        """The run is checked and its memory planned; nothing has been loaded yet."""

    def step(self, event: StepEvent) -> None:
        """A denoising step is done."""

    def chunk(self, chunk: Chunk, *, is_last: bool) -> None:
        """A chunk is finished, with normalised latents."""

    def cut(self, reason: str) -> None:
        """The run ended early, and its finished chunks are the result."""


class StateWriter(Observer):
    """Writes the state of a run to a file after every chunk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        self._run = run

    def chunk(self, chunk: Chunk, *, is_last: bool) -> None:
        self._run = self._run.extended_by(chunk)
        save_run_state(self._run, self._path)


class CutShort(Observer):
    """Remembers why a node's run ended early, so that it runs again when queued."""

    def __init__(self, node_id: str | None) -> None:
        self._node_id = node_id
        self.reason: str | None = None

    def cut(self, reason: str) -> None:
        self.reason = reason
        runs_cut_short[self._node_id] += 1
