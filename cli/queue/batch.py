"""A batch on one server: run all jobs that the ledger does not list as done, one after another.

Each job's files appear as one folder, renamed into place when complete: after a crash it is complete or absent.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...lightforcing_core.files.output import prepare_folder
from .jobs import Job
from .ledger import Ledger
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
        with closing(Ledger(self.out if self.resumable else None, self.jobs)) as ledger:
            left = [job for job in self.jobs if job.name not in ledger.done]
            left.sort(key=lambda job: job.name not in ledger.sent)  # first those that the server may be running
            prompts, done, failed, url = len(self.jobs), len(self.jobs) - len(left), 0, self.server.url
            journal = str(ledger.path) if self.resumable else None
            self.emit("batch", prompts=prompts, done=done, servers=[url], journal=journal)
            try:
                if left:
                    self.server.listen(ledger.client_id)
                for job in left:
                    if self._run(job, ledger):
                        done += 1
                    else:
                        failed += 1
            except ServerUnreachable as error:
                self.emit("server_lost", server=url, reason=str(error))
            finally:
                counts = {"done": done, "failed": failed, "left": prompts - done - failed}
                self.emit("summary", prompts=prompts, **counts, seconds=round(time.monotonic() - start, 3))
        return done == prompts

    def _run(self, job: Job, ledger: Ledger) -> bool:
        """Run a job, again if the server restarts and forgets it; returns whether its files are here."""
        start = time.monotonic()
        for loss in range(1, MOST_LOSSES + 1):
            prompt_id = ledger.sent.pop(job.name, None) or str(uuid.uuid4())
            emit = partial(self.emit, prompt=job.name, server=self.server.url, prompt_id=prompt_id)
            run = Run(job, prompt_id, self.server, emit, self.previews)
            ledger.set(job.name, "sent", prompt_id)
            try:
                paths = self._store(job, output_files(job.prompt, self._record(run, ledger), temp=self.temp))
            except RunVanished as error:
                ledger.set(job.name, "waiting")
                if loss < MOST_LOSSES:
                    emit("returned", reason=str(error))
                else:
                    emit("failed", message=f"given up after it was lost {MOST_LOSSES} times; the last time: {error}")
            except ServerUnreachable:
                raise
            except QueueError as error:
                ledger.set(job.name, "waiting")
                emit("failed", message=str(error))
                return False
            else:
                ledger.set(job.name, "done")
                seconds = round(time.monotonic() - start, 3)
                emit("finished", files=list(map(str, paths)), left_out=run.left_out, seconds=seconds)
                return True
        return False

    def _record(self, run: Run, ledger: Ledger) -> Mapping[str, Any]:
        """The run's record in the server's history; an interrupted batch cancels the run there."""
        try:
            self.server.patiently(run.send)
            return run.follow(self.timeout)
        except QueueError:
            raise
        except BaseException:  # Ctrl-C, a full disk, a closed pipe: leave nothing running unseen
            with suppress(OSError):
                self.server.cancel(run.prompt_id)
                ledger.set(run.job.name, "waiting")
                run.emit("cancelled")
            raise

    def _store(self, job: Job, files: Sequence[RemoteFile]) -> list[Path]:
        """Download files: below the job's folder in a batch, else into the output folder."""
        folder = self.out / f".{job.name}.part" if self.resumable else self.out
        if self.resumable:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        paths = [self.server.patiently(partial(self.server.download, file, folder)) for file in files]
        if not self.resumable:
            return paths
        target = self.out / job.name
        os.replace(folder, target)
        return [target / path.relative_to(folder) for path in paths]
