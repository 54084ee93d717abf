"""A batch on one server: every job that the ledger does not have as done, one after another.

The next prompt is sent before the last one's files are fetched, so the server never waits for a download. A batch's
files appear as one folder per job, renamed into place when all are there: a crash leaves a whole folder or none.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...lightforcing_core.files.output import prepare_folder
from .display import Display
from .jobs import Job, Line, make_jobs, read_prompts, read_seeds
from .ledger import Ledger, partial_folder
from .prompt import UsageError, read_override, read_workflow
from .run import EventStream, Run, RunVanished
from .server import ComfyServer, QueueError, ServerUnreachable, patiently

MOST_LOSSES = 3  # a prompt that went down with the server this often may be the reason


@dataclass(frozen=True)
class Request:
    """The command's options as typed. timeout, patience: seconds; temp: fetch the files of preview nodes too."""

    workflow: Path
    out: Path
    server: str
    overrides: Sequence[str] = ()
    prompts: Path | None = None
    prompt_node: str | None = None
    seeds: str | None = None
    timeout: float | None = None
    patience: float = 30.0
    temp: bool = False
    previews: Path | None = None
    json: bool = False

    @property
    def is_batch(self) -> bool:
        return self.prompts is not None or self.seeds is not None


def run_queue(request: Request, complain: Callable[[str], None]) -> int:
    """Run a request; the exit code: 0 if everything is done, 1 if some of it is not.

    complain: takes one line for stderr. Raises UsageError before anything is sent; OSError (of which QueueError is one)
    and KeyboardInterrupt as they come.
    """
    display = Display(complain, single=not request.is_batch, json=request.json)
    with closing(ComfyServer(request.server, timeout=request.patience)) as server:
        jobs = _jobs(request, server)
        prepare_folder(request.out)
        with closing(Ledger(request.out if request.is_batch else None, jobs)) as ledger, display.progress:
            counts = run_batch(request, jobs, server, ledger, display)
    return 1 if counts["failed"] or counts["left"] or display.anything_left_out else 0


def run_batch(
    request: Request, jobs: Sequence[Job], server: ComfyServer, ledger: Ledger, emit: Callable[..., None]
) -> dict[str, int]:
    """Run every job that is not done; how many are now done, failed and left. Ends early when the server is lost.

    emit: called as emit(kind, **fields) for every event. On KeyboardInterrupt, or any other error that ends the batch,
    the running prompt is cancelled on the server first.
    """
    start, states = time.monotonic(), ledger.states()
    journal = None if ledger.path is None else str(ledger.path)
    emit("batch", prompts=len(jobs), done=_count(jobs, ledger)["done"], servers=[server.url], journal=journal)
    # Jobs that an earlier command sent come first: the server may be running them.
    left = sorted((job for job in jobs if states[job.name] != "done"), key=lambda job: states[job.name] != "sent")
    try:
        if left:
            with closing(EventStream(server, ledger.client_id, previews=request.previews is not None)) as events:
                _Worker(request, server, ledger, events, emit).run(left)
    except ServerUnreachable as error:
        emit("server_lost", server=server.url, reason=str(error))
    finally:
        counts = _count(jobs, ledger)
        emit("summary", prompts=len(jobs), **counts, seconds=round(time.monotonic() - start, 3))
    return counts


@dataclass
class _Worker:
    """Sends, follows and fetches jobs. ended: a run that ended well on the server, its files not fetched yet."""

    request: Request
    server: ComfyServer
    ledger: Ledger
    events: EventStream
    emit: Callable[..., None]
    ended: Run | None = None

    def run(self, jobs: Sequence[Job]) -> None:
        """Do all jobs. Raises ServerUnreachable when patience is over."""
        for job in jobs:
            for loss in range(1, MOST_LOSSES + 1):
                if self._run(job, loss):
                    break
        self._fetch_ended()

    def _run(self, job: Job, loss: int) -> bool:
        """Run a job up to its end on the server; False if the server has lost it and it is to be sent again."""
        prompt_id = self.ledger.prompt_id(job.name) or str(uuid.uuid4())
        emit = partial(self.emit, prompt=job.name, server=self.server.url, prompt_id=prompt_id)
        run = Run(job, prompt_id, emit, self.request.previews)
        self.ledger.set(job.name, state="sent", prompt_id=prompt_id, client_id=self.ledger.client_id, error=None)
        try:
            patience = self.request.patience
            patiently(lambda: self._send(run), patience)
            self._fetch_ended()
            record = run.follow(self.server, self.events, timeout=self.request.timeout, patience=patience)
            run.end(record, temp=self.request.temp)
            self.ended = run
        except ServerUnreachable:
            raise
        except RunVanished as error:
            if loss < MOST_LOSSES:
                self.ledger.set(job.name, state="waiting")
                emit("returned", reason=str(error))
                return False
            self._fail(run, f"given up after it was lost {MOST_LOSSES} times; the last time: {error}")
        except QueueError as error:
            self._fail(run, str(error))
        except BaseException:  # Ctrl-C, a full disk, a closed pipe: leave nothing running unseen
            with suppress(OSError):
                self.server.cancel(prompt_id)
                self.ledger.set(job.name, state="waiting")
                emit("cancelled")
            raise
        return True

    def _send(self, run: Run) -> None:
        """Send the prompt unless the server has it: from an earlier command, or only its answer was lost."""
        if not self.server.knows(run.prompt_id):
            client_id, previews = self.ledger.client_id, self.request.previews is not None
            run.left_out = self.server.submit(run.job.prompt, run.prompt_id, client_id, previews=previews)
            run.emit("submitted")

    def _fetch_ended(self) -> None:
        """Download the files of the run that ended last; with that its job is done."""
        run, self.ended = self.ended, None
        if run is None:
            return
        try:
            paths = self._store(run)
        except ServerUnreachable:
            raise
        except QueueError as error:
            self._fail(run, str(error))
            return
        self.ledger.done(run.job.name, [path.relative_to(self.request.out).as_posix() for path in paths])
        seconds = round(time.monotonic() - run.since, 3)
        run.emit("finished", files=list(map(str, paths)), cached=run.cached, left_out=run.left_out, seconds=seconds)

    def _store(self, run: Run) -> list[Path]:
        """The files on this disk: below the job's folder in a batch, else among the output folder's."""
        out = self.request.out
        target, folder = out / run.job.name, partial_folder(out, run.job.name) if self.request.is_batch else out
        if folder != out:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        paths = [patiently(partial(self.server.download, file, folder), self.request.patience) for file in run.files]
        if folder == out:
            return paths
        os.replace(folder, target)
        return [target / path.relative_to(folder) for path in paths]

    def _fail(self, run: Run, message: str) -> None:
        self.ledger.set(run.job.name, state="failed", error=message)
        run.emit("failed", message=message)


def _jobs(request: Request, server: ComfyServer) -> list[Job]:
    """The prompts to run. The server's node definitions are asked for only if something is to be changed."""
    if request.prompt_node is not None and request.prompts is None:
        raise UsageError("--prompt-node says where the lines of --prompts go; give both, or use --set")
    prompt = read_workflow(request.workflow)
    lines = [Line(name="prompt")] if request.prompts is None else read_prompts(request.prompts)
    seeds = None if request.seeds is None else read_seeds(request.seeds)
    info = server.object_info() if request.overrides or request.is_batch else {}
    overrides = list(map(read_override, request.overrides))
    jobs = make_jobs(prompt, info, overrides=overrides, lines=lines, seeds=seeds, prompt_node=request.prompt_node)
    if request.previews is not None and request.is_batch:
        previews, out = request.previews.resolve(), request.out.resolve()
        if previews == out or {out / job.name for job in jobs}.intersection((previews, *previews.parents)):
            raise UsageError(f"--save-previews {request.previews} is a folder of results; choose another folder")
    return jobs


def _count(jobs: Sequence[Job], ledger: Ledger) -> dict[str, int]:
    states = ledger.states()
    found = [states[job.name] for job in jobs]
    done, failed = found.count("done"), found.count("failed")
    return {"done": done, "failed": failed, "left": len(found) - done - failed}
