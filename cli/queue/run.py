"""One prompt on the server: its events, its end, and the files that it wrote."""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection

from ...lightforcing_core.files.output import free_name, whole_file
from .jobs import Job
from .prompt import listing, mapping, read_object, title_of
from .server import ComfyServer, QueueError, RemoteFile, ServerUnreachable, patiently

TICK_SECONDS = 0.5  # longest wait for one event
IDLE_SECONDS = 2.0  # after this long without an event, ask /history
IMAGE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}


class RunVanished(QueueError):
    """The server has forgotten the prompt: it restarted."""


class EventStream:
    """The server's WebSocket, opened again after it dropped. previews: ask for pictures that name their node."""

    def __init__(self, server: ComfyServer, client_id: str, *, previews: bool) -> None:
        self._listen = partial(server.listen, client_id, previews=previews)
        self._socket: ClientConnection | None = self._listen()
        self.openings = 1

    def next(self) -> Mapping[str, Any] | None:
        """The next event, None if none came within TICK_SECONDS.

        Raises ServerUnreachable when the stream breaks off; the next call opens it again.
        """
        if self._socket is None:
            self._socket = self._listen()
            self.openings += 1
        try:
            frame = self._socket.recv(timeout=TICK_SECONDS)
        except TimeoutError:
            return None
        except (WebSocketException, OSError) as error:
            self.close()
            raise ServerUnreachable(f"the event stream broke off: {error}") from error
        return read_preview(frame) if isinstance(frame, bytes) else read_object(frame)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


@dataclass
class Run:
    """A job's prompt on the server and the events so far about it.

    emit: called as emit(kind, **fields) for `progress` and `preview`.
    previews: folder for the pictures that the server sends while it samples, None to drop them.
    files, cached: after `end`, the files to fetch, and whether the server answered from its cache.
    """

    job: Job
    prompt_id: str
    emit: Callable[..., None]
    previews: Path | None
    left_out: list[str] = field(default_factory=list)
    files: list[RemoteFile] = field(default_factory=list)
    cached: bool = False
    since: float = field(default_factory=time.monotonic)
    _started: bool = False
    _last_event: float = -math.inf  # so /history is asked first: an earlier command may have sent this run
    _node: str | None = None
    _done: set[str] = field(default_factory=set)
    _error: Mapping[str, Any] = field(default_factory=dict)

    def follow(
        self, server: ComfyServer, events: EventStream, *, timeout: float | None, patience: float
    ) -> Mapping[str, Any]:
        """Listen until /history has the run, through dropped connections; its record there.

        timeout: seconds from now until the run is cancelled and given up, None for ever.
        patience: seconds without any answer until ServerUnreachable is raised.

        Raises RunVanished if the server restarted and no longer knows the run, QueueError if somebody deleted it.
        """
        start, openings = time.monotonic(), events.openings
        while timeout is None or time.monotonic() - start < timeout:
            record = patiently(lambda: self._listen(server, events, openings), patience)
            if record is not None:
                return record
        server.cancel(self.prompt_id)
        raise QueueError(f"not finished after {timeout:g} s, cancelled; allow more with --timeout")

    def _listen(self, server: ComfyServer, events: EventStream, openings: int) -> Mapping[str, Any] | None:
        """Take one event; after the last one, and if there is none for a while, the record in /history."""
        event = events.next()
        if event is not None:
            self._last_event = time.monotonic()
        idle = time.monotonic() - self._last_event >= IDLE_SECONDS
        if not idle and (event is None or not self._take(event)):
            return None
        record = server.history(self.prompt_id)
        if record is None and idle and not server.has_queued(self.prompt_id):
            record = server.history(self.prompt_id)  # it may have ended between the two answers
            if record is None:
                gone = "the run is neither in the server's queue nor in its history"
                if events.openings > openings:
                    raise RunVanished(f"{gone}: the server restarted")
                raise QueueError(f"{gone}: somebody deleted it there")
        self._last_event = time.monotonic()
        return record

    def _take(self, event: Mapping[str, Any]) -> bool:
        """Note one event; whether it may be the last."""
        kind, data = event.get("type"), mapping(event.get("data"))
        node, image = data.get("display_node") or data.get("node"), data.get("image")
        node = None if node is None else str(node)
        if kind == "status" and not self._started:
            self._show("waiting in the server's queue")
        if isinstance(image, bytes):
            if self.previews is not None and data.get("prompt_id") in (None, self.prompt_id):
                path = save_preview(self.previews / self.job.name, image, data["suffix"])
                self.emit("preview", node=node, file=str(path))
            return False
        if data.get("prompt_id") != self.prompt_id:
            return False
        self._started = True
        if kind == "execution_cached":
            self._done.update(map(str, listing(data.get("nodes"))))
        elif kind == "execution_error":
            self._error = data
        elif kind == "executing":
            if self._node is not None:
                self._done.add(self._node)
            self._node = node
            if node is not None:
                self._show(title_of(self.job.prompt, node))
        elif kind == "progress" and (node or self._node):
            with suppress(TypeError, ValueError):
                value, total = float(data.get("value", 0)), float(data.get("max", 1))
                if math.isfinite(value) and math.isfinite(total):
                    self._show(title_of(self.job.prompt, node or self._node or ""), value, total)
        return kind in ("execution_error", "execution_interrupted") or (kind == "executing" and self._node is None)

    def _show(self, title: str, value: float = 0.0, total: float = 1.0) -> None:
        nodes = self.job.prompt
        done = len(self._done & set(nodes))
        self.emit("progress", node=title, value=value, total=total, nodes_done=done, nodes=len(nodes))

    def end(self, record: Mapping[str, Any], *, temp: bool) -> None:
        """Note the outcome in a history record. Raises QueueError if it, or an error event, tells of a failure."""
        status = mapping(record.get("status"))
        rows = map(listing, listing(status.get("messages")))
        messages = {str(row[0]): mapping(row[1]) for row in rows if len(row) == 2}
        error, interrupted = messages.get("execution_error") or self._error, messages.get("execution_interrupted")
        title = title_of(self.job.prompt, str((error or interrupted or {}).get("node_id", "?")))
        if error:
            raise QueueError(f"{title}: {str(error.get('exception_message', 'failed')).strip()}")
        if interrupted is not None:
            raise QueueError(f"{title}: the run was interrupted on the server")
        if status.get("status_str", "success") != "success":
            raise QueueError(f"the server reports {status['status_str']} without a message; see its log")
        self.files = output_files(record, temp=temp)
        cached = set(map(str, listing(messages.get("execution_cached", {}).get("nodes"))))
        queued = listing(record.get("prompt"))  # [number, id, prompt, extra data, output nodes]
        outputs = listing(queued[4]) if len(queued) > 4 else list(self.job.prompt)
        self.cached = cached.issuperset(map(str, outputs))


def output_files(record: Mapping[str, Any], *, temp: bool) -> list[RemoteFile]:
    """Every file in a history record: each object with a filename, under whichever key (images, gifs, …)."""
    found = {
        RemoteFile(str(item["filename"]), str(item.get("subfolder") or ""), str(item.get("type") or "output")): None
        for outputs in mapping(record.get("outputs")).values()
        for items in mapping(outputs).values()
        for item in map(mapping, listing(items))
        if item.get("filename")
    }
    return [file for file in found if file.type == "output" or (temp and file.type == "temp")]


def read_preview(frame: bytes) -> Mapping[str, Any]:
    """A binary WebSocket message as an event with an `image`, an empty one if it is no picture.

    Two forms, numbers big-endian: 1 = [uint32 1][uint32 format][picture]; 4 = [uint32 4][uint32 length][JSON of that
    length: node, prompt][picture].
    """
    kind, size = int.from_bytes(frame[:4], "big"), int.from_bytes(frame[4:8], "big")
    about, image = ({}, frame[8:]) if kind == 1 else (read_object(frame[8 : 8 + size]), frame[8 + size :])
    suffix = next((suffix for magic, suffix in IMAGE_SUFFIXES.items() if image.startswith(magic)), None)
    if suffix is None or not (kind == 1 or (kind == 4 and about)):
        return {}
    node = about.get("display_node_id") or about.get("node_id")
    data = {"image": image, "suffix": suffix, "node": node, "prompt_id": about.get("prompt_id")}
    return {"data": data}


def save_preview(folder: Path, image: bytes, suffix: str) -> Path:
    """Write a preview below `folder` under the next number, `00001.jpg`, `00002.jpg`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    path = free_name(folder / f"{len(os.listdir(folder)) + 1:05d}{suffix}")
    with whole_file(path) as unfinished:
        unfinished.write_bytes(image)
    return path
