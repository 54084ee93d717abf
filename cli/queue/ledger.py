"""The ledger of a batch: one sqlite3 file in the output folder with the state of every job.

A job is `waiting`, `sent` (its prompt may be waiting, running or finished on the server, so the next start asks there
first) or `done` (its files are in the output folder). An open ledger holds sqlite's exclusive lock, on every operating
system and until the process ends, however it ends.
"""

import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from .jobs import Job
from .prompt import UsageError

FILE_NAME = "queue.sqlite3"
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
        self.path = None if folder is None else folder / FILE_NAME
        if folder is not None and not (folder / FILE_NAME).exists():
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


def _check_free(folders: Iterable[Path]) -> None:
    taken = next((folder for folder in folders if folder.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists already and is not from this batch; choose another --out")
