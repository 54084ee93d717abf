"""ComfyUI's HTTP API on one server, one request at a time.

POST /prompt takes a prompt, the WebSocket /ws sends its progress, /history/{id} holds its outcome (the last event alone
does not tell success from failure), /view serves files, /queue and /interrupt cancel. Every answer is bounded in size
and time.
"""

import base64
import json
import os
import re
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from ...lightforcing_core.files.output import free_name, whole_file
from .prompt import Prompt, UsageError, listing, mapping, read_object, title_of

MOST_EVENT = 64 << 20  # bytes
MOST_JSON = 256 << 20  # /object_info of a server with many node packs and models has tens of millions
MOST_FILE = 1 << 40
SLOWEST = 4096  # bytes per second
MOST_FOLDERS, LONGEST_NAME = 32, 200  # of a file on the server; the name in bytes
RETRY_SECONDS = 1.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
_AWAY = (502, 503, 504)  # a proxy's answers while the server behind it restarts
# In no file name: control characters, Windows' mark of a drive, halves of characters.
_UNFIT = re.compile(r"[\x00-\x1f\x7f:\ud800-\udfff]")


Result = TypeVar("Result")


class QueueError(OSError):
    """A request or a run that did not succeed; each line of the message can be read alone."""


class ServerUnreachable(QueueError):
    """Nothing, or nothing that speaks ComfyUI's protocol, answers at the address."""


def patiently(call: Callable[[], Result], patience: float) -> Result:
    """`call`, again and again while the server does not answer, for so many seconds."""
    deadline = None
    while True:
        try:
            return call()
        except ServerUnreachable:
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() > deadline:
                raise
            time.sleep(min(RETRY_SECONDS, patience))


class RemoteFile(NamedTuple):
    """A file on the server, as its history names it."""

    filename: str
    subfolder: str
    type: str

    @property
    def relative_path(self) -> Path:
        """Its place below the output folder, never outside of it, whatever the server says."""
        return Path(*_parts(self.subfolder), *(_parts(self.filename) or ("unnamed",)))


class ComfyServer:
    """One ComfyUI server. timeout: seconds that it may stay silent within a request.

    url: `host:port` or `http(s)://[user:password@]host:port[/path]`; the attribute `url` is without the password, which
    goes to the server (or the proxy in front of it) as basic authentication.
    """

    def __init__(self, url: str, *, timeout: float = 30.0) -> None:
        try:
            address = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            shown = url.rpartition("@")[2]
            raise UsageError(f"{shown} is not a server address; use one like http://127.0.0.1:8188")
        self.url = f"{address.scheme}://{address.netloc.decode()}{address.path.rstrip('/')}"
        self._timeout = timeout
        secret = base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {secret}"} if address.userinfo else {}
        # The environment's proxy never serves this machine, nor the hosts that the system excludes from it.
        self._direct = address.host in _LOCAL or bool(urllib.request.proxy_bypass(address.host))
        system = ssl.create_default_context()  # httpx alone would not know the certificates of the system's store
        try:
            self._client = httpx.Client(
                base_url=self.url, headers=self._headers, timeout=timeout, verify=system, trust_env=not self._direct
            )
        except (ImportError, ValueError) as error:  # ALL_PROXY may name a kind of proxy that httpx cannot use
            raise UsageError(f"cannot use the proxy that this environment names: {error}") from error

    def close(self) -> None:
        self._client.close()

    def object_info(self) -> Mapping[str, Any]:
        """The server's node definitions."""
        return self._ask("GET", "/object_info")

    def submit(self, prompt: Prompt, prompt_id: str, client_id: str, *, previews: bool) -> list[str]:
        """Queue `prompt`; returns one line per node error in parts that the server will not run.

        previews: make the sampler send pictures, whatever the server was started with. Raises QueueError with the
        server's own message and one `title: input: message` line per node error if it refuses the prompt.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": client_id, "prompt_id": prompt_id}
        if previews:
            body["extra_data"] = {"preview_method": "auto"}
        return node_error_lines(prompt, self._ask("POST", "/prompt", body).get("node_errors"))

    def cancel(self, prompt_id: str) -> None:
        """Take the prompt out of the queue, and interrupt it if it is running."""
        self._ask("POST", "/queue", {"delete": [prompt_id]})
        self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """The record of a finished prompt, None while it has none."""
        record = self._ask("GET", f"/history/{prompt_id}").get(prompt_id)
        return record if isinstance(record, dict) else None

    def has_queued(self, prompt_id: str) -> bool:
        """Whether the prompt is running or waiting."""
        queue = self._ask("GET", "/queue")
        rows = [*listing(queue.get("queue_running")), *listing(queue.get("queue_pending"))]
        return any(prompt_id in listing(row)[1:2] for row in rows)

    def knows(self, prompt_id: str) -> bool:
        """Whether the prompt is waiting, running, or finished and remembered."""
        return self.has_queued(prompt_id) or self.history(prompt_id) is not None

    def listen(self, client_id: str, *, previews: bool) -> ClientConnection:
        """Open the event stream; with `previews` ask for pictures with their node's name. Raises ServerUnreachable."""
        address = f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}"
        try:
            socket = connect(
                address,
                additional_headers=self._headers,
                compression=None,
                proxy=None if self._direct else True,
                open_timeout=self._timeout,
                close_timeout=1,
                max_size=MOST_EVENT,
            ).__enter__()  # the caller closes it
            if previews:  # must be the first message
                socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        except (WebSocketException, OSError, ImportError) as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {error}") from error
        return socket

    def download(self, remote: RemoteFile, folder: Path) -> Path:
        """Fetch a file below `folder`, whole or not at all; an existing file is never overwritten."""
        path = remote.relative_path
        if len(path.parts) > MOST_FOLDERS or any(len(part.encode()) > LONGEST_NAME for part in path.parts):
            raise QueueError(f"{remote.filename[:80]}… is too long a file name; shorten the save node's prefix")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target = free_name(target)
        query = urllib.parse.urlencode(remote._asdict(), errors="replace")
        answer = self._answer("GET", f"/view?{query}")
        with whole_file(target) as partial, answer as response, partial.open("wb") as file:
            file.writelines(self._bounded(response, MOST_FILE))
            file.flush()
            os.fsync(file.fileno())
        return target

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The JSON object of an answer, an empty one if the answer is empty. Raises ServerUnreachable or QueueError."""
        with self._answer(method, path, body) as response:
            text = b"".join(self._bounded(response, MOST_JSON))
        answer = read_object(text)
        if text and not answer and text.strip() != b"{}":
            raise ServerUnreachable(f"{self.url}{path} does not answer as ComfyUI does; is it a ComfyUI server?")
        return answer

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[httpx.Response]:
        """A good answer, its body still to be read; any other raises the server's own words."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with self._client.stream(method, path, content=content, headers=headers) as response:
                if not response.is_success:
                    content = b"".join(self._bounded(response, MOST_JSON))
                    raise self._refusal(path, response, content, mapping(body).get("prompt") or {})
                yield response
        except httpx.HTTPError as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {str(error) or repr(error)}") from error

    def _bounded(self, response: httpx.Response, most: int) -> Iterator[bytes]:
        """The parts of a body. Raises QueueError if it is too large, ServerUnreachable if it only drips."""
        start, received = time.monotonic(), 0
        for part in response.iter_bytes():
            received += len(part)
            if received > most:
                raise QueueError(f"an answer of {self.url} is larger than {most} bytes")
            if time.monotonic() - start > self._timeout + received / SLOWEST:
                raise ServerUnreachable(f"{self.url} sends less than {SLOWEST} bytes a second")
            yield part

    def _refusal(self, path: str, response: httpx.Response, content: bytes, prompt: Prompt) -> QueueError:
        """The server's own words for an HTTP error."""
        status = f"HTTP {response.status_code} {response.reason_phrase}"
        if response.status_code in _AWAY:
            return ServerUnreachable(f"no ComfyUI server answers at {self.url}: {status}")
        answer = read_object(content)
        error = mapping(answer.get("error"))
        if not error:
            text = response.headers.get("Location") or content[:300].decode(errors="replace").strip()
            return QueueError(f"{self.url}{path} answers {status}: {text}")
        lines = node_error_lines(prompt, answer.get("node_errors"))
        message = str(error.get("message", error.get("type")))
        return QueueError("\n".join([message if lines else _with_details(message, error.get("details")), *lines]))


def node_error_lines(prompt: Prompt, node_errors: Any) -> list[str]:
    """`node title: input: message` for every error in a server's node_errors."""
    lines = []
    for node, entry in mapping(node_errors).items():
        for error in map(mapping, listing(mapping(entry).get("errors"))):
            name = str(mapping(error.get("extra_info")).get("input_name") or "")
            details = str(error.get("details") or "")
            if name:
                # "name: why", "name - why" if a node refuses by itself, or the name alone
                details = re.sub(rf"^{re.escape(name)}(:\s*|\s+-\s+|$)", "", details).strip()
            message = _with_details(str(error.get("message", "error")), details)
            lines.append(": ".join(part for part in (title_of(prompt, node), name, message) if part))
    return lines


def _with_details(message: str, details: Any) -> str:
    return f"{message} ({details})" if details and str(details) not in message else message


def _parts(path: str) -> tuple[str, ...]:
    """Path components without a root, a drive or a way up, with either kind of slash."""
    parts = (_UNFIT.sub("_", part) for part in path.replace("\\", "/").split("/"))
    return tuple(part for part in parts if part not in ("", ".", ".."))
