"""A batch of videos: what is still to be rendered, and what became of it."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...lightforcing_core.files.json import mapping, read_json
from ..queue.command import complain
from ..queue.display import Display
from ..queue.prompt import UsageError
from .jobs import RenderJob
from .store import Store

BATCH = "render.json"  # the digest of each job, by its name


class Model(NamedTuple):
    """The files that make videos: a checkpoint and its VAE, or a demo model's folder, None for the shipped one."""

    file: str | None = None
    vae: str | None = None

    def __str__(self) -> str:
        """What says that a video was made by it; a moved file stays the same."""
        return " and ".join(Path(file).name for file in self if file) or "the demo model"


class Batch:
    """The jobs that have no video in `out` yet, and the events about them.

    Raises UsageError if a name in `out` belongs to another prompt, other options or another model.
    """

    def __init__(self, jobs: Sequence[RenderJob], model: Model, out: str, display: Display) -> None:
        self.display, self.store = display, Store(out)
        digests, known = {job.name: job.digest(str(model)) for job in jobs}, dict[str, Any]()
        if self.store.has(BATCH):
            try:
                known = dict(mapping(read_json(self.store.read(BATCH).decode())))
            except ValueError as error:
                raise UsageError(f"{self.store.path(BATCH)} is damaged ({error}); choose another --out") from error
        for name, digest in digests.items():
            if known.get(name, digest) != digest:
                other = f"{name} of another batch: its prompt, its options or its model differ"
                raise UsageError(f"{out} holds {other}; choose another --out")
        self.store.write(BATCH, json.dumps(known | digests, indent=1).encode())
        self.todo = [job for job in jobs if not self.store.has(f"{job.name}.mp4")]
        self._start, self._all, self._failed = time.monotonic(), len(jobs), 0
        self._done = self._all - len(self.todo)
        display("batch", prompts=self._all, done=self._done, servers=0, journal=self.store.path(BATCH))

    def progress(self, name: str, done: int, total: int) -> None:
        self.display("progress", prompt=name, node="chunk", value=done, total=total, nodes_done=0, nodes=1)

    def ended(self, name: str, result: Mapping[str, Any]) -> None:
        """Note the end of a job: `files`, `made` and `found` as of `Renderer.render`, or an `error`."""
        if "error" in result:
            self._failed += 1
            self.display("failed", prompt=name, message=result["error"])
        else:
            self._done += 1
            self.display("finished", prompt=name, left_out=[], **result)

    def summary(self) -> bool:
        """Show the end of the batch; whether all is done."""
        left, seconds = self._all - self._done - self._failed, round(time.monotonic() - self._start, 1)
        self.display.progress.stop()
        self.display("summary", prompts=self._all, done=self._done, failed=self._failed, left=left, seconds=seconds)
        return self._done == self._all


def start_batch(jobs: Sequence[RenderJob], model: Model, out: str, *, json: bool) -> Batch:
    """A batch whose events this process shows, until its `summary`."""
    display = Display(complain, single=len(jobs) == 1, json=json)
    batch = Batch(jobs, model, out, display)
    display.progress.start()
    return batch
