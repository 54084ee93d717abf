"""A client for a headless ComfyUI server: submit a prompt, follow it, bring its files home.

`run_prompt` is the whole job; `ComfyServer` holds the address. The server's protocol: POST /prompt, the WebSocket
/ws for events, /history/{id} for the verdict (the last event alone does not tell success from failure), /view for
files, /interrupt and /queue to cancel.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import websocket

from .output_files import free_name, whole_file

Prompt = Mapping[str, Mapping[str, Any]]

IDLE_SECONDS = 2.0  # without an event for so long, ask /history
PATIENCE_SECONDS = 30.0  # a server that stays away for longer is lost
VIEW_CHUNK = 1 << 20


class QueueError(RuntimeError):
    """A run that did not succeed; each line of the message stands on its own."""


class ServerUnreachable(QueueError):
    """Nothing, or nothing that speaks ComfyUI's protocol, answers at the address."""


class PromptRejected(QueueError):
    """The server validated the prompt and refused it."""


class RunFailed(QueueError):
    """The prompt ran and ended in an error, was interrupted, ran out of time, or vanished."""


class RemoteFile(NamedTuple):
    """A file on the server, as its history names it."""

    filename: str
    subfolder: str
    type: str

    @property
    def relative_path(self) -> Path:
        """Where it goes below the output folder; never outside of it, whatever the server says."""
        parts = [part for part in (*_parts(self.subfolder), *_parts(self.filename)) if part not in ("", ".", "..")]
        return Path(*parts)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the node at work, its own progress, and how many nodes are through."""

    title: str
    value: float
    total: float
    nodes_done: int
    nodes: int


@dataclass(frozen=True)
class RunResult:
    """A successful run: what it wrote, and node errors of the parts that the server left out."""

    prompt_id: str
    files: list[RemoteFile]
    left_out: list[str]


class ComfyServer:
    """One ComfyUI server. url: `host:port` or `http(s)://host:port[/path]`; http_timeout: seconds per request."""

    def __init__(self, url: str, *, http_timeout: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ServerUnreachable(f"{url} is not a server address; use one like http://127.0.0.1:8188")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.http_timeout = http_timeout

    def get(self, path: str) -> Any:
        """GET a JSON document. Raises ServerUnreachable or QueueError."""
        return self._json(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST JSON; returns the JSON answer, None for an empty one. Raises ServerUnreachable or QueueError."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        return self._json(request)

    def submit(self, prompt: Prompt, *, prompt_id: str, client_id: str, canvas: Any = None) -> list[str]:
        """Queue `prompt`; returns one line per node error of parts that the server will not run.

        canvas: the UI form, embedded by the server in the files it writes. Raises PromptRejected with the server's
        own message and one `title: input: message` line per node error.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": client_id, "prompt_id": prompt_id}
        if canvas is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": canvas}}
        answer = self.post("/prompt", body)
        return node_error_lines(prompt, answer.get("node_errors"))

    def cancel(self, prompt_id: str) -> None:
        """Take the prompt out of the queue, and interrupt it where it is running."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a finished prompt, None while it has none."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def has_queued(self, prompt_id: str) -> bool:
        """Whether the prompt is running or waiting."""
        queue = self.get("/queue")
        return any(row[1] == prompt_id for row in (*queue["queue_running"], *queue["queue_pending"]))

    def listen(self, client_id: str) -> websocket.WebSocket:
        """Open the event stream. Raises ServerUnreachable."""
        address = f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}"
        try:
            socket = websocket.create_connection(address, timeout=self.http_timeout)
        except (websocket.WebSocketException, OSError) as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {error}") from error
        socket.settimeout(IDLE_SECONDS)
        return socket

    def download(self, remote: RemoteFile, folder: Path) -> Path:
        """Fetch a file below `folder`, whole or not at all; an existing file is never overwritten."""
        target = folder / remote.relative_path
        target.parent.mkdir(parents=True, exist_ok=True)
        target = free_name(target)
        query = urllib.parse.urlencode(remote._asdict())
        with whole_file(target) as partial, self._open(urllib.request.Request(f"{self.url}/view?{query}")) as answer:
            expected, received = answer.headers.get("Content-Length"), 0
            with partial.open("wb") as file:
                while chunk := self._read(answer):
                    file.write(chunk)
                    received += len(chunk)
            if expected is not None and received != int(expected):
                raise QueueError(f"{remote.filename}: {received} of {expected} bytes arrived; try again")
        return target

    def _json(self, request: urllib.request.Request) -> Any:
        with self._open(request) as answer:
            text = b"".join(iter(lambda: self._read(answer), b""))
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerUnreachable(f"{request.full_url} does not answer with JSON; is it a ComfyUI server?") from error

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=self.http_timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(request, error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {reason}") from error

    def _read(self, answer: Any) -> bytes:
        try:
            return answer.read(VIEW_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.url} broke off in the middle of an answer: {error}") from error


def run_prompt(
    server: ComfyServer,
    prompt: Prompt,
    *,
    canvas: Any = None,
    timeout: float | None = None,
    include_temp: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Run an API-form prompt to its end and list the files it wrote.

    canvas: the UI form, if any, for the server to embed. timeout: seconds for waiting and running, None for ever.
    include_temp: list previews too. on_progress: called at every event that moves the progress line.

    Raises a QueueError. On KeyboardInterrupt and on timeout the run is cancelled on the server first.
    """
    prompt_id, client_id = str(uuid.uuid4()), uuid.uuid4().hex
    run = _Run(prompt, prompt_id, on_progress or (lambda progress: None))
    deadline = None if timeout is None else time.monotonic() + timeout
    with closing(_EventStream(server, client_id)) as events:
        try:
            left_out = server.submit(prompt, prompt_id=prompt_id, client_id=client_id, canvas=canvas)
            record = _follow(server, run, events, deadline)
        except KeyboardInterrupt:
            with suppress(QueueError):
                server.cancel(prompt_id)
            raise
        except _TimedOut:
            server.cancel(prompt_id)
            raise RunFailed(f"not finished after {timeout:g} s, cancelled; allow more with --timeout") from None
    _raise_for_failure(run, record)
    return RunResult(prompt_id, output_files(record, include_temp=include_temp), left_out)


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


def node_error_lines(prompt: Prompt, node_errors: Mapping[str, Any] | None) -> list[str]:
    """`node title: input: message` for every error in a server's node_errors."""
    lines = []
    for node_id, entry in (node_errors or {}).items():
        for error in entry.get("errors", ()):
            name = (error.get("extra_info") or {}).get("input_name")
            message, details = str(error.get("message", "error")), str(error.get("details") or "")
            if name:
                details = details.removeprefix(name).removeprefix(":").strip()
            message += f" ({details})" if details and details not in message else ""
            lines.append(": ".join(part for part in (title_of(prompt, node_id), name, message) if part))
    return lines


def title_of(prompt: Prompt, node_id: str) -> str:
    """A node's title for the user: its own, else its class, else its id."""
    node = prompt.get(str(node_id), {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}")


class _TimedOut(Exception):
    """The deadline passed."""


@dataclass
class _Run:
    """What the events have said so far about one prompt."""

    prompt: Prompt
    prompt_id: str
    on_progress: Callable[[Progress], None]
    started: bool = False
    node: str | None = None
    done: set[str] = field(default_factory=set)
    error: Mapping[str, Any] | None = None

    def take(self, message: Mapping[str, Any]) -> bool:
        """Note one event; whether it may have been the last."""
        kind, data = message.get("type"), message.get("data") or {}
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


class _EventStream:
    """The server's WebSocket, opened again after it dropped."""

    def __init__(self, server: ComfyServer, client_id: str) -> None:
        self._server, self._client_id = server, client_id
        self._socket = server.listen(client_id)

    def next(self) -> dict[str, Any] | None:
        """The next event, None when none came in time; a binary preview is an event without content.

        Raises ServerUnreachable when the stream breaks off; the next call opens it again.
        """
        if not self._socket.connected:
            self._socket = self._server.listen(self._client_id)
        try:
            frame = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return None
        except (websocket.WebSocketException, OSError) as error:
            self.close()
            raise ServerUnreachable(f"the event stream broke off: {error}") from error
        if isinstance(frame, bytes):
            return {}
        if not frame:
            self.close()
            raise ServerUnreachable("the server closed the event stream")
        return json.loads(frame)

    def close(self) -> None:
        self._socket.close()


def _follow(server: ComfyServer, run: _Run, events: _EventStream, deadline: float | None) -> dict[str, Any]:
    """Listen until /history has the run, through dropped connections; its record there."""
    last_contact = time.monotonic()
    while deadline is None or time.monotonic() < deadline:
        try:
            event = events.next()
            if event is None or run.take(event):
                record = server.history(run.prompt_id)
                if record is None and event is None:
                    record = _missing_record(server, run.prompt_id)
                if record is not None:
                    return record
            last_contact = time.monotonic()
        except ServerUnreachable as error:
            if time.monotonic() - last_contact > PATIENCE_SECONDS:
                raise ServerUnreachable(f"lost the server during run {run.prompt_id}: {error}") from error
            time.sleep(1.0)
    raise _TimedOut


def _missing_record(server: ComfyServer, prompt_id: str) -> dict[str, Any] | None:
    """None while the prompt is queued; its record if it ended just now; RunFailed when the server forgot it."""
    if server.has_queued(prompt_id):
        return None
    record = server.history(prompt_id)
    if record is None:
        raise RunFailed(
            "the run is neither in the server's queue nor in its history: it was deleted there, or the server restarted"
        )
    return record


def _raise_for_failure(run: _Run, record: Mapping[str, Any]) -> None:
    """RunFailed when the history, or an error event that the history left out, says so."""
    status = record.get("status") or {}
    events = dict(status.get("messages") or ())
    error = events.get("execution_error") or run.error
    if error:
        title = title_of(run.prompt, error.get("node_id", "?"))
        raise RunFailed(f"{title}: {str(error.get('exception_message', 'failed')).strip()}")
    if "execution_interrupted" in events:
        title = title_of(run.prompt, events["execution_interrupted"].get("node_id", "?"))
        raise RunFailed(f"{title}: the run was interrupted on the server")
    if status.get("status_str", "success") != "success":
        raise RunFailed(f"the server reports {status['status_str']} without a message; see its log")


def _refusal(request: urllib.request.Request, error: urllib.error.HTTPError) -> QueueError:
    """The server's own words for an HTTP error."""
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return QueueError(f"{request.full_url} answers HTTP {error.code} {error.reason}: {text.strip()[:300]}")
    prompt = json.loads(request.data).get("prompt", {}) if isinstance(request.data, bytes) else {}
    said = answer["error"]
    message, details = str(said.get("message", said.get("type"))), str(said.get("details") or "")
    lines = node_error_lines(prompt, answer.get("node_errors"))
    if not lines and details and details not in message:
        message += f" ({details})"
    return PromptRejected("\n".join([message, *lines]))


def _parts(path: str) -> tuple[str, ...]:
    """Path components without a root or drive, with either kind of slash."""
    clean = PurePosixPath(path.replace("\\", "/"))
    return tuple(part.replace(":", "_") for part in clean.parts if part != clean.root)
