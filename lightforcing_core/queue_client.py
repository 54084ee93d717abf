"""One prompt on one ComfyUI server: submit it, follow it through dropped connections, and say how it ended.

`run_prompt` is the whole job for one prompt; the batch (`queue_batch.py`) puts the same pieces together for many.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import websocket

from .comfy_server import (
    ComfyServer,
    Prompt,
    QueueError,
    RemoteFile,
    RunFailed,
    RunInterrupted,
    RunVanished,
    ServerUnreachable,
    title_of,
)

TICK_SECONDS = 0.5  # how long a wait for an event may take before the caller looks up
IDLE_SECONDS = 2.0  # without an event for so long, ask /history
PATIENCE_SECONDS = 30.0  # a server that stays away for longer is lost
IMAGE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the node at work, its own progress, and how many nodes are through."""

    title: str
    value: float
    total: float
    nodes_done: int
    nodes: int


class Preview(NamedTuple):
    """A picture that the server sent while it worked. node: the node's id, None where the server does not say."""

    image: bytes
    suffix: str
    node: str | None
    prompt_id: str | None


@dataclass(frozen=True)
class RunResult:
    """A successful run: what it wrote, node errors of the parts that the server left out, whether all was cached."""

    prompt_id: str
    files: list[RemoteFile]
    left_out: list[str]
    cached: bool


@dataclass
class Run:
    """What the events have said so far about one prompt."""

    prompt: Prompt
    prompt_id: str
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_preview: Callable[[Preview], None] = lambda preview: None
    started: bool = False
    node: str | None = None
    done: set[str] = field(default_factory=set)
    error: Mapping[str, Any] | None = None

    def take(self, event: "Mapping[str, Any] | Preview") -> bool:
        """Note one event; whether it may have been the last."""
        if isinstance(event, Preview):
            if event.prompt_id in (None, self.prompt_id):
                self.on_preview(event)
            return False
        kind, data = event.get("type"), event.get("data") or {}
        if kind == "status":
            if not self.started:
                self._show("waiting in the server's queue")
            return False
        if data.get("prompt_id") != self.prompt_id:
            return False
        self.started = True
        if kind == "execution_cached":
            self.done.update(str(node) for node in data.get("nodes") or ())
        elif kind == "execution_error":
            self.error = data
        elif kind == "executing":
            if self.node is not None:
                self.done.add(self.node)
            self.node = data.get("display_node") or data.get("node")
            if self.node is not None:
                self._show(title_of(self.prompt, self.node))
        elif kind == "progress":
            node = data.get("node") or self.node
            if node is not None:
                self._show(title_of(self.prompt, node), float(data["value"]), float(data["max"]))
        return kind in ("execution_error", "execution_interrupted") or (kind == "executing" and self.node is None)

    def _show(self, title: str, value: float = 0.0, total: float = 1.0) -> None:
        nodes = len(self.prompt)
        self.on_progress(Progress(title, value, total, len(self.done & set(self.prompt)), nodes))


class EventStream:
    """The server's WebSocket, opened again after it dropped. previews: ask for pictures that say whose they are."""

    def __init__(self, server: ComfyServer, client_id: str, *, previews: bool = False) -> None:
        self._server, self._client_id, self._previews = server, client_id, previews
        self.openings = 0
        self._socket = self._open()

    def next(self) -> dict[str, Any] | Preview | None:
        """The next event, None when none came within TICK_SECONDS; a binary frame of another kind is an empty event.

        Raises ServerUnreachable when the stream breaks off; the next call opens it again.
        """
        if not self._socket.connected:
            self._socket = self._open()
        try:
            frame = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return None
        except (websocket.WebSocketException, OSError) as error:
            self.close()
            raise ServerUnreachable(f"the event stream broke off: {error}") from error
        if isinstance(frame, bytes):
            return read_preview(frame) or {}
        if not frame:
            self.close()
            raise ServerUnreachable("the server closed the event stream")
        return json.loads(frame)

    def close(self) -> None:
        self._socket.close()

    def _open(self) -> websocket.WebSocket:
        socket = self._server.listen(self._client_id, previews=self._previews)
        socket.settimeout(min(TICK_SECONDS, IDLE_SECONDS))
        self.openings += 1
        return socket


def run_prompt(
    server: ComfyServer,
    prompt: Prompt,
    *,
    canvas: Any = None,
    timeout: float | None = None,
    include_temp: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> RunResult:
    """Run an API-form prompt to its end and list the files it wrote.

    canvas: the UI form, if any, for the server to embed. timeout: seconds for waiting and running, None for ever.
    include_temp: list previews too. on_progress: called at every event that moves the progress line.

    Raises a QueueError. On KeyboardInterrupt and on timeout the run is cancelled on the server first.
    """
    client_id = uuid.uuid4().hex
    run = Run(prompt, str(uuid.uuid4()), on_progress)
    with closing(EventStream(server, client_id)) as events:
        try:
            left_out = server.submit(prompt, prompt_id=run.prompt_id, client_id=client_id, canvas=canvas)
            record = follow(server, run, events, timeout=timeout)
        except KeyboardInterrupt:
            with suppress(QueueError):
                server.cancel(run.prompt_id)
            raise
    raise_for_failure(run, record)
    files = output_files(record, include_temp=include_temp)
    return RunResult(run.prompt_id, files, left_out, was_cached(prompt, record))


def follow(
    server: ComfyServer,
    run: Run,
    events: EventStream,
    *,
    timeout: float | None = None,
    patience: float = PATIENCE_SECONDS,
    look_up: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Listen until /history has the run, through dropped connections; its record there.

    timeout: seconds from now after which the run is cancelled and RunFailed raised. patience: seconds without any
    answer after which ServerUnreachable is raised. look_up: called at least every TICK_SECONDS; what it raises ends
    the following. When the server no longer knows the run, raises RunVanished if it may have restarted since the call,
    else RunFailed: somebody deleted it.
    """
    last_event = last_contact = start = time.monotonic()
    openings = events.openings
    while timeout is None or time.monotonic() - start < timeout:
        look_up()
        try:
            event = events.next()
            if event is not None:
                last_event = last_contact = time.monotonic()
            idle = time.monotonic() - last_event >= IDLE_SECONDS
            if idle or (event is not None and run.take(event)):
                record = server.history(run.prompt_id)
                if record is None and idle:
                    record = _missing_record(server, run.prompt_id, restarted=events.openings > openings)
                if record is not None:
                    return record
                last_event = last_contact = time.monotonic()
        except ServerUnreachable as error:
            if time.monotonic() - last_contact > patience:
                raise ServerUnreachable(f"lost the server during run {run.prompt_id}: {error}") from error
            time.sleep(min(1.0, patience))
    server.cancel(run.prompt_id)
    raise RunFailed(f"not finished after {timeout:g} s, cancelled; allow more with --timeout")


def output_files(record: Mapping[str, Any], *, include_temp: bool = False) -> list[RemoteFile]:
    """Every file in a history record: each mapping with a filename, whichever key (images, gifs, …) it is under."""
    types = ("output", "temp") if include_temp else ("output",)
    found = {
        RemoteFile(str(item["filename"]), str(item.get("subfolder") or ""), str(item.get("type") or "output")): None
        for outputs in (record.get("outputs") or {}).values()
        for items in outputs.values()
        if isinstance(items, list)
        for item in items
        if isinstance(item, dict) and item.get("filename")
    }
    return [file for file in found if file.type in types]


def was_cached(prompt: Prompt, record: Mapping[str, Any]) -> bool:
    """Whether the server ran no output node: it answered from what it had kept of an earlier run."""
    messages = dict((record.get("status") or {}).get("messages") or ())
    cached = {str(node) for node in (messages.get("execution_cached") or {}).get("nodes") or ()}
    queued: Sequence[Any] = record.get("prompt") or ()  # [number, id, prompt, extra data, output nodes]
    outputs = queued[4] if len(queued) > 4 else prompt
    return cached.issuperset(str(node) for node in outputs)


def read_preview(frame: bytes) -> Preview | None:
    """A binary WebSocket message as a picture, None where it is none.

    Two forms, numbers big-endian: 1 = [uint32 1][uint32 format][picture]; 4 = [uint32 4][uint32 length][JSON of that
    length: node, prompt][picture].
    """
    kind, word = int.from_bytes(frame[:4], "big"), int.from_bytes(frame[4:8], "big")
    told: Mapping[str, Any] = {}
    image = frame[8:]
    if kind == 4:
        try:
            told = json.loads(image[:word])
        except ValueError:
            return None
        image = image[word:]
    suffix = next((suffix for magic, suffix in IMAGE_SUFFIXES.items() if image.startswith(magic)), None)
    if kind not in (1, 4) or suffix is None:
        return None
    return Preview(image, suffix, told.get("display_node_id") or told.get("node_id"), told.get("prompt_id"))


def raise_for_failure(run: Run, record: Mapping[str, Any]) -> None:
    """RunFailed when the history, or an error event that the history left out, says so."""
    status = record.get("status") or {}
    events = dict(status.get("messages") or ())
    error = events.get("execution_error") or run.error
    if error:
        title = title_of(run.prompt, error.get("node_id", "?"))
        raise RunFailed(f"{title}: {str(error.get('exception_message', 'failed')).strip()}")
    if "execution_interrupted" in events:
        title = title_of(run.prompt, events["execution_interrupted"].get("node_id", "?"))
        raise RunInterrupted(f"{title}: the run was interrupted on the server")
    if status.get("status_str", "success") != "success":
        raise RunFailed(f"the server reports {status['status_str']} without a message; see its log")


def _missing_record(server: ComfyServer, prompt_id: str, *, restarted: bool) -> dict[str, Any] | None:
    """None while the prompt is queued; its record if it ended just now; an error when the server forgot it."""
    if server.has_queued(prompt_id):
        return None
    record = server.history(prompt_id)
    if record is None:
        gone = "the run is neither in the server's queue nor in its history"
        if restarted:
            raise RunVanished(f"{gone}: the server restarted")
        raise RunFailed(f"{gone}: somebody deleted it there")
    return record
