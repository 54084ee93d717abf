"""The events of `lightforcing queue --json`: one JSON object per line on stdout, each with `event` and `time`.

| event | when | fields besides `event` and `time` (Unix seconds) |
|---|---|---|
| batch | once, first | prompts (how many), done (of these, by an earlier start), servers, journal (path or null) |
| submitted | a server took a prompt | prompt, server, prompt_id |
| progress | a node starts or moves on | prompt, server, prompt_id, node (title), value, total, nodes_done, nodes |
| preview | a preview was saved | prompt, server, prompt_id, node (id or null), file |
| finished | its files are on this disk | prompt, server, prompt_id, files, cached, left_out, seconds |
| failed | refused, or ended in an error | prompt, server, prompt_id, message |
| returned | pending again | prompt, server, reason |
| cancelled | the batch was interrupted | prompt, server, prompt_id |
| server_lost | no answer for --patience seconds | server, reason |
| server_back | a lost server answers again | server |
| summary | once, last | prompts, done, failed, left, seconds |

`prompt` is the job's name, `server` its address, `prompt_id` the prompt's id on that server. `cached` is true when the
server ran nothing and answered from its cache. `left_out` are messages about parts of the graph that the server did
not run. A reader should ignore events and fields that it does not know.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

FIELDS = {
    "batch": ("prompts", "done", "servers", "journal"),
    "submitted": ("prompt", "server", "prompt_id"),
    "progress": ("prompt", "server", "prompt_id", "node", "value", "total", "nodes_done", "nodes"),
    "preview": ("prompt", "server", "prompt_id", "node", "file"),
    "finished": ("prompt", "server", "prompt_id", "files", "cached", "left_out", "seconds"),
    "failed": ("prompt", "server", "prompt_id", "message"),
    "returned": ("prompt", "server", "reason"),
    "cancelled": ("prompt", "server", "prompt_id"),
    "server_lost": ("server", "reason"),
    "server_back": ("server",),
    "summary": ("prompts", "done", "failed", "left", "seconds"),
}


class Events:
    """Hands every event to all listeners, one event at a time, whichever thread it comes from."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()

    def __call__(self, name: str, **fields: Any) -> None:
        """Raises KeyError or ValueError for an event that `FIELDS` does not describe."""
        told = {"event": name, "time": round(time.time(), 3)}
        told.update((key, fields[key]) for key in FIELDS[name])
        with self._lock:
            for listener in self._listeners:
                listener(told)


def print_json(event: Event) -> None:
    """One line on stdout, at once; ASCII, since a pipe's encoding may be a narrow one (Windows)."""
    print(json.dumps(event), flush=True)
