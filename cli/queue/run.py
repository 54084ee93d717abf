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

from ...lightforcing_core.files.json import listing, mapping
from ...lightforcing_core.files.output import free_name, whole_file
from .jobs import Job
from .prompt import Prompt, title_of
from .server import ComfyServer, QueueError, RemoteFile

ASK_SECONDS = 2.0  # between two questions to /history, whatever the events say


class RunVanished(QueueError):
    """The server has forgotten the prompt: it restarted."""


@dataclass
class Run:
    """A job's prompt on the server and the events so far about it.

    emit: called as emit(kind, **fields) for `submitted`, `progress` and `preview`.
    previews: folder for the pictures that the server sends while it samples, None to drop them.
    """

    job: Job
    prompt_id: str
    server: ComfyServer
    emit: Callable[..., None]
    previews: Path | None
    left_out: list[str] = field(default_factory=list)
    _missing: bool = False
    _node: str | None = None
    _done: set[str] = field(default_factory=set)

    def send(self) -> None:
        """Send the prompt unless the server already has it, from an earlier command or because its answer was lost."""
        if not self.server.has_queued(self.prompt_id) and self.server.history(self.prompt_id) is None:
            self.left_out = self.server.submit(self.job.prompt, self.prompt_id, previews=self.previews is not None)
            self.emit("submitted")

    def follow(self, timeout: float | None) -> Mapping[str, Any]:
        """Listen until /history has the run, also without a stream of events; returns its record.

        timeout: seconds from now until the run is cancelled, None for no limit. Raises RunVanished if the
        server restarted and no longer knows the run, QueueError if somebody deleted it there.
        """
        start = asked = time.monotonic()
        losses = self.server.losses
        while timeout is None or time.monotonic() - start < timeout:
            ended = self._take(self.server.next_event())
            if ended or time.monotonic() - asked >= ASK_SECONDS:
                record = self.server.patiently(partial(self._record, losses))
                if record is not None:
                    return record
                asked = time.monotonic()
        self.server.patiently(lambda: self.server.cancel(self.prompt_id))
        raise QueueError(f"not finished after {timeout:g} s, cancelled; allow more with --timeout")

    def _record(self, losses: int) -> Mapping[str, Any] | None:
        """The record in /history; None while the run is waiting or running."""
        known = self.server.has_queued(self.prompt_id)
        record = self.server.history(self.prompt_id)  # asked last: a run goes from the queue to the history
        was_missing, self._missing = self._missing, record is None and not known
        if was_missing and self._missing:  # twice, so that a lost connection is noticed in between
            gone = "the run is neither in the server's queue nor in its history"
            if self.server.losses > losses:
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
