"""What `lightforcing queue` does with its options: read, check, then run one prompt or a batch.

A batch (a prompt file, or seeds) keeps a journal in the output folder. The same command started again goes on with
what is not done; prompts that failed are tried again. The journal's lines: `queue_journal.py`; the events of
`--json`: `queue_events.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .comfy_server import ComfyServer, ServerUnreachable
from .files.output import prepare_folder
from .queue_batch import BatchOptions, run_batch
from .queue_display import QueueDisplay
from .queue_events import Events, print_json
from .queue_jobs import Job, Line, digests, make_jobs, read_prompts, read_seeds
from .queue_journal import Journal
from .queue_outputs import settle_folders, store_in, store_in_folders
from .queue_overrides import UsageError, read_override
from .workflow_form import read_workflow, ui_to_api


@dataclass(frozen=True)
class QueueRequest:
    """What the user asked for, as typed. seeds: like `1,2,5-8`; overrides: like `4.seed=7`."""

    workflow: Path
    out: Path
    servers: Sequence[str]
    options: BatchOptions
    overrides: Sequence[str] = ()
    prompts: Path | None = None
    prompt_node: str | None = None
    seeds: str | None = None
    json: bool = False

    @property
    def is_batch(self) -> bool:
        return self.prompts is not None or self.seeds is not None


def run_queue(request: QueueRequest, complain: Callable[[str], None]) -> int:
    """Do it; the exit code: 0 when everything is done, 1 when some of it is not.

    complain: takes one line for stderr. Raises UsageError, before anything is sent, for what does not fit together;
    WorkflowError, OutputError, QueueError and KeyboardInterrupt as they come.
    """
    if request.prompt_node is not None and request.prompts is None:
        raise UsageError("--prompt-node says where the lines of --prompts go; give both, or use --set")
    document, is_canvas = read_workflow(request.workflow)
    lines = read_prompts(request.prompts) if request.prompts is not None else [Line(name="prompt")]
    seeds = read_seeds(request.seeds) if request.seeds is not None else None
    servers = [ComfyServer(url, http_timeout=request.options.patience) for url in request.servers]
    if len({server.url for server in servers}) < len(servers):
        raise UsageError("a server is named twice; name each once")
    jobs = _jobs(request, servers, document, is_canvas, lines, seeds)
    _check_previews(request, jobs)
    prepare_folder(request.out)
    if not request.is_batch:
        return _run(request, jobs, servers, complain, None)
    asked = digests(document, lines=lines, seeds=seeds, overrides=request.overrides, prompt_node=request.prompt_node)
    journal = Journal(request.out, asked)
    try:
        settle_folders(request.out, [job.name for job in jobs], journal)
    except UsageError:
        journal.take_back()
        raise
    try:
        return _run(request, jobs, servers, complain, journal)
    finally:
        journal.close()


def _jobs(
    request: QueueRequest,
    servers: Sequence[ComfyServer],
    document: dict[str, Any],
    is_canvas: bool,
    lines: Sequence[Line],
    seeds: list[int] | None,
) -> list[Job]:
    """The prompts to run. The servers' node definitions are asked for only where they are needed."""
    changes = bool(request.overrides) or request.is_batch
    object_info = _object_info(servers) if is_canvas or changes else {}
    prompt = ui_to_api(document, object_info) if is_canvas else document
    return make_jobs(
        prompt,
        object_info,
        canvas=document if is_canvas else None,
        overrides=[read_override(prompt, object_info, text) for text in request.overrides],
        lines=lines,
        seeds=seeds,
        prompt_node=request.prompt_node,
    )


def _check_previews(request: QueueRequest, jobs: Sequence[Job]) -> None:
    """UsageError where previews would lie in a folder that a job's files are renamed to."""
    if request.options.previews is None or not request.is_batch:
        return
    previews, out = request.options.previews.resolve(), request.out.resolve()
    taken = {out / job.name for job in jobs}
    if previews == out or taken.intersection((previews, *previews.parents)):
        raise UsageError(f"--save-previews {request.options.previews} is where results go; choose another folder")


def _object_info(servers: Sequence[ComfyServer]) -> Mapping[str, Any]:
    """The node definitions of the first server that answers. Raises ServerUnreachable when none does."""
    errors = []
    for server in servers:
        try:
            return server.get("/object_info")
        except ServerUnreachable as error:
            errors.append(str(error))
    raise ServerUnreachable("\n".join(errors))


def _run(
    request: QueueRequest,
    jobs: list[Job],
    servers: list[ComfyServer],
    complain: Callable[[str], None],
    journal: Journal | None,
) -> int:
    console = Console(stderr=request.json)
    display = QueueDisplay(console, complain, single=journal is None, quiet=request.json)
    events = Events(display, print_json) if request.json else Events(display)
    store = store_in(request.out) if journal is None else store_in_folders(request.out)
    try:
        with display:
            counts = run_batch(jobs, servers, store=store, emit=events, journal=journal, options=request.options)
    except KeyboardInterrupt:
        if journal is not None:
            complain("start the same command again to go on with the batch")
        raise
    if counts.left and journal is not None:
        complain("no server is left; start the same command again to go on with the batch")
    return 1 if counts.failed or counts.left or display.anything_left_out else 0
