"""ComfyUI's HTTP API on one server, one request at a time.

POST /prompt takes a prompt, the WebSocket /ws sends its progress, /history/{id} holds its outcome (the last event alone
does not tell success from failure), /view serves files, /queue and /interrupt cancel. Every answer is limited in size
and time. No redirect is followed, so a login stays with its host.
"""

import asyncio
import base64
import json
import math
import netrc
import os
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import anyio
import httpx
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ...lightforcing_core.files.json import listing, mapping, read_object
from ...lightforcing_core.files.output import free_name, whole_file
from .prompt import Prompt, UsageError, printable, title_of

MOST_EVENT = 8 << 20  # bytes
MOST_JSON = 12 << 20
MOST_INFO = 5 << 20  # of all node classes of a prompt
MOST_QUEUE = 64 << 20  # /queue repeats the whole prompt of every run that waits
MOST_MESSAGE = 10_000  # characters
MOST_FILE = 16 << 30
SLOWEST = 16384  # bytes per second of a file
LONGEST_NAME, LONGEST_PATH = 200, 1000  # of a file on the server, in bytes
RETRY_SECONDS = 1.0
TICK_SECONDS = 0.5  # longest wait for one event
_LOCAL = ("localhost", "127.0.0.1", "::1")
_IMAGE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
_BUSY = (429, 502, 503, 504)  # too many requests, and a proxy's answers while the server behind it restarts
_UNFIT = re.compile(r"[\x00-\x1f\x7f:\ud800-\udfff]")  # control characters, a drive's colon, halves of characters
_HEADER = re.compile(r"([\w!#$%&'*+.^`|~-]+): *([!-~][ -~]*)", re.ASCII)
Result = TypeVar("Result")


class QueueError(OSError):
    """A request or a run that failed; each line of the message makes sense alone."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message[:MOST_MESSAGE]))


class ServerUnreachable(QueueError):
    """No server, or none that speaks ComfyUI's protocol, answers at the address."""


class ServerBusy(ServerUnreachable):
    """The server, or the proxy in front of it, asks to come back later."""


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


class _Stream(ClientConnection):
    """An event stream that follows no redirect: the login would go along."""

    def handshake(self, *arguments: Any, **options: Any) -> None:
        try:
            super().handshake(*arguments, **options)
        except InvalidStatus as error:
            raise InvalidHandshake(str(error)) from error


class ComfyServer:
    """One ComfyUI server.

    url: `host:port` or `http(s)://[user:password@]host:port[/path]`; the attribute `url` is without the login.
    patience: seconds without a whole answer after which the server counts as lost.
    losses: how often the connection was lost, as it is when the server restarts.
    client_id: of the event stream, and of the prompts whose events it brings.
    """

    def __init__(self, url: str, *, patience: float = 30.0) -> None:
        try:
            address = httpx.URL(url if "://" in url else f"http://{url}")
            address.raw_host.decode().encode("idna")  # as sockets do: parts of 1 to 63 letters
            usable = address.scheme in ("http", "https") and address.host and (address.port or 0) < 65536
        except (httpx.InvalidURL, ValueError):
            usable = False
        if not usable:
            shown = url.rpartition("@")[2]
            raise UsageError(f"{shown} is not a server address; use one like http://127.0.0.1:8188")
        self.url = f"{address.scheme}://{address.netloc.decode()}{address.path.rstrip('/')}"
        self._patience, self.losses, self.client_id = patience, 0, ""
        self._socket: ClientConnection | None = None
        self._next_opening = 0.0
        self._headers = login_headers(address)
        self._direct = address.host in _LOCAL  # the environment's proxy does not serve this machine
        system = ssl.create_default_context()  # httpx alone would not know the certificates of the system's store
        headers = [*self._headers.items(), ("Accept-Encoding", "identity")]
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=patience, verify=system, trust_env=not self._direct
        )
        self._loop = asyncio.new_event_loop()  # the way to limit the time of a whole answer

    def close(self) -> None:
        self._hang_up()
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())  # of answers that were not read to their end
        self._loop.close()

    def patiently(self, call: Callable[[], Result], error: type[ServerUnreachable] = ServerUnreachable) -> Result:
        """Repeat `call` while it raises `error`, until patience runs out."""
        deadline = None
        while True:
            try:
                return call()
            except error:
                deadline = deadline or time.monotonic() + self._patience
                if time.monotonic() > deadline:
                    raise
                time.sleep(min(RETRY_SECONDS, self._patience))

    def object_info(self, classes: Iterable[str]) -> dict[str, Any]:
        """The server's definitions of these node classes, as far as it knows them."""
        found: dict[str, Any] = {}
        left = MOST_INFO
        for name in dict.fromkeys(classes):
            path = f"/object_info/{urllib.parse.quote(name, '', errors='replace')}"
            text = self.patiently(partial(self._read, "GET", path, left), ServerBusy)
            left -= len(text)
            found |= self._object(path, text)
        return found

    def submit(self, prompt: Prompt, prompt_id: str, *, previews: bool) -> list[str]:
        """Queue `prompt`; returns one line per node error in parts that the server will not run.

        previews: make the sampler send pictures even if the server has previews off. Raises QueueError with the
        server's own message and one line per node error if it refuses the prompt.
        """
        extra = {"preview_method": "auto"} if previews else {}
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id, "extra_data": extra}
        return node_error_lines(prompt, self._ask("POST", "/prompt", body).get("node_errors"))

    def cancel(self, prompt_id: str) -> None:
        self._ask("POST", "/queue", {"delete": [prompt_id]})
        self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """The record of a finished prompt, None while it has none."""
        return mapping(self._ask("GET", f"/history/{prompt_id}").get(prompt_id)) or None

    def has_queued(self, prompt_id: str) -> bool:
        text = self._read("GET", "/queue", MOST_QUEUE)
        if b'"queue_pending"' not in text:
            raise self._foreign("/queue")
        return f'"{prompt_id}"'.encode() in text

    def listen(self, client_id: str) -> None:
        """Open the stream of events about this client's prompts, if any; ServerUnreachable if nothing answers."""
        self.client_id, self._next_opening = client_id, time.monotonic() + RETRY_SECONDS
        try:
            self._socket = connect(
                f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}",
                additional_headers=dict(self._headers),
                proxy=None if self._direct else True,
                compression=None,
                open_timeout=self._patience,
                ping_timeout=None,
                close_timeout=1,
                max_size=MOST_EVENT,
                max_queue=1,
                create_connection=_Stream,
            ).__enter__()  # `_hang_up` ends it
            # Ask for previews that name their node; ComfyUI reads this in the first message only.
            self._socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        except (WebSocketException, TimeoutError):  # a proxy that passes no WebSocket: /history is enough
            self._hang_up()
            self._next_opening = time.monotonic() + self._patience
        except OSError as error:
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {error}") from error

    def next_event(self) -> Mapping[str, Any]:
        """The next event; an empty one if none came within TICK_SECONDS, or if there is no stream."""
        try:
            if self._socket is None and time.monotonic() >= self._next_opening:
                self.listen(self.client_id)
            if self._socket is not None:
                return read_event(self._socket.recv(timeout=TICK_SECONDS))
        except TimeoutError:
            return {}
        except (WebSocketException, OSError):
            self.losses += self._socket is not None
            self._hang_up()
        time.sleep(TICK_SECONDS)
        return {}

    def download(self, remote: RemoteFile, folder: Path) -> Path:
        """Fetch a file below `folder`, completely or not at all; an existing file is never overwritten."""
        path = remote.relative_path
        if len(str(path).encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in path.parts):
            raise QueueError(f"{remote.filename[:80]}… is too long a file name; shorten the save node's prefix")
        target = free_name(folder / path)
        target.parent.mkdir(parents=True, exist_ok=True)
        query = urllib.parse.urlencode(remote._asdict(), errors="replace")
        with whole_file(target) as partial, partial.open("wb") as file:
            self._receive(file, "GET", f"/view?{query}", MOST_FILE, slowest=SLOWEST)
        return target

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The JSON object of an answer, an empty one if the answer is empty. Raises ServerUnreachable or QueueError."""
        return self._object(path, self._read(method, path, MOST_JSON, body))

    def _object(self, path: str, text: bytes) -> Mapping[str, Any]:
        answer = read_object(text)
        if text and not answer and text.strip() != b"{}":
            raise self._foreign(path)
        return answer

    def _foreign(self, path: str) -> ServerUnreachable:
        return ServerUnreachable(f"{self.url}{path} does not answer as ComfyUI does; is it a ComfyUI server?")

    def _read(self, method: str, path: str, most: int, body: Mapping[str, Any] | None = None) -> bytes:
        content = BytesIO()
        self._receive(content, method, path, most, body)
        return content.getvalue()

    def _receive(
        self,
        file: IO[bytes],
        method: str,
        path: str,
        most: int,
        body: Mapping[str, Any] | None = None,
        slowest: float = math.inf,
    ) -> None:
        """Write a successful answer to `file`.

        Raises QueueError for any other answer, with the server's message, and for one of more than `most` bytes;
        ServerUnreachable if it is not whole after `patience` seconds and one more for every `slowest` bytes.
        """

        async def exchange() -> None:
            content = b"" if body is None else json.dumps(body).encode()
            headers, error = {"Content-Type": "application/json"}, BytesIO()
            with anyio.fail_after(self._patience) as limit:
                async with self._client.stream(method, path, content=content, headers=headers) as response:
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise QueueError(f"{self.url} sends a compressed answer, which was not requested")
                    bound, kept = (most, file) if response.is_success else (MOST_JSON, error)
                    async for part in response.aiter_raw():
                        kept.write(part)
                        limit.deadline += len(part) / slowest
                        if kept.tell() > bound:
                            break
            if not response.is_success:
                raise self._refusal(path, response, error.getvalue(), mapping(mapping(body).get("prompt")))
            if file.tell() > most:
                raise QueueError(f"an answer of {self.url} is larger than {most} bytes")

        task = self._loop.create_task(exchange())
        try:
            self._loop.run_until_complete(task)
        except TimeoutError as error:
            raise ServerUnreachable(f"{self.url} gives no whole answer within {self._patience:g} s") from error
        except httpx.HTTPError as error:
            self.losses += 1
            raise ServerUnreachable(f"no ComfyUI server answers at {self.url}: {str(error) or repr(error)}") from error
        finally:
            task.cancel()  # after Ctrl-C, or the next request would resume it

    def _refusal(self, path: str, response: httpx.Response, content: bytes, prompt: Prompt) -> QueueError:
        answer = read_object(content)
        error = mapping(answer.get("error"))
        if error:
            lines = node_error_lines(prompt, answer.get("node_errors"))
            return QueueError("\n".join([str(error.get("message")), *lines] if lines else [_with_details(error)]))
        text = response.headers.get("Location") or content[:300].decode(errors="replace").strip()
        status = f"{self.url}{path} answers HTTP {response.status_code} {response.reason_phrase}: {text}"
        return ServerBusy(status) if response.status_code in _BUSY else QueueError(status)


def login_headers(address: httpx.URL) -> httpx.Headers:
    """The login in the address, LIGHTFORCING_LOGIN or netrc, and the `Name: value` lines of LIGHTFORCING_HEADERS.

    LIGHTFORCING_LOGIN: `user:password`, or a bearer token. netrc: an entry for this very host, in $NETRC or ~/.netrc.
    """
    login = os.environ.get("LIGHTFORCING_LOGIN", "").strip()
    if address.userinfo:
        login = f"{address.username}:{address.password}"
    with suppress(OSError, KeyError, ValueError, netrc.NetrcParseError):
        login = login or "{0}:{2}".format(*netrc.netrc(os.environ.get("NETRC")).hosts[address.host])
    basic = f"Basic {base64.b64encode(login.encode(errors='surrogateescape')).decode()}"
    lines = [f"Authorization: {basic if ':' in login else f'Bearer {login}'}"] if login else []
    headers = httpx.Headers()
    for line in filter(None, map(str.strip, lines + os.environ.get("LIGHTFORCING_HEADERS", "").splitlines())):
        header = _HEADER.fullmatch(line)
        if header is None:  # the line itself is a secret
            raise UsageError("LIGHTFORCING_LOGIN is not ASCII, or a line of LIGHTFORCING_HEADERS is not Name: value")
        headers[header[1]] = header[2]
    return headers


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


def read_event(message: str | bytes) -> Mapping[str, Any]:
    """A message of the event stream as an event, a preview as one with an `image`; an empty one if it is neither.

    The form of a preview: [uint32 4][uint32 length][JSON of that length: node, prompt][picture], numbers big-endian.
    """
    if isinstance(message, str):
        return read_object(message)
    kind, size = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
    about, image = read_object(message[8 : 8 + size]), message[8 + size :]
    suffix = next((suffix for magic, suffix in _IMAGE_SUFFIXES.items() if image.startswith(magic)), None)
    if kind != 4 or suffix is None:
        return {}
    node = about.get("display_node_id") or about.get("node_id")
    return {"data": {"image": image, "suffix": suffix, "node": node, "prompt_id": about.get("prompt_id")}}
