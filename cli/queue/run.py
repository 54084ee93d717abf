"""One prompt on the server: its events, its end, and the files that it wrote."""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...lightforcing_core.files.json import listing, mapping, read_object
from ...lightforcing_core.files.output import free_name, whole_file
from .jobs import Job
from .prompt import Prompt, title_of
from .server import ComfyServer, QueueError, RemoteFile

ASK_SECONDS = 2.0  # between two questions to /history, whatever the events say
IMAGE_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}


class RunVanished(QueueError):
    """The server has forgotten the prompt: it restarted."""


@dataclass
class Run:
    """A job's prompt on the server and the events so far about it.

    emit: called as emit(kind, **fields) for `progress` and `preview`.
    previews: folder for the pictures that the server sends while it samples, None to drop them.
    """

    job: Job
    prompt_id: str
    emit: Callable[..., None]
    previews: Path | None
    left_out: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    _asked: float = field(default_factory=time.monotonic)
    _missing: bool = False
    _node: str | None = None
    _done: set[str] = field(default_factory=set)

    def follow(self, server: ComfyServer, client_id: str, *, timeout: float | None) -> Mapping[str, Any]:
        """Listen until /history has the run, also without a stream of events; returns its record.

        timeout: seconds from now until the run is cancelled, None for no limit. Raises RunVanished if the
        server restarted and no longer knows the run, QueueError if somebody deleted it there.
        """
        start, losses = time.monotonic(), server.losses
        while timeout is None or time.monotonic() - start < timeout:
            message = server.next_event(client_id)
            ended = message is not None and self._take(read_event(message))
            if ended or time.monotonic() - self._asked >= ASK_SECONDS:
                record = server.patiently(lambda: self._record(server, losses))
                if record is not None:
                    return record
                self._asked = time.monotonic()
        server.patiently(lambda: server.cancel(self.prompt_id))
        raise QueueError(f"not finished after {timeout:g} s, cancelled; allow more with --timeout")

    def _record(self, server: ComfyServer, losses: int) -> Mapping[str, Any] | None:
        """The record in /history; None while the run is waiting or running."""
        known = server.has_queued(self.prompt_id)
        record = server.history(self.prompt_id)  # asked last: a run goes from the queue to the history
        was_missing, self._missing = self._missing, record is None and not known
        if was_missing and self._missing:  # twice, so that a lost connection is noticed in between
            gone = "the run is neither in the server's queue nor in its history"
            if server.losses > losses:
                raise RunVanished(f"{gone}: the server restarted")
            raise QueueError(f"{gone}: somebody deleted it there")
        return record

    def _take(self, event: Mapping[str, Any]) -> bool:
        """Note one event; returns whether it may be the last."""
        kind, data = event.get("type"), mapping(event.get("data"))
        if data.get("prompt_id") != self.prompt_id:
            return False
        node = data.get("display_node") or data.get("node")
        node = str(node) if isinstance(node, str | int) else None
        if isinstance(data.get("image"), bytes):
            if self.previews is not None:
                folder = self.previews / self.job.name
                folder.mkdir(parents=True, exist_ok=True)
                path = free_name(folder / f"{len(os.listdir(folder)) + 1:05d}{data['suffix']}")
                with whole_file(path) as unfinished:
                    unfinished.write_bytes(data["image"])
                self.emit("preview", node=node, file=str(path))
        elif kind == "execution_cached":
            self._done.update(map(str, listing(data.get("nodes"))))
        elif kind == "executing":
            self._done.update([] if self._node is None else [self._node])
            self._node = node
            self._show(0.0, 1.0)
        elif kind == "progress":
            with suppress(TypeError, ValueError):
                self._show(float(data.get("value", 0)), float(data.get("max", 1)))
        return kind in ("execution_error", "execution_interrupted") or (kind == "executing" and self._node is None)

    def _show(self, value: float, total: float) -> None:
        nodes = self.job.prompt
        if self._node is not None and math.isfinite(value) and math.isfinite(total):
            title, done = title_of(nodes, self._node), len(self._done & set(nodes))
            self.emit("progress", node=title, value=value, total=total, nodes_done=done, nodes=len(nodes))


def output_files(prompt: Prompt, record: Mapping[str, Any], *, temp: bool) -> list[RemoteFile]:
    """The files of a history record: each object with a filename, under any key (images, gifs, …).

    temp: the files of preview nodes too. Raises QueueError if the record reports a failure, or neither work nor files.
    """
    status = mapping(record.get("status"))
    rows = map(listing, listing(status.get("messages")))
    messages = {str(row[0]): mapping(row[1]) for row in rows if len(row) == 2}
    for kind in ("execution_error", "execution_interrupted"):
        if kind in messages:
            reason = messages[kind].get("exception_message", "the run was interrupted on the server")
            raise QueueError(f"{title_of(prompt, str(messages[kind].get('node_id', '?')))}: {str(reason).strip()}")
    if status.get("status_str", "success") != "success":
        raise QueueError(f"the server reports {status['status_str']!r:.80} without a message; see its log")
    found = {
        RemoteFile(str(item["filename"]), str(item.get("subfolder") or ""), str(item.get("type") or "output")): None
        for outputs in mapping(record.get("outputs")).values()
        for items in mapping(outputs).values()
        for item in map(mapping, listing(items))
        if item.get("filename")
    }
    files = [file for file in found if file.type == "output" or (temp and file.type == "temp")]
    ran = (listing(record.get("prompt"))[4:5] or [list(prompt)])[0]  # the output nodes, if the record names them
    cached = listing(mapping(messages.get("execution_cached")).get("nodes"))
    if cached and not files and {*map(str, listing(ran))} <= {*map(str, cached)}:
        raise QueueError("nothing ran: the server answered from its cache, and lists no file; change an input")
    return files


def read_event(message: str | bytes) -> Mapping[str, Any]:
    """A message of the event stream as an event, a preview as one with an `image`; an empty one if it is neither.

    The form of a preview: [uint32 4][uint32 length][JSON of that length: node, prompt][picture], numbers big-endian.
    """
    if isinstance(message, str):
        return read_object(message)
    kind, size = int.from_bytes(message[:4], "big"), int.from_bytes(message[4:8], "big")
    about, image = read_object(message[8 : 8 + size]), message[8 + size :]
    suffix = next((suffix for magic, suffix in IMAGE_SUFFIXES.items() if image.startswith(magic)), None)
    if kind != 4 or suffix is None:
        return {}
    node = about.get("display_node_id") or about.get("node_id")
    return {"data": {"image": image, "suffix": suffix, "node": node, "prompt_id": about.get("prompt_id")}}
