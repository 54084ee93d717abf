"""A batch on one server: run all jobs that the ledger does not list as done, one after another.

Each job's files appear as one folder, renamed into place when complete: after a crash it is complete or absent.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...lightforcing_core.files.output import prepare_folder
from .jobs import Job
from .ledger import Ledger, partial_folder
from .prompt import UsageError
from .run import Run, RunVanished, output_files
from .server import ComfyServer, QueueError, RemoteFile, ServerUnreachable

MOST_LOSSES = 3  # a prompt that was lost with the server this often may have crashed it


@dataclass
class Batch:
    """Jobs to run on a server.

    emit: called as emit(kind, **fields) for every event.
    out: folder for the results; with `resumable` it holds a folder for each job, and the ledger.
    timeout: seconds after which a prompt is cancelled, None for no limit.
    temp: fetch the files of preview nodes too.
    previews: folder for the pictures that the server sends while it samples, None to drop them.
    """

    jobs: Sequence[Job]
    server: ComfyServer
    emit: Callable[..., None]
    out: Path
    resumable: bool = True
    timeout: float | None = None
    temp: bool = False
    previews: Path | None = None
    _ledger: Ledger = field(init=False)

    def run(self) -> bool:
        """Run every job that is not done; returns whether all are done. Ends early if the server is lost.

        Raises UsageError before anything is sent. On KeyboardInterrupt, or any other error that ends the batch, the
        running prompt is cancelled on the server first.
        """
        start = time.monotonic()
        if self.previews is not None and self.resumable:
            previews, out = self.previews.resolve(), self.out.resolve()
            if previews == out or {out / job.name for job in self.jobs}.intersection((previews, *previews.parents)):
                raise UsageError(f"--save-previews {self.previews} is a folder of results; choose another folder")
        prepare_folder(self.out)
        with closing(Ledger(self.out if self.resumable else None, self.jobs)) as self._ledger:
            states = self._ledger.states()
            left = [job for job in self.jobs if states[job.name] != "done"]
            # Jobs that an earlier command sent come first: the server may be running them.
            left.sort(key=lambda job: states[job.name] != "sent")
            journal = str(self._ledger.path) if self.resumable else None
            prompts, url = len(self.jobs), self.server.url
            self.emit("batch", prompts=prompts, done=prompts - len(left), servers=[url], journal=journal)
            try:
                if left:
                    self.server.listen(self._ledger.client_id)
                for job in left:
                    any(self._run(job, loss) for loss in range(1, MOST_LOSSES + 1))
            except ServerUnreachable as error:
                self.emit("server_lost", server=url, reason=str(error))
            finally:
                states = self._ledger.states()
                ended = [states[job.name] for job in self.jobs]
                counts = {"done": ended.count("done"), "failed": ended.count("failed")}
                counts["left"] = prompts - sum(counts.values())
                self.emit("summary", prompts=prompts, **counts, seconds=round(time.monotonic() - start, 3))
        return counts["done"] == prompts

    def _run(self, job: Job, loss: int) -> bool:
        """Run a job; False if the server has lost it, the loss-th time, and it must be sent again."""
        prompt_id = self._ledger.sent.pop(job.name, None) or str(uuid.uuid4())
        emit = partial(self.emit, prompt=job.name, server=self.server.url, prompt_id=prompt_id)
        run = Run(job, prompt_id, emit, self.previews)
        self._ledger.set(job.name, state="sent", prompt_id=prompt_id, client_id=self._ledger.client_id, error=None)
        try:
            paths = self._store(job, output_files(job.prompt, self._record(run), temp=self.temp))
        except ServerUnreachable:
            raise
        except QueueError as error:
            message = str(error)
            if isinstance(error, RunVanished):
                if loss < MOST_LOSSES:
                    self._ledger.set(job.name, state="waiting")
                    emit("returned", reason=message)
                    return False
                message = f"given up after it was lost {MOST_LOSSES} times; the last time: {message}"
            self._ledger.set(job.name, state="failed", error=message)
            emit("failed", message=message)
        else:
            self._ledger.set(job.name, state="done")
            seconds = round(time.monotonic() - run.since, 3)
            emit("finished", files=list(map(str, paths)), left_out=run.left_out, seconds=seconds)
        return True

    def _record(self, run: Run) -> Mapping[str, Any]:
        """The run's record in the server's history; an interrupted batch cancels the run there."""
        try:
            self.server.patiently(lambda: self._send(run))
            return run.follow(self.server, self._ledger.client_id, timeout=self.timeout)
        except QueueError:
            raise
        except BaseException:  # Ctrl-C, a full disk, a closed pipe: leave nothing running unseen
            with suppress(OSError):
                self.server.cancel(run.prompt_id)
                self._ledger.set(run.job.name, state="waiting")
                run.emit("cancelled")
            raise

    def _send(self, run: Run) -> None:
        """Send the prompt unless the server already has it, from an earlier command or because its answer was lost."""
        if not self.server.has_queued(run.prompt_id) and self.server.history(run.prompt_id) is None:
            previews, client_id = self.previews is not None, self._ledger.client_id
            run.left_out = self.server.submit(run.job.prompt, run.prompt_id, client_id, previews=previews)
            run.emit("submitted")

    def _store(self, job: Job, files: Sequence[RemoteFile]) -> list[Path]:
        """Download files: below the job's folder in a batch, else into the output folder."""
        target = self.out / job.name if self.resumable else self.out
        folder = partial_folder(self.out, job.name) if self.resumable else self.out
        if self.resumable:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        paths = [self.server.patiently(partial(self.server.download, file, folder)) for file in files]
        if self.resumable:
            os.replace(folder, target)
        return [target / path.relative_to(folder) for path in paths]
