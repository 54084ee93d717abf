"""A batch over several ComfyUI servers: a worker thread per server, all taking from one board.

A worker submits its next prompt before it fetches the files of the last one, so that its server never waits for a
download, and never holds more than it runs: what is not started stays free for whoever is free.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from .comfy_server import ComfyServer, QueueError, RemoteFile, RunFailed, RunVanished, ServerUnreachable
from .queue_board import Board, Counts, Emit
from .queue_client import (
    PATIENCE_SECONDS,
    EventStream,
    Preview,
    Progress,
    Run,
    follow,
    output_files,
    raise_for_failure,
    was_cached,
)
from .queue_jobs import Job
from .queue_journal import Attempt, Journal
from .queue_outputs import Store, save_preview

RETRY_SECONDS = 2.0  # between two knocks at a lost server's door
GOODBYE_SECONDS = 10.0  # how long an interrupted batch waits for its servers

Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchOptions:
    """timeout: seconds per prompt, None for ever. patience: seconds without an answer until a server is lost.

    include_temp: fetch what preview nodes wrote too. previews: folder for the pictures sent during the run.
    """

    timeout: float | None = None
    patience: float = PATIENCE_SECONDS
    include_temp: bool = False
    previews: Path | None = None


def run_batch(
    jobs: Sequence[Job],
    servers: Sequence[ComfyServer],
    *,
    store: Store,
    emit: Emit,
    journal: Journal | None = None,
    options: BatchOptions = BatchOptions(),
) -> Counts:
    """Run every job that the journal does not have as done, each on whichever server is free; how they ended.

    Ends early when every server is lost. On KeyboardInterrupt the running prompts are cancelled on their servers
    first. Raises what a worker could not cope with, such as an OSError of the local disk.
    """
    start = time.monotonic()
    emit(
        "batch",
        prompts=len(jobs),
        done=len(journal.done) if journal else 0,
        servers=[server.url for server in servers],
        journal=str(journal.path) if journal else None,
    )
    board = Board(jobs, [server.url for server in servers], journal, emit)
    client_id = journal.client_id if journal else uuid.uuid4().hex
    workers = [_Worker(server, board, store, emit, client_id, options) for server in servers]
    threads = [threading.Thread(target=worker.run, name=worker.server.url, daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        while not board.over:
            board.pause(0.1)
    finally:
        board.stop()
        deadline = time.monotonic() + GOODBYE_SECONDS
        for thread in threads:
            if board.is_alive(thread.name):  # a lost server's worker may be knocking for as long as a connection takes
                thread.join(max(0.0, deadline - time.monotonic()))
        counts = board.counts()
        seconds = round(time.monotonic() - start, 3)
        emit("summary", prompts=len(jobs), **counts._asdict(), seconds=seconds)
    if board.error is not None:
        raise board.error
    return counts


class _Stopped(Exception):
    """The batch was stopped."""


class _Superseded(Exception):
    """Another server has delivered the job."""


@dataclass(frozen=True)
class _Ready:
    """A prompt that ended well on its server and whose files are not here yet."""

    job: Job
    attempt: Attempt
    files: list[RemoteFile]
    cached: bool


class _Worker:
    """One server's share of the batch."""

    def __init__(
        self, server: ComfyServer, board: Board, store: Store, emit: Emit, client_id: str, options: BatchOptions
    ) -> None:
        self.server, self._board, self._store, self._emit = server, board, store, emit
        self._client_id, self._options = client_id, options
        self._left_out: dict[str, list[str]] = {}

    def run(self) -> None:
        """Work until the batch is over, coming back to the server whenever it is lost."""
        url = self.server.url
        try:
            while not self._board.over:
                try:
                    previews = self._options.previews is not None
                    with closing(EventStream(self.server, self._client_id, previews=previews)) as events:
                        if self._board.over:
                            return
                        self._board.regain(url)
                        self._go_on(events)
                        self._work(events)
                except ServerUnreachable as error:
                    self._board.lose(url, str(error))
                    self._board.pause(RETRY_SECONDS)
        except _Stopped:
            pass
        except BaseException as error:  # a full disk, a closed pipe, a bug: all of the batch ends with it
            self._board.stop(error)
        if self._board.stopped:
            self._cancel_all()

    def _go_on(self, events: EventStream) -> None:
        """Ask after everything this server was sent before; fetch, follow or cancel it."""
        known = []
        for job, attempt in self._board.attempts_at(self.server.url):
            waiting = self.server.has_queued(attempt.prompt_id)
            finished = not waiting and self.server.history(attempt.prompt_id) is not None
            if not waiting and not finished:
                self._board.give_back(attempt, "its server has forgotten it")
            elif self._board.reclaim(attempt, finished=finished):
                known.append((job, attempt))
            else:
                self.server.cancel(attempt.prompt_id)
                self._board.drop(attempt)
        for job, attempt in known:
            ready = self._follow(job, attempt, events)
            if ready is not None:
                self._fetch(ready)

    def _work(self, events: EventStream) -> None:
        """Take jobs until there are none."""
        ready = None
        while True:
            taken = self._board.take(self.server.url)
            running = taken is not None and self._submit(*taken)
            if ready is not None:
                self._fetch(ready)
                ready = None
            if taken is not None:
                ready = self._follow(*taken, events) if running else None
            elif self._board.over:
                return
            else:
                events.next()  # idle: keeps the stream drained, and notices when the server goes

    def _submit(self, job: Job, attempt: Attempt) -> bool:
        """Send the prompt; whether the server took it."""
        sent = False

        def send() -> None:
            nonlocal sent
            if sent and self.server.knows(attempt.prompt_id):  # the answer was lost, not the prompt
                return
            sent = True
            self._left_out[attempt.prompt_id] = self.server.submit(
                job.prompt,
                prompt_id=attempt.prompt_id,
                client_id=self._client_id,
                canvas=job.canvas,
                previews=self._options.previews is not None,
            )

        try:
            self._patiently(send)
        except ServerUnreachable:
            raise
        except QueueError as error:
            self._board.refuse(attempt, str(error))
            return False
        self._board.submitted(attempt)
        return True

    def _follow(self, job: Job, attempt: Attempt, events: EventStream) -> _Ready | None:
        """Wait for the prompt's end; what to fetch, None when there is nothing."""
        run = Run(job.prompt, attempt.prompt_id, partial(self._progress, attempt), partial(self._preview, attempt))
        try:
            record = follow(
                self.server,
                run,
                events,
                timeout=self._options.timeout,
                patience=self._options.patience,
                look_up=partial(self._look_up, attempt),
            )
            raise_for_failure(run, record)
        except _Superseded:
            self.server.cancel(attempt.prompt_id)
            self._board.drop(attempt)
            return None
        except RunVanished as error:
            self._board.give_back(attempt, str(error))
            return None
        except RunFailed as error:
            if self._board.stopped:
                raise _Stopped from error
            self._board.fail(attempt, str(error))
            return None
        if not self._board.begin_fetch(attempt):
            self._board.drop(attempt)
            return None
        files = output_files(record, include_temp=self._options.include_temp)
        return _Ready(job, attempt, files, was_cached(job.prompt, record))

    def _fetch(self, ready: _Ready) -> None:
        """Bring the files home; with that the job is done."""

        def download(file: RemoteFile, folder: Path) -> Path:
            return self._patiently(lambda: self.server.download(file, folder))

        try:
            paths = self._store(ready.job, ready.files, download)
        except ServerUnreachable:
            raise
        except QueueError as error:
            self._board.fail(ready.attempt, str(error))
            return
        left_out = self._left_out.pop(ready.attempt.prompt_id, [])
        self._board.finish(ready.attempt, paths, cached=ready.cached, left_out=left_out)

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """`call`, again and again while the server does not answer and patience lasts."""
        deadline = None
        while True:
            try:
                return call()
            except ServerUnreachable:
                deadline = deadline or time.monotonic() + self._options.patience
                if time.monotonic() > deadline or self._board.stopped:
                    raise
                self._board.pause(min(1.0, self._options.patience))

    def _look_up(self, attempt: Attempt) -> None:
        if self._board.stopped:
            raise _Stopped
        if not self._board.holds(attempt):
            raise _Superseded

    def _cancel_all(self) -> None:
        """The batch was stopped: nothing of it goes on running here."""
        for attempt in self._board.running_at(self.server.url):
            with suppress(QueueError):
                self.server.cancel(attempt.prompt_id)
                self._board.cancelled(attempt)

    def _progress(self, attempt: Attempt, step: Progress) -> None:
        self._emit(
            "progress",
            prompt=attempt.job,
            server=attempt.server,
            prompt_id=attempt.prompt_id,
            node=step.title,
            value=step.value,
            total=step.total,
            nodes_done=step.nodes_done,
            nodes=step.nodes,
        )

    def _preview(self, attempt: Attempt, preview: Preview) -> None:
        if self._options.previews is None:
            return
        path = save_preview(self._options.previews / attempt.job, preview)
        self._emit(
            "preview",
            prompt=attempt.job,
            server=attempt.server,
            prompt_id=attempt.prompt_id,
            node=preview.node,
            file=str(path),
        )
