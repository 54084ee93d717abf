"""ComfyUI's HTTP and WebSocket protocol, one request at a time.

POST /prompt takes a prompt, the WebSocket /ws tells how it goes, /history/{id} holds the verdict (the last event alone
does not tell success from failure), /view serves files, /interrupt and /queue cancel.
"""

import base64
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import websocket

from .files.output import free_name, whole_file

Prompt = Mapping[str, Mapping[str, Any]]

VIEW_CHUNK = 1 << 20
_UNFIT = re.compile(r"[\x00-\x1f\x7f:]")  # in no file name: control characters, and what stands behind a drive


class QueueError(RuntimeError):
    """A run that did not succeed; each line of the message stands on its own."""


class ServerUnreachable(QueueError):
    """Nothing, or nothing that speaks ComfyUI's protocol, answers at the address."""


class PromptRejected(QueueError):
    """The server validated the prompt and refused it."""


class RunFailed(QueueError):
    """The prompt ran and ended in an error, was interrupted, ran out of time, or vanished."""


class RunInterrupted(RunFailed):
    """Somebody cancelled the running prompt on the server."""


class RunVanished(RunFailed):
    """The server has forgotten the prompt: it restarted."""


class RemoteFile(NamedTuple):
    """A file on the server, as its history names it."""

    filename: str
    subfolder: str
    type: str

    @property
    def relative_path(self) -> Path:
        """Where it goes below the output folder; never outside of it, whatever the server says."""
        return Path(*_parts(self.subfolder), *(_parts(self.filename) or ("unnamed",)))


class ComfyServer:
    """One ComfyUI server. http_timeout: seconds per request.

    url: `host:port` or `http(s)://[user:password@]host:port[/path]`; the attribute `url` is without the password, which
    goes to the server (or the proxy before it) as basic authentication.
    """

    def __init__(self, url: str, *, http_timeout: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        login, _, address = parts.netloc.rpartition("@")
        if parts.scheme not in ("http", "https") or not address:
            shown = f"{parts.scheme}://{address}"
            raise ServerUnreachable(f"{shown} is not a server address; use one like http://127.0.0.1:8188")
        self.url = f"{parts.scheme}://{address.lower()}{parts.path.rstrip('/')}"
        self.http_timeout = http_timeout
        secret = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        self._headers = {"Authorization": f"Basic {secret}"} if login else {}

    def get(self, path: str) -> Any:
        """GET a JSON document. Raises ServerUnreachable or QueueError."""
        return self._json(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST JSON; returns the JSON answer, None for an empty one. Raises ServerUnreachable or QueueError."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        return self._json(request)

    def submit(
        self, prompt: Prompt, *, prompt_id: str, client_id: str, canvas: Any = None, previews: bool = False
    ) -> list[str]:
        """Queue `prompt`; returns one line per node error of parts that the server will not run.

        canvas: the UI form, embedded by the server in the files it writes. previews: have the sampler make pictures
        on the way, whatever the server was started with. Raises PromptRejected with the server's
        own message and one `title: input: message` line per node error.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": client_id, "prompt_id": prompt_id}
        extra: dict[str, Any] = {}
        if canvas is not None:
            extra["extra_pnginfo"] = {"workflow": canvas}
        if previews:
            extra["preview_method"] = "auto"
        if extra:
            body["extra_data"] = extra
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

    def listen(self, client_id: str, *, previews: bool = False) -> websocket.WebSocket:
        """Open the event stream; with `previews` ask for pictures with their node's name. Raises ServerUnreachable."""
        address = f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}"
        try:
            socket = websocket.create_connection(address, timeout=self.http_timeout, header=self._headers)
            if previews:  # must be the first message
                socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        except (websocket.WebSocketException, OSError) as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {error}") from error
        return socket

    def knows(self, prompt_id: str) -> bool:
        """Whether the prompt is waiting, running, or over and remembered."""
        return self.has_queued(prompt_id) or self.history(prompt_id) is not None

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
                file.flush()
                os.fsync(file.fileno())
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
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)
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


def node_error_lines(prompt: Prompt, node_errors: Mapping[str, Any] | None) -> list[str]:
    """`node title: input: message` for every error in a server's node_errors."""
    lines = []
    for node_id, entry in (node_errors or {}).items():
        for error in entry.get("errors", ()):
            name = (error.get("extra_info") or {}).get("input_name")
            message, details = str(error.get("message", "error")), str(error.get("details") or "")
            if name:
                # "name: why", "name - why" where a node refuses by itself, or the name alone
                details = re.sub(rf"^{re.escape(name)}(:\s*|\s+-\s+|$)", "", details).strip()
            message += f" ({details})" if details and details not in message else ""
            lines.append(": ".join(part for part in (title_of(prompt, node_id), name, message) if part))
    return lines


def title_of(prompt: Prompt, node_id: str) -> str:
    """A node's title for the user: its own, else its class, else its id."""
    node = prompt.get(str(node_id), {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}")


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
    """Path components without a root, a drive or a way up, with either kind of slash."""
    parts = (_UNFIT.sub("_", part) for part in path.replace("\\", "/").split("/"))
    return tuple(part for part in parts if part not in ("", ".", ".."))
