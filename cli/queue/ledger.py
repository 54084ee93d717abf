"""The ledger of a batch: one sqlite3 file in the output folder with the state of every job.

A job is `waiting`, `sent` (its prompt may be waiting, running or finished on the server, so the next start asks there
first), `done` (its files are in the output folder) or `failed` (the next start tries it again). An open ledger holds
sqlite's exclusive lock, on every operating system and until the process ends, however it ends.
"""

import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from .jobs import Job
from .prompt import UsageError

FILE_NAME = "queue.sqlite3"
TABLE = """CREATE TABLE IF NOT EXISTS jobs (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL,
    prompt_id TEXT, client_id TEXT, error TEXT
)"""


def partial_folder(folder: Path, name: str) -> Path:
    """The hidden folder that a job's files are fetched into; it becomes `folder/name` when complete."""
    return folder / f".{name}.part"


class Ledger:
    """The ledger in `folder`, made or continued; in memory if folder is None, for a run that is not resumable.

    client_id: for sending prompts and receiving their events; if some are `sent` already, theirs is used.
    sent: the prompt ids of jobs that an earlier start sent.

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
            if folder is not None:
                self._settle(folder, jobs)
            self._db.execute("COMMIT")
        except BaseException as error:
            self.close()  # rolls the transaction back
            if not isinstance(error, sqlite3.Error):
                raise
            reason = "another command uses it; wait" if "locked" in str(error) else f"{error}; empty the folder"
            raise UsageError(f"cannot use {self.path}: {reason}, or choose another --out") from error

    def close(self) -> None:
        self._db.close()

    def states(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, state FROM jobs"))

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
        new = [(job.name, job.digest) for job in jobs if job.name not in known]
        self._db.executemany("INSERT INTO jobs (name, digest, state) VALUES (?, ?, 'waiting')", new)
        rows = self._db.execute("SELECT name, prompt_id, client_id FROM jobs WHERE state = 'sent'").fetchall()
        self.sent: dict[str, str] = {name: prompt_id for name, prompt_id, _ in rows}
        self.client_id: str = rows[0][2] if rows else uuid.uuid4().hex

    def _settle(self, folder: Path, jobs: Sequence[Job]) -> None:
        """Match the folder: a job that was sent and has a whole folder is done; an incomplete folder is deleted."""
        states = self.states()
        _check_free(folder / job.name for job in jobs if states[job.name] in ("waiting", "failed"))
        for job in jobs:
            shutil.rmtree(partial_folder(folder, job.name), ignore_errors=True)
            if states[job.name] == "sent" and (folder / job.name).exists():
                self.set(job.name, state="done")

    def set(self, name: str, **values: str | None) -> None:
        """Write columns of a job; OSError if the disk is full."""
        columns = ", ".join(f"{column} = ?" for column in values)
        try:
            self._db.execute(f"UPDATE jobs SET {columns} WHERE name = ?", (*values.values(), name))
        except sqlite3.Error as error:
            raise OSError(f"cannot write {self.path}: {error}") from error


def _check_free(folders: Iterable[Path]) -> None:
    taken = next((folder for folder in folders if folder.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists already and is not from this batch; choose another --out")
