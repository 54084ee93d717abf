"""The events of `lightforcing queue`, as progress lines on a terminal, as plain lines, or with `--json` as JSON.

One JSON object per line on stdout, each with `event` and `time`:

| event | when | fields besides `event` and `time` (Unix seconds) |
|---|---|---|
| batch | once, first | prompts (how many), done (of these, earlier), servers (one), journal (path or null) |
| submitted | the server took a prompt | prompt, server, prompt_id |
| progress | a node starts or moves on | prompt, server, prompt_id, node (title), value, total, nodes_done, nodes |
| preview | a preview was saved | prompt, server, prompt_id, node (id or null), file |
| finished | its files are on this disk | prompt, server, prompt_id, files, cached, left_out, seconds |
| failed | refused, or ended in an error | prompt, server, prompt_id, message |
| returned | the server forgot it, it is sent again | prompt, server, prompt_id, reason |
| cancelled | the batch was interrupted | prompt, server, prompt_id |
| server_lost | no answer for --patience seconds | server, reason |
| summary | once, last | prompts, done, failed, left, seconds |

`prompt` is the job's name, `server` its address, `prompt_id` the prompt's id on that server, `journal` the batch's
ledger. `cached` is true if the server ran nothing and answered from its cache. `left_out` are messages about parts of
the graph that the server did not run. A reader should ignore events and fields that it does not know.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Event = Mapping[str, Any]


class Display:
    """Shows events as they come. `progress`, as a context, keeps lines that move on a terminal.

    complain: takes one line for stderr. single: a run of one prompt, whose name adds nothing. json: events go to
    stdout; only progress lines and complaints are for people.
    """

    def __init__(self, complain: Callable[[str], None], *, single: bool, json: bool) -> None:
        self._console = Console(stderr=json)
        self._complain, self._single, self._json = complain, single, json
        self.anything_left_out = False
        self._last_node: str | None = None
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        terminal = self._console.is_terminal
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=not terminal)
        self._all = self.progress.add_task("prompts", visible=not single)
        self._run = self.progress.add_task("connecting")

    def __call__(self, name: str, **fields: Any) -> None:
        """Show one event; kinds that have nothing to show pass."""
        event = {"event": name, "time": round(time.time(), 3), **fields}
        if self._json:
            print(json.dumps(event), flush=True)  # ASCII: a pipe's encoding may be a narrow one (Windows)
        show = getattr(self, f"_show_{name}", None)
        if show is not None:
            show(event)

    def _show_batch(self, event: Event) -> None:
        self.progress.update(self._all, total=event["prompts"], completed=event["done"])
        if event["done"]:
            self._print(f"{event['done']} of {event['prompts']} prompts are done already, see {event['journal']}")

    def _show_progress(self, event: Event) -> None:
        node = event["node"]
        if self._single and not self._console.is_terminal and node != self._last_node:
            self._print(f"[{event['nodes_done'] + 1}/{event['nodes']}] {node}")
        self._last_node = node
        counted = f" {event['value']:g}/{event['total']:g}" if event["total"] > 1 else ""
        within = event["value"] / event["total"] if event["total"] else 0.0
        done = event["nodes_done"] + within
        self.progress.update(
            self._run, description=f"{self._whose(event)}{node}{counted}", completed=done, total=event["nodes"]
        )

    def _show_finished(self, event: Event) -> None:
        for name in event["files"]:
            path = Path(name)
            self._print(f"wrote {path} ({path.stat().st_size / 1e3:,.0f} kB)")
        whose = self._whose(event)
        if event["cached"]:
            self._print(f"{whose}nothing new: the server answered from its cache")
        elif not event["files"]:
            self._print(f"{whose}the run succeeded but wrote no file; add a save node, or fetch previews with --temp")
        for message in event["left_out"]:
            self._complain(whose + message)
        if event["left_out"]:
            self.anything_left_out = True
            self._complain(f"{whose}the server left these parts of the workflow out")
        self.progress.advance(self._all)

    def _show_failed(self, event: Event) -> None:
        self._complain(self._whose(event) + event["message"])
        self.progress.advance(self._all)

    def _show_returned(self, event: Event) -> None:
        self._complain(f"{self._whose(event)}{event['reason']}; sending it again")

    def _show_server_lost(self, event: Event) -> None:
        self._complain(event["reason"])

    def _show_summary(self, event: Event) -> None:
        if not self._single:
            self._print(
                f"{event['done']} of {event['prompts']} prompts done, {event['failed']} failed, "
                f"{event['left']} left, in {event['seconds']:.0f} s"
            )
            if event["left"]:
                self._complain("start the same command again to continue the batch")

    def _whose(self, event: Event) -> str:
        return "" if self._single else f"{event['prompt']}: "

    def _print(self, line: str) -> None:
        if not self._json:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
