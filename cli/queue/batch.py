"""A batch on one server: run all jobs that the ledger does not list as done, one after another.

Each job's files appear as one folder, renamed into place when complete: after a crash it is complete or absent. The
ledger is one sqlite3 file in the output folder. In it a job is `waiting`, `sent` (its prompt may be waiting, running or
finished on the server, so the next start asks there first) or `done`. An open ledger holds sqlite's exclusive lock, on
every operating system and until the process ends, however it ends.
"""

import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...lightforcing_core.files.output import prepare_folder
from .jobs import Job
from .prompt import UsageError
from .run import Run, RunVanished, output_files
from .server import ComfyServer, QueueError, RemoteFile, ServerUnreachable

MOST_LOSSES = 3  # a prompt that was lost with the server this often may have crashed it
LEDGER = "queue.sqlite3"
TABLE = """CREATE TABLE IF NOT EXISTS jobs (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, prompt_id TEXT, client_id TEXT NOT NULL
)"""


class Ledger:
    """The ledger in `folder`, made or continued; in memory if folder is None, for a run that is not resumable.

    client_id: of the batch, for sending prompts and receiving their events.
    done: the names of finished jobs. sent: the prompt ids of jobs that an earlier start sent, by name.

    Raises UsageError if the ledger belongs to another batch, cannot be read, or is in use by another command.
    """

    def __init__(self, folder: Path | None, jobs: Sequence[Job]) -> None:
        self.path = None if folder is None else folder / LEDGER
        if folder is not None and not (folder / LEDGER).exists():
            _check_free(folder / job.name for job in jobs)
        self._db = sqlite3.connect(self.path or ":memory:", timeout=0, isolation_level=None)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("BEGIN EXCLUSIVE")
            self._add(jobs)
            rows = self._db.execute(
                "SELECT name, state, prompt_id FROM jobs WHERE state IN ('sent', 'done')"
            ).fetchall()
            self.sent = {name: prompt_id for name, state, prompt_id in rows if state == "sent"}
            self.done = {name for name, state, _ in rows if state == "done"}
            if folder is not None:  # a crash after a folder was complete
                self.done |= {name for name in self.sent if (folder / name).exists()}
                _check_free(folder / job.name for job in jobs if job.name not in self.done)
            self._db.execute("COMMIT")
        except BaseException as error:
            self.close()  # rolls the transaction back
            if not isinstance(error, sqlite3.Error):
                raise
            reason = "another command uses it; wait" if "locked" in str(error) else f"{error}; empty the folder"
            raise UsageError(f"cannot use {self.path}: {reason}, or choose another --out") from error

    def close(self) -> None:
        self._db.close()

    def set(self, name: str, state: str, prompt_id: str | None = None) -> None:
        """Write the state of a job; OSError if the disk is full."""
        try:
            self._db.execute("UPDATE jobs SET state = ?, prompt_id = ? WHERE name = ?", (state, prompt_id, name))
        except sqlite3.Error as error:
            raise OSError(f"cannot write {self.path}: {error}") from error

    def _add(self, jobs: Sequence[Job]) -> None:
        """Make the table, check the jobs in it, and add the missing ones."""
        self._db.execute(TABLE)
        known = dict(self._db.execute("SELECT name, digest FROM jobs"))
        changed = [job.name for job in jobs if known.get(job.name, job.digest) != job.digest]
        if changed:
            raise UsageError(
                f"{self.path} has another prompt named {changed[0]}: the workflow, the prompt file or an option has "
                f"changed; undo that to continue the batch, choose another --out, or empty the folder"
            )
        (found,) = self._db.execute("SELECT max(client_id) FROM jobs").fetchone()
        self.client_id: str = found or uuid.uuid4().hex
        new = [(job.name, job.digest, self.client_id) for job in jobs if job.name not in known]
        self._db.executemany("INSERT INTO jobs (name, digest, state, client_id) VALUES (?, ?, 'waiting', ?)", new)


@dataclass
class Batch:
    """Jobs to run on a server.

    emit: called as emit(kind, **fields) for every event.
    out: folder for the results; with `resumable` it holds a folder for each job, and the ledger.
    timeout: seconds after which a prompt is cancelled. temp: fetch the files of preview nodes too.
    previews: folder for the pictures that the server sends while it samples.
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


def _check_free(folders: Iterable[Path]) -> None:
    taken = next((folder for folder in folders if folder.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists already and is not from this batch; choose another --out")
