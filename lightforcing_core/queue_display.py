"""What `lightforcing queue` shows of a batch: progress lines on a terminal, plain lines elsewhere, one per fact."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .queue_events import Event


class QueueDisplay:
    """Listens to a batch's events. As a context it keeps progress lines on a terminal.

    complain: takes one line for stderr. single: a run of one prompt, where names add nothing. quiet: results go
    elsewhere (`--json`), so that only progress lines and complaints remain.
    """

    def __init__(self, console: Console, complain: Callable[[str], None], *, single: bool, quiet: bool) -> None:
        self._console, self._complain, self._single, self._quiet = console, complain, single, quiet
        self.anything_left_out = False
        self._last_node: dict[str, str] = {}
        self._lines: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)

    def __enter__(self) -> "QueueDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event; kinds that have nothing to show pass."""
        show = getattr(self, f"_show_{event['event']}", None)
        if show is not None:
            show(event)

    def _show_batch(self, event: Event) -> None:
        if self._single:
            return
        self._lines["all"] = self._progress.add_task("prompts", total=event["prompts"], completed=event["done"])
        if event["done"]:
            self._print(f"{event['done']} of {event['prompts']} prompts are done already, see {event['journal']}")

    def _show_progress(self, event: Event) -> None:
        server, node = event["server"], event["node"]
        if self._single and not self._console.is_terminal and node != self._last_node.get(server):
            self._print(f"[{event['nodes_done'] + 1}/{event['nodes']}] {node}")
        self._last_node[server] = node
        if server not in self._lines:
            self._lines[server] = self._progress.add_task("connecting", total=event["nodes"])
        counted = f" {event['value']:g}/{event['total']:g}" if event["total"] > 1 else ""
        within = event["value"] / event["total"] if event["total"] else 0.0
        whose = "" if self._single else f"{_host(server)} · {event['prompt']} · "
        done = event["nodes_done"] + within
        self._progress.update(self._lines[server], description=f"{whose}{node}{counted}", completed=done)

    def _show_finished(self, event: Event) -> None:
        for name in event["files"]:
            path = Path(name)
            self._print(f"wrote {path} ({path.stat().st_size / 1e3:,.0f} kB)")
        whose = "" if self._single else f"{event['prompt']}: "
        if event["cached"]:
            self._print(f"{whose}nothing new: the server answered from its cache")
        elif not event["files"]:
            self._print(f"{whose}the run succeeded but wrote no file; add a save node, or fetch previews with --temp")
        for message in event["left_out"]:
            self._complain(whose + message)
        if event["left_out"]:
            self.anything_left_out = True
            self._complain(f"{whose}the server left these parts of the workflow out")
        self._advance()

    def _show_failed(self, event: Event) -> None:
        whose = "" if self._single else f"{event['prompt']}: "
        self._complain(whose + event["message"])
        self._advance()

    def _show_returned(self, event: Event) -> None:
        if not self._single:
            self._complain(f"{event['prompt']} goes back to the list ({_host(event['server'])}: {event['reason']})")

    def _show_server_lost(self, event: Event) -> None:
        self._complain(event["reason"])
        if event["server"] in self._lines:
            self._progress.remove_task(self._lines.pop(event["server"]))

    def _show_server_back(self, event: Event) -> None:
        self._complain(f"{event['server']} answers again")

    def _show_summary(self, event: Event) -> None:
        if not self._single:
            self._print(
                f"{event['done']} of {event['prompts']} prompts done, {event['failed']} failed, "
                f"{event['left']} left, in {event['seconds']:.0f} s"
            )

    def _advance(self) -> None:
        if "all" in self._lines:
            self._progress.advance(self._lines["all"])

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _host(server: str) -> str:
    return server.partition("://")[2]
