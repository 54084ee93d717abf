"""The journal of a batch: what has been sent where and what is done, so that an unfinished batch goes on.

`queue.jsonl` beside the outputs, one JSON object per line, each written by one append and synced:

    {"journal": 1, "client": …, "digests": {…}}           the first line: what the batch was asked to do
    {"note": "submitted", "prompt", "server", "id"}       about to be sent; `id` is the prompt's id on that server
    {"note": "done", "prompt", "server", "id", "files"}   its files are on this disk
    {"note": "failed", "prompt", "server", "id", "message"}   it ended in an error; the next start tries it again
    {"note": "closed", "prompt", "server", "id"}          cancelled, or forgotten by the server

An id that is neither done, failed nor closed may be waiting, running or finished on its server: whoever goes on with
the batch asks there first.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .queue_overrides import UsageError

FILE_NAME = "queue.jsonl"
VERSION = 1


class Attempt(NamedTuple):
    """A job's prompt on a server, of which the end is not known."""

    job: str
    server: str
    prompt_id: str


class Journal:
    """The journal in `folder`, made or gone on with; one process at a time holds it.

    digests: what the batch is asked to do, per part. done: files per finished job, below `folder`. client_id: the same
    for every start, so that a server sends the events of prompts that an earlier start submitted.

    Raises UsageError when the journal belongs to another batch, cannot be read, or is held by another process.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.path = folder / FILE_NAME
        self.done: dict[str, list[str]] = {}
        self.client_id = uuid.uuid4().hex
        self._open_attempts: dict[str, Attempt] = {}
        self._file = self.path.open("a+b", buffering=0)
        try:
            self._lock()
            self._file.seek(0)
            self.is_new = self._read(self._file.read(), digests)
        except BaseException:
            self._file.close()
            raise
        if self.is_new:
            self._append({"journal": VERSION, "client": self.client_id, "digests": dict(digests)})

    @property
    def attempts(self) -> list[Attempt]:
        """Every attempt of which the end is not known."""
        return list(self._open_attempts.values())

    def submitted(self, attempt: Attempt) -> None:
        self._open_attempts[attempt.prompt_id] = attempt
        self._note("submitted", attempt)

    def finished(self, attempt: Attempt, files: Sequence[Path]) -> None:
        """files: below the journal's folder."""
        names = [path.relative_to(self.path.parent).as_posix() for path in files]
        self.done[attempt.job] = names
        self._end("done", attempt, files=names)

    def failed(self, attempt: Attempt, message: str) -> None:
        self._end("failed", attempt, message=message)

    def closed(self, attempt: Attempt) -> None:
        self._end("closed", attempt)

    def close(self) -> None:
        self._file.close()

    def take_back(self) -> None:
        """Close, and leave no journal behind where there was none before: nothing of this batch has begun."""
        self.close()
        if self.is_new:
            self.path.unlink()

    def _end(self, note: str, attempt: Attempt, **more: Any) -> None:
        self._open_attempts.pop(attempt.prompt_id, None)
        self._note(note, attempt, **more)

    def _note(self, note: str, attempt: Attempt, **more: Any) -> None:
        told = {"prompt": attempt.job, "server": attempt.server, "id": attempt.prompt_id}
        self._append({"note": note, "time": round(time.time(), 3), **told, **more})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        """Hold the file until this process ends; where the system has no such lock (Windows), go without."""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is working on {self.path}; wait for it, or choose another --out"
                ) from None

    def _read(self, content: bytes, digests: Mapping[str, str]) -> bool:
        """Take over what the file says; whether it says nothing yet. A line that a crash cut short is removed."""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            if not entries:
                return True
            if not isinstance(entries[0], dict) or entries[0].get("journal") != VERSION:
                raise UsageError(
                    f"{self.path} is not a journal of this version; choose another --out, or empty the folder"
                )
            self._take_over(entries[0], entries[1:], digests)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.path} is damaged ({error}); choose another --out, or empty the folder") from error
        return False

    def _take_over(
        self, head: Mapping[str, Any], notes: Sequence[Mapping[str, Any]], digests: Mapping[str, str]
    ) -> None:
        changed = [part for part, digest in digests.items() if head["digests"].get(part) != digest]
        if changed:
            raise UsageError(
                f"{self.path} belongs to a batch with another {' and '.join(changed)}; "
                f"undo the change to go on with it, choose another --out, or empty the folder to start over"
            )
        self.client_id = head["client"]
        for entry in notes:
            attempt = Attempt(entry["prompt"], entry["server"], entry["id"])
            if entry["note"] == "submitted":
                self._open_attempts[attempt.prompt_id] = attempt
            else:
                self._open_attempts.pop(attempt.prompt_id, None)
            if entry["note"] == "done":
                self.done[attempt.job] = entry["files"]
