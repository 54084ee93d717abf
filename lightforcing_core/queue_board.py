"""Who has which job: one list for all servers, each step of it one step of the journal and one event.

A job is *pending* until a server's worker takes it, *held* while that server has its prompt, *fetching* once it ended
well there, and *done* when its files are on our disk. What a lost server held is pending again at once. A server that
comes back is asked about every prompt it was ever sent (an *attempt*): a finished one is fetched unless its job is
done, a running one is followed if nobody else has the job, and cancelled otherwise.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .queue_jobs import Job
from .queue_journal import Attempt, Journal

MOST_LOSSES = 3  # a prompt that went down with so many servers may be what brings them down

Emit = Callable[..., None]
State = Literal["pending", "held", "fetching", "done", "failed"]


class Counts(NamedTuple):
    """How many jobs ended well, in an error, and not at all."""

    done: int
    failed: int
    left: int


@dataclass
class _Place:
    """Where one job stands. attempt: whose it is while held or fetching; refusals: by server, with their words."""

    job: Job
    state: State = "pending"
    attempt: Attempt | None = None
    losses: int = 0
    since: float = 0.0
    refusals: dict[str, tuple[Attempt, str]] = field(default_factory=dict)


class Board:
    """The jobs of one batch and the servers that work on them; safe to call from any thread.

    servers: addresses. journal: None for a run that nobody resumes. emit: called with an event's name and fields,
    see `queue_events.py`.
    """

    def __init__(self, jobs: Iterable[Job], servers: Sequence[str], journal: Journal | None, emit: Emit) -> None:
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._journal, self._emit = journal, emit
        self._alive = set(servers)
        self._places = {job.name: _Place(job) for job in jobs}
        self._attempts: list[Attempt] = []
        self.error: BaseException | None = None
        if journal is not None:
            self._recall(journal, set(servers))

    def _recall(self, journal: Journal, servers: set[str]) -> None:
        """Stand where an earlier start left off: its prompts belong to their servers until those were asked."""
        for name in journal.done:
            self._places[name].state = "done"
        for attempt in journal.attempts:
            place = self._places[attempt.job]
            if attempt.server in servers:
                self._attempts.append(attempt)
                if place.state != "done":
                    self._hold(place, attempt)
            elif place.state == "pending":
                self._emit("returned", prompt=attempt.job, server=attempt.server, reason="not among the servers now")

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do, or nobody to do it."""
        with self._lock:
            return self.stopped or not self._alive or self.counts().left == 0

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self, error: BaseException | None = None) -> None:
        """End the batch early; the first error is kept for `run_batch` to raise."""
        with self._lock:
            self.error = self.error or error
            self._stop.set()

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the batch is stopped."""
        self._stop.wait(seconds)

    def counts(self) -> Counts:
        with self._lock:
            states = [place.state for place in self._places.values()]
        done, failed = states.count("done"), states.count("failed")
        return Counts(done, failed, len(states) - done - failed)

    def take(self, server: str) -> tuple[Job, Attempt] | None:
        """The next pending job that this server has not refused; the journal has it before it is sent."""
        with self._lock:
            for place in self._places.values():
                if place.state == "pending" and server not in place.refusals and not self.stopped:
                    attempt = Attempt(place.job.name, server, str(uuid.uuid4()))
                    self._attempts.append(attempt)
                    if self._journal is not None:
                        self._journal.submitted(attempt)
                    self._hold(place, attempt)
                    return place.job, attempt
        return None

    def attempts_at(self, server: str) -> list[tuple[Job, Attempt]]:
        """Every prompt that this server was sent and of which the end is not known."""
        with self._lock:
            return [(self._places[one.job].job, one) for one in self._attempts if one.server == server]

    def holds(self, attempt: Attempt) -> bool:
        """Whether the attempt's job is still its own."""
        with self._lock:
            return self._places[attempt.job].attempt == attempt

    def running_at(self, server: str) -> list[Attempt]:
        """The prompts to cancel on this server when the batch stops: not those that are over there."""
        with self._lock:
            own = [place for place in self._places.values() if place.state == "held" and place.attempt is not None]
            return [place.attempt for place in own if place.attempt is not None and place.attempt.server == server]

    def reclaim(self, attempt: Attempt, *, finished: bool) -> bool:
        """Make the job this attempt's own again, if it is free, or if the attempt is finished and the job not done."""
        with self._lock:
            place = self._places[attempt.job]
            mine = place.attempt == attempt
            if mine or place.state == "pending" or (finished and place.state == "held"):
                self._hold(place, attempt)
                return True
            return False

    def submitted(self, attempt: Attempt) -> None:
        self._emit("submitted", **_named(attempt))

    def refuse(self, attempt: Attempt, message: str) -> None:
        """The server will not run this prompt; the job fails when every server that is left refused it."""
        with self._lock:
            self._end(attempt)
            if self.holds(attempt):
                place = self._places[attempt.job]
                place.refusals[attempt.server] = (attempt, message)
                self._release(place)
                self._settle_refused()

    def fail(self, attempt: Attempt, message: str) -> None:
        """The prompt ran and failed; it is not tried elsewhere."""
        with self._lock:
            if self.holds(attempt):
                self._forget(attempt)
                self._fail(self._places[attempt.job], attempt, message)
            else:
                self._end(attempt)

    def begin_fetch(self, attempt: Attempt) -> bool:
        """The prompt ended well; whether its files are still wanted from this server."""
        with self._lock:
            if not self.holds(attempt):
                return False
            self._places[attempt.job].state = "fetching"
            return True

    def finish(self, attempt: Attempt, files: Sequence[Path], *, cached: bool, left_out: list[str]) -> None:
        """The job's files are on our disk."""
        with self._lock:
            self._forget(attempt)
            place = self._places[attempt.job]
            place.state, place.attempt = "done", None
            if self._journal is not None:
                self._journal.finished(attempt, files)
            seconds = round(time.monotonic() - place.since, 3)
            more = {"files": [str(path) for path in files], "cached": cached, "left_out": left_out, "seconds": seconds}
            self._emit("finished", **_named(attempt), **more)

    def give_back(self, attempt: Attempt, reason: str) -> None:
        """The server has forgotten the prompt: the job is pending again."""
        with self._lock:
            self._end(attempt)
            if self.holds(attempt):
                self._return(self._places[attempt.job], attempt, reason)

    def cancelled(self, attempt: Attempt) -> None:
        """The batch stopped and the prompt was cancelled on its server."""
        with self._lock:
            self.drop(attempt)
            self._emit("cancelled", **_named(attempt))

    def drop(self, attempt: Attempt) -> None:
        """Nothing more is wanted of this attempt."""
        with self._lock:
            self._end(attempt)
            if self.holds(attempt):
                self._release(self._places[attempt.job])

    def lose(self, server: str, reason: str) -> None:
        """The server does not answer: what it held is pending again; its attempts are asked after if it comes back."""
        with self._lock:
            if server not in self._alive:
                return
            self._alive.discard(server)
            self._emit("server_lost", server=server, reason=reason)
            for place in self._places.values():
                if place.attempt is not None and place.attempt.server == server:
                    self._return(place, place.attempt, "its server was lost")
            self._settle_refused()

    def is_alive(self, server: str) -> bool:
        with self._lock:
            return server in self._alive

    def regain(self, server: str) -> None:
        with self._lock:
            if server not in self._alive:
                self._alive.add(server)
                self._emit("server_back", server=server)

    def _hold(self, place: _Place, attempt: Attempt) -> None:
        place.state, place.attempt, place.since = "held", attempt, time.monotonic()

    def _release(self, place: _Place) -> None:
        place.state, place.attempt = "pending", None

    def _return(self, place: _Place, attempt: Attempt, reason: str) -> None:
        """Pending again, unless this went wrong too often."""
        place.losses += 1
        if place.losses >= MOST_LOSSES:
            self._fail(place, attempt, f"given up after it was lost {place.losses} times; the last time: {reason}")
            return
        self._release(place)
        self._emit("returned", prompt=attempt.job, server=attempt.server, reason=reason)

    def _fail(self, place: _Place, attempt: Attempt, message: str) -> None:
        place.state, place.attempt = "failed", None
        if self._journal is not None:
            self._journal.failed(attempt, message)
        self._emit("failed", **_named(attempt), message=message)

    def _settle_refused(self) -> None:
        """Fail what no server that is left would run."""
        for place in self._places.values():
            if place.state == "pending" and self._alive and self._alive <= place.refusals.keys():
                attempt, message = next(reversed(place.refusals.values()))
                self._fail(place, attempt, message)

    def _forget(self, attempt: Attempt) -> None:
        if attempt in self._attempts:
            self._attempts.remove(attempt)

    def _end(self, attempt: Attempt) -> None:
        self._forget(attempt)
        if self._journal is not None:
            self._journal.closed(attempt)


def _named(attempt: Attempt) -> dict[str, Any]:
    """The fields by which every event names its prompt."""
    return {"prompt": attempt.job, "server": attempt.server, "prompt_id": attempt.prompt_id}
