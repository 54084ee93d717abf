"""ComfyUI's HTTP API on one server, one request at a time.

POST /prompt takes a prompt, the WebSocket /ws sends its progress, /history/{id} holds its outcome (the last event alone
does not tell success from failure), /view serves files, /queue and /interrupt cancel. Every answer is limited in size
and time.
"""

import base64
import json
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from ...lightforcing_core.files.json import listing, mapping, read_object
from ...lightforcing_core.files.output import free_name, whole_file
from .prompt import Prompt, UsageError, title_of

MOST_EVENT = 64 << 20  # bytes
MOST_JSON = 256 << 20  # /object_info of a server with many node packs and models has tens of millions
MOST_FILE = 1 << 40
SLOWEST = 4096  # bytes per second
MOST_FOLDERS, LONGEST_NAME = 32, 200  # of a file on the server; the name in bytes
RETRY_SECONDS = 1.0
TICK_SECONDS = 0.5  # longest wait for one event
_LOCAL = ("localhost", "127.0.0.1", "::1")
_AWAY = (502, 503, 504)  # a proxy's answers while the server behind it restarts
_UNFIT = re.compile(r"[\x00-\x1f\x7f:\ud800-\udfff]")  # control characters, a drive's colon, halves of characters
Result = TypeVar("Result")


class QueueError(OSError):
    """A request or a run that failed; each line of the message makes sense alone."""


class ServerUnreachable(QueueError):
    """No server, or none that speaks ComfyUI's protocol, answers at the address."""


class RemoteFile(NamedTuple):
    """A file on the server, as its history names it."""

    filename: str
    subfolder: str
    type: str

    @property
    def relative_path(self) -> Path:
        """Its path in the output folder; never outside it, even if the server asks for that."""
        parts = _UNFIT.sub("_", f"{self.subfolder}/{self.filename}".replace("\\", "/")).split("/")
        return Path(*([part for part in parts if part not in ("", ".", "..")] or ["unnamed"]))


class ComfyServer:
    """One ComfyUI server.

    url: `host:port` or `http(s)://[user:password@]host:port[/path]`; the attribute `url` is without the password, which
    goes to the server (or the proxy in front of it) as basic authentication.
    patience: seconds without an answer after which the server counts as lost.
    openings: how often the event stream was opened.
    """

    def __init__(self, url: str, *, patience: float = 30.0) -> None:
        try:
            address = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            shown = url.rpartition("@")[2]
            raise UsageError(f"{shown} is not a server address; use one like http://127.0.0.1:8188")
        self.url = f"{address.scheme}://{address.netloc.decode()}{address.path.rstrip('/')}"
        self._patience, self.openings = patience, 0
        self._socket: ClientConnection | None = None
        secret = base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {secret}"} if address.userinfo else {}
        self._direct = address.host in _LOCAL  # the environment's proxy does not serve this machine
        system = ssl.create_default_context()  # httpx alone would not know the certificates of the system's store
        self._client = httpx.Client(
            base_url=self.url, headers=self._headers, timeout=patience, verify=system, trust_env=not self._direct
        )

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._client.close()

    def patiently(self, call: Callable[[], Result]) -> Result:
        """Repeat `call` while the server does not answer, until patience runs out."""
        deadline = None
        while True:
            try:
                return call()
            except ServerUnreachable:
                deadline = deadline or time.monotonic() + self._patience
                if time.monotonic() > deadline:
                    raise
                time.sleep(min(RETRY_SECONDS, self._patience))

    def object_info(self) -> Mapping[str, Any]:
        """The server's node definitions."""
        return self._ask("GET", "/object_info")

    def submit(self, prompt: Prompt, prompt_id: str, client_id: str, *, previews: bool) -> list[str]:
        """Queue `prompt`; returns one line per node error in parts that the server will not run.

        previews: make the sampler send pictures even if the server has previews off. Raises QueueError with the
        server's own message and one line per node error if it refuses the prompt.
        """
        extra = {"preview_method": "auto"} if previews else {}
        body = {"prompt": prompt, "client_id": client_id, "prompt_id": prompt_id, "extra_data": extra}
        return node_error_lines(prompt, self._ask("POST", "/prompt", body).get("node_errors"))

    def cancel(self, prompt_id: str) -> None:
        """Take the prompt out of the queue, and interrupt it if it is running."""
        self._ask("POST", "/queue", {"delete": [prompt_id]})
        self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """The record of a finished prompt, None while it has none."""
        return mapping(self._ask("GET", f"/history/{prompt_id}").get(prompt_id)) or None

    def has_queued(self, prompt_id: str) -> bool:
        """Whether the prompt is running or waiting."""
        queue = self._ask("GET", "/queue")
        rows = [*listing(queue.get("queue_running")), *listing(queue.get("queue_pending"))]
        return any(prompt_id in listing(row)[1:2] for row in rows)

    def listen(self, client_id: str) -> ClientConnection:
        """Open the stream of events about this client's prompts. Raises ServerUnreachable."""
        try:
            self._socket = socket = connect(
                f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}",
                additional_headers=self._headers,
                proxy=None if self._direct else True,
                open_timeout=self._patience,
                close_timeout=1,
                max_size=MOST_EVENT,
            ).__enter__()  # `close` ends it
            # Ask for previews that name their node; ComfyUI reads this in the first message only.
            socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        except (WebSocketException, OSError) as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {error}") from error
        self.openings += 1
        return socket

    def next_event(self, client_id: str) -> str | bytes | None:
        """The next message of the event stream, None if none came within TICK_SECONDS.

        Raises ServerUnreachable when the stream breaks off; the next call opens it again.
        """
        socket = self._socket or self.listen(client_id)
        try:
            return socket.recv(timeout=TICK_SECONDS)
        except TimeoutError:
            return None
        except (WebSocketException, OSError) as error:
            socket.close()
            self._socket = None
            raise ServerUnreachable(f"the event stream broke off: {error}") from error

    def download(self, remote: RemoteFile, folder: Path) -> Path:
        """Fetch a file below `folder`, completely or not at all; an existing file is never overwritten."""
        path = remote.relative_path
        if len(path.parts) > MOST_FOLDERS or any(len(part.encode()) > LONGEST_NAME for part in path.parts):
            raise QueueError(f"{remote.filename[:80]}… is too long a file name; shorten the save node's prefix")
        target = free_name(folder / path)
        target.parent.mkdir(parents=True, exist_ok=True)
        query = urllib.parse.urlencode(remote._asdict(), errors="replace")
        answer = self._answer("GET", f"/view?{query}")
        with whole_file(target) as partial, answer as response, partial.open("wb") as file:
            file.writelines(self._bounded(response, MOST_FILE))
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
        """A successful answer, its body unread; any other raises an error with the server's message."""
        content, headers = b"" if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            with self._client.stream(method, path, content=content, headers=headers) as response:
                if not response.is_success:
                    content = b"".join(self._bounded(response, MOST_JSON))
                    raise self._refusal(path, response, content, mapping(body).get("prompt") or {})
                yield response
        except httpx.HTTPError as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {str(error) or repr(error)}") from error

    def _bounded(self, response: httpx.Response, most: int) -> Iterator[bytes]:
        """The parts of a body. Raises QueueError if it is too large, ServerUnreachable if it arrives too slowly."""
        start, received = time.monotonic(), 0
        for part in response.iter_bytes():
            received += len(part)
            if received > most:
                raise QueueError(f"an answer of {self.url} is larger than {most} bytes")
            if time.monotonic() - start > self._patience + received / SLOWEST:
                raise ServerUnreachable(f"{self.url} sends less than {SLOWEST} bytes a second")
            yield part

    def _refusal(self, path: str, response: httpx.Response, content: bytes, prompt: Prompt) -> QueueError:
        """The server's own message for an HTTP error."""
        answer = read_object(content)
        error = mapping(answer.get("error"))
        if error:
            lines = node_error_lines(prompt, answer.get("node_errors"))
            return QueueError("\n".join([str(error.get("message")), *lines] if lines else [_with_details(error)]))
        text = response.headers.get("Location") or content[:300].decode(errors="replace").strip()
        status = f"{self.url}{path} answers HTTP {response.status_code} {response.reason_phrase}: {text}"
        return ServerUnreachable(status) if response.status_code in _AWAY else QueueError(status)


def node_error_lines(prompt: Prompt, node_errors: Any) -> list[str]:
    """`node title: message (details)` for every error in a server's node_errors; the details name the input."""
    return [
        f"{title_of(prompt, node)}: {_with_details(error)}"
        for node, entry in mapping(node_errors).items()
        for error in map(mapping, listing(mapping(entry).get("errors")))
    ]


def _with_details(error: Mapping[str, Any]) -> str:
    message, details = str(error.get("message", "error")), str(error.get("details") or "")
    return f"{message} ({details})" if details not in message else message
