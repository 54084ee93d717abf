"""The command `lightforcing`: demo, inspect, bench, queue. Heavy imports wait until a command needs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from ..benchmarks.commands import app as bench

if TYPE_CHECKING:
    from .queue_client import Progress as RunProgress
    from .report import RunReport

INTERRUPTED = 130  # what shells report for Ctrl-C

app = typer.Typer(
    name="lightforcing",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console entry point."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lightforcing {version('light-forcing')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Light Forcing: chunk-aware sparse attention for autoregressive video diffusion."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.mp4, contact_sheet.png and report.json.")],
    chunks: Annotated[int, typer.Option(help="Chunks of 3 latent frames (12 video frames) each.")] = 7,
    height: Annotated[int, typer.Option(help="Video height in pixels, a multiple of 16.")] = 256,
    width: Annotated[int, typer.Option(help="Video width in pixels, a multiple of 16.")] = 448,
    target: Annotated[
        float, typer.Option(help="Mean sparsity of the sparse chunks; 0.88 skips 88 % of blocks.")
    ] = 0.88,
    base: Annotated[float, typer.Option(help="Sparsity that late chunks grow towards, at least the target.")] = 0.98,
    seed: Annotated[int, typer.Option(help="Seed of weights, prompt and noise.")] = 0,
) -> None:
    """Run the whole method on a small model and write a video. Weights are random, so the picture is abstract."""
    console = Console()
    with _clean_errors(), console.status("loading PyTorch"):
        from .demo import DemoSettings, run_demo

        settings = DemoSettings(height=height, width=width, chunks=chunks, target=target, base=base, seed=seed)
    console.print(
        f"{settings.video_frames} frames at {width}x{height} from a small model with random weights: "
        f"the picture is abstract, the machinery is the real one.",
        soft_wrap=True,
        highlight=False,
    )
    with _clean_errors(), _progress(console) as progress:
        bars: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)
            if not console.is_terminal and stage == "decoding":
                console.print(f"chunk {done} of {total} done", highlight=False)

        result = run_demo(out, settings, show)
    _print_report(console, result.report)
    for path in (result.video, result.contact_sheet, result.report_file):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .pt, a shard, an index or a folder.")],
    height: Annotated[int, typer.Option(help="Video height for the KV cache figure, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Video width for the KV cache figure, a multiple of 16.")] = 832,
) -> None:
    """Say what a checkpoint is, what would be loaded from it, and what it costs to run."""
    with _clean_errors():
        from .checkpoint import describe, inspect_checkpoint

        rows = describe(inspect_checkpoint(file), height=height, width=width)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    Console().print(table, highlight=False, markup=False)


@app.command()
def queue(
    workflow: Annotated[Path, typer.Argument(help="A workflow saved by ComfyUI, in UI or API form.")],
    out: Annotated[Path, typer.Option(help="Folder for the files that the run writes.")],
    server: Annotated[str, typer.Option(help="Address of the ComfyUI server.")] = "http://127.0.0.1:8188",
    timeout: Annotated[float | None, typer.Option(help="Give up and cancel after this many seconds.")] = None,
    temp: Annotated[bool, typer.Option("--temp", help="Download previews too.")] = False,
) -> None:
    """Run a workflow on a ComfyUI server and download what it wrote. Ctrl-C cancels the run there and exits 130."""
    from .output_files import prepare_folder
    from .queue_client import ComfyServer, run_prompt
    from .workflow_form import read_workflow, ui_to_api

    console = Console()
    with _clean_errors():
        document, is_canvas = read_workflow(workflow)
        prepare_folder(out)
        comfy = ComfyServer(server)
        prompt = ui_to_api(document, comfy.get("/object_info")) if is_canvas else document
        with _progress(console) as progress:
            line = progress.add_task("connecting", total=len(prompt))
            result = run_prompt(
                comfy,
                prompt,
                canvas=document if is_canvas else None,
                timeout=timeout,
                include_temp=temp,
                on_progress=_one_line(console, progress, line),
            )
            progress.update(line, description="downloading", completed=len(prompt))
            paths = [comfy.download(file, out) for file in result.files]
    for path in paths:
        console.print(f"wrote {path} ({path.stat().st_size / 1e3:,.0f} kB)", soft_wrap=True, highlight=False)
    if not paths:
        console.print("the run succeeded but wrote no file; add a save node, or fetch previews with --temp")
    for message in result.left_out:
        _complain(message)
    if result.left_out:
        _complain("the server left these parts of the workflow out")
        raise typer.Exit(1)


def _one_line(console: Console, progress: Progress, line: Any) -> Any:
    """A callback that keeps one progress line; where nothing can be redrawn, a plain line per node instead."""
    last = ""

    def show(event: "RunProgress") -> None:
        nonlocal last
        if not console.is_terminal and event.title != last:
            console.print(f"[{event.nodes_done + 1}/{event.nodes}] {event.title}", markup=False, highlight=False)
        last = event.title
        counted = f" {event.value:g}/{event.total:g}" if event.total > 1 else ""
        within = event.value / event.total if event.total else 0.0
        progress.update(line, description=f"{event.title}{counted}", completed=event.nodes_done + within)

    return show


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _print_report(console: Console, report: "RunReport") -> None:
    table = Table(title="what was kept", title_justify="left")
    for heading in ("chunk", "latent frames", "sees frames", "sparsity asked", "blocks kept"):
        table.add_column(heading, justify="right")
    for chunk in report.chunks:
        frames = f"{chunk.start_frame}-{chunk.start_frame + chunk.frames - 1}"
        table.add_row(
            str(chunk.index + 1), frames, str(chunk.kv_frames), f"{chunk.sparsity:.3f}", f"{chunk.density:.1%}"
        )
    console.print(table)
    table = Table(title="what it cost", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in report.seconds.items():
        table.add_row(stage, f"{seconds:.2f}")
    table.add_row("together", f"{sum(report.seconds.values()):.2f}", style="bold")
    console.print(table)
    ratio = report.attention_flops() / report.attention_flops(dense=True)
    console.print(f"attention FLOPs: {ratio:.1%} of dense", highlight=False)
    timing = report.facts["attention_seconds"]
    if "sparse" in timing:
        console.print(
            f"attention of the last chunk, one layer: dense {1e3 * timing['dense']:.1f} ms, "
            f"sparse {1e3 * timing['sparse']:.1f} ms + selection {1e3 * timing['selection']:.1f} ms: "
            f"{timing['dense_over_sparse']:.2f}x as fast",
            highlight=False,
            soft_wrap=True,
        )


class _CleanGroup(TyperGroup):
    """A group of commands that all report as the others do."""

    def invoke(self, ctx: Any) -> Any:
        with _clean_errors():
            return super().invoke(ctx)


app.add_typer(bench, name="bench", cls=_CleanGroup)


@contextmanager
def _clean_errors() -> Iterator[None]:
    """What a user can mend becomes lines on stderr and exit code 1; Ctrl-C becomes exit code 130."""
    from .queue_client import QueueError

    try:
        yield
    except (ValueError, OSError, QueueError) as error:
        _complain(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _complain("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def _complain(message: str) -> None:
    typer.echo(f"lightforcing: {message}", err=True)
