"""The events of `lightforcing queue` and `render`: progress and lines on a terminal, or JSON with `--json`.

One JSON object per line on stdout, each with `event` and `time`:

| event | when | fields besides `event` and `time` (Unix seconds) |
|---|---|---|
| batch | once, first | prompts (how many), done (of these, earlier), servers (one), journal (path or null) |
| submitted | the server took a prompt | prompt, server, prompt_id |
| progress | a node starts or moves on | prompt, server, prompt_id, node (title), value, total, nodes_done, nodes |
| preview | a preview was saved | prompt, server, prompt_id, node (id or null), file |
| finished | its files are on this disk | prompt, server, prompt_id, files, left_out, seconds |
| failed | refused, or ended in an error | prompt, server, prompt_id, message |
| returned | the server forgot it, it is sent again | prompt, server, prompt_id, reason |
| cancelled | the batch was interrupted | prompt, server, prompt_id |
| server_lost | no answer for --patience seconds | server, reason |
| summary | once, last | prompts, done, failed, left, seconds |

`prompt` is the job's name, `server` its address, `prompt_id` the prompt's id on that server, `journal` the batch's
ledger. `left_out` are messages about parts of the graph that the server did not run. A reader should ignore events and
fields that it does not know.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .prompt import printable


class Display:
    """Shows events as they come. `progress`, as a context, keeps a progress line on a terminal.

    complain: takes one line for stderr. single: a run of one prompt, whose name adds nothing. json: events go to
    stdout; only the progress line and complaints are for people.
    """

    def __init__(self, complain: Callable[[str], None], *, single: bool, json: bool) -> None:
        self._events = sys.stdout  # also while that is redirected
        self._console = Console(file=sys.stderr if json else sys.stdout)
        self._complain, self._single, self._json = complain, single, json
        self.anything_left_out = False
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        no_terminal = not self._console.is_terminal
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self._console, disable=no_terminal)
        self._task = self.progress.add_task("connecting")

    def __call__(self, name: str, **fields: Any) -> None:
        if self._json:
            event = {"event": name, "time": round(time.time(), 3), **fields}
            print(json.dumps(event), flush=True, file=self._events)  # ASCII, because a pipe may not be UTF-8 (Windows)
        whose = "" if self._single or "prompt" not in fields else f"{fields['prompt']}: "
        match name:
            case "batch" if fields["done"]:
                self._print("{done} of {prompts} prompts are done already, see {journal}".format(**fields))
            case "submitted":
                self.progress.update(self._task, description=f"{whose}waiting in the server's queue", completed=0)
            case "progress":
                value, total = fields["value"], fields["total"]
                counted = f" {value:g}/{total:g}" if total > 1 else ""
                done = fields["nodes_done"] + (min(max(value / total, 0.0), 1.0) if total else 0.0)
                description = printable(f"{whose}{fields['node']}{counted}")
                self.progress.update(self._task, description=description, completed=done, total=fields["nodes"])
            case "finished":
                for file in fields["files"]:
                    self._print(f"wrote {file} ({Path(file).stat().st_size / 1e3:,.0f} kB)")
                if not fields["files"]:
                    self._print(f"{whose}no file was written; add a save node, or fetch previews with --temp")
                for message in fields["left_out"]:
                    self._complain(f"{whose}left out by the server: {message}")
                    self.anything_left_out = True
            case "failed":
                self._complain(whose + fields["message"])
            case "returned":
                self._complain(f"{whose}{fields['reason']}; sending it again")
            case "server_lost":
                self._complain(fields["reason"])
            case "summary" if not self._single:
                line = "{done} of {prompts} prompts done, {failed} failed, {left} left, in {seconds:.0f} s"
                self._print(line.format(**fields))
                if fields["left"]:
                    self._complain("start the same command again to continue the batch")

    def _print(self, line: str) -> None:
        if not self._json:
            self._console.print(printable(line), soft_wrap=True, highlight=False, markup=False)
