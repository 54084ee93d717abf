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
        """Names and sizes of the files, by which a batch knows its model; they may be moved."""
        return " and ".join(map(_named, filter(None, self))) or "the demo model"


def claim(jobs: Sequence[RenderJob], model: Model, out: str) -> None:
    """Note in `out` what each job is, so that no other batch takes its name.

    Raises UsageError if a name belongs to another prompt, other options or another model.
    """
    store, digests, known = Store(out), {job.name: job.digest(str(model)) for job in jobs}, dict[str, Any]()
    if store.has(BATCH):
        try:
            known = dict(mapping(read_json(store.read(BATCH).decode())))
        except ValueError as error:
            raise UsageError(f"{store.path(BATCH)} is damaged ({error}); choose another --out") from error
    for name, digest in digests.items():
        if known.get(name, digest) != digest:
            other = f"{name} of another batch: its prompt, its options or its model differ"
            raise UsageError(f"{out} holds {other}; choose another --out")
    store.write(BATCH, json.dumps(known | digests, indent=1).encode())


class Batch:
    """The jobs that have no video in `out` yet, and the events about them."""

    def __init__(self, jobs: Sequence[RenderJob], out: str, display: Display) -> None:
        self.display, self.store = display, Store(out)
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


def _named(file: str) -> str:
    path = Path(file)
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return f"{path.name} ({sum(one.stat().st_size for one in files)} bytes)"


def start_batch(jobs: Sequence[RenderJob], out: str, *, json: bool) -> Batch:
    """A batch whose events this process shows, until its `summary`."""
    display = Display(complain, single=len(jobs) == 1, json=json)
    batch = Batch(jobs, out, display)
    display.progress.start()
    return batch
