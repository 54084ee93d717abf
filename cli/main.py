"""The command `lightforcing`: demo, inspect, quantize, bench, queue. Heavy imports wait until a command needs them."""

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
from ..lightforcing_core.families import Family
from .queue.command import complain, queue

if TYPE_CHECKING:
    from ..lightforcing_core.report.plots import RunReport

INTERRUPTED = 130  # what shells report for Ctrl-C


@contextmanager
def _clean_errors() -> Iterator[None]:
    """An error that a user can mend becomes lines on stderr and exit code 1; Ctrl-C becomes exit code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        complain("interrupted")
        raise typer.Exit(INTERRUPTED) from None


class _CleanGroup(TyperGroup):
    """Commands that report errors in one way."""

    def invoke(self, ctx: Any) -> Any:
        with _clean_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="lightforcing",
    cls=_CleanGroup,
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
    caption: Annotated[
        str | None, typer.Option(help="What the video shows; a word that the model does not know is refused.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of 3 latent frames (12 video frames) each.")] = None,
    height: Annotated[int | None, typer.Option(help="Video height in pixels, a multiple of 16.")] = None,
    width: Annotated[int | None, typer.Option(help="Video width in pixels, a multiple of 16.")] = None,
    target: Annotated[
        float, typer.Option(help="Mean sparsity of the sparse chunks; 0.6 skips 60 % of blocks, 0 none.")
    ] = Family.target,
    base: Annotated[float, typer.Option(help="Sparsity that late chunks grow towards, at least the target.")] = (
        Family.base
    ),
    seed: Annotated[int, typer.Option(help="Seed of the noise, and of random weights.")] = 0,
    models: Annotated[
        Path | None, typer.Option(help="Folder of a demo model; the one that comes with the pack, where there is one.")
    ] = None,
) -> None:
    """Run the whole method on a small model and write a video of a caption. Sizes are the model's own."""
    console = Console()
    with _clean_errors(), console.status("loading PyTorch"):
        from ..lightforcing_core.demo import model as demo_model
        from .demo import DemoSettings, run_demo

        chosen: dict[str, Any] = {"chunks": chunks, "height": height, "width": width, "caption": caption}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        chosen |= {"target": target, "base": base, "seed": seed}
        if models is None and demo_model.is_complete(demo_model.SHIPPED):
            models = demo_model.SHIPPED
        if models is not None:
            settings = DemoSettings.of_video(demo_model.demo_video(models), **chosen)
            what = f"{settings.caption!r}, from the demo model."
        elif caption is not None:
            raise ValueError("a caption needs the demo model, which is not here; leave it out or name --models")
        else:
            settings = DemoSettings(**chosen)
            what = "from a small model with random weights: the picture is abstract, the machinery is the real one."
    console.print(
        f"{settings.video_frames} frames at {settings.width}x{settings.height}, {what}",
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

        result = run_demo(out, settings, show, models=models)
    _print_report(console, result.report)
    for path in (result.video, result.contact_sheet, result.report_file):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .pt, a shard, an index or a folder.")],
    height: Annotated[int, typer.Option(help="Video height for the memory figures, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Video width for the memory figures, a multiple of 16.")] = 832,
    length: Annotated[int, typer.Option(help="Video frames for the memory figures, 1 + 4k.")] = 81,
) -> None:
    """Say what a checkpoint is, what would be loaded from it, and what it costs to run."""
    with _clean_errors():
        from ..lightforcing_core.checkpoint.load import describe, inspect_checkpoint
        from ..lightforcing_core.memory.estimate import ModelSize
        from ..lightforcing_core.memory.plan import describe_memory

        info = inspect_checkpoint(file)
        wan = info.size
        size = ModelSize(wan.dim, wan.ffn_dim, wan.layers, wan.text_dim, 2 * wan.parameters)
        rows = describe(info, height=height, width=width)
        rows += describe_memory(size, info.family, height=height, width=width, length=length)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    Console().print(table, highlight=False, markup=False)


@app.command()
def quantize(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .pt, a shard, an index or a folder.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write, in a folder that exists.")],
    weights: Annotated[
        str | None, typer.Option(help="Which set of weights, where the file holds several (inspect lists them).")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA that belongs to the checkpoint, such as LongLive's; merged first.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of Light Forcing Save Text Embeds: run the model on it first, to fix how activations are "
            "scaled. Without, ComfyUI cuts off those beyond 448."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint as FP8 in ComfyUI's format: half the size of bf16, for Load Diffusion Model and our loader."""
    console = Console()
    with _clean_errors(), _progress(console) as progress:
        from ..lightforcing_core.fp8.export import write_fp8_checkpoint

        bar = progress.add_task("reading", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        written = write_fp8_checkpoint(
            file, out, weights=weights, lora=lora, prompts=prompts, overwrite=force, on_progress=show
        )
    console.print(
        f"wrote {written.path} ({written.bytes_before / 1e9:.2f} → {written.bytes_after / 1e9:.2f} GB)\n"
        f"{written.layers} layers in FP8; rounding moved their weights by {written.error:.2%}, at most by "
        f"{written.worst[1]:.2%} ({written.worst[0]})",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    for note in written.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


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
    if timing is None:
        console.print(
            "attention ran on the plain reference, which is not timed: frames this small repay no compiler",
            soft_wrap=True,
        )
    elif "sparse" in timing:
        console.print(
            f"attention of the last chunk, one layer: dense {1e3 * timing['dense']:.1f} ms, "
            f"sparse {1e3 * timing['sparse']:.1f} ms + selection {1e3 * timing['selection']:.1f} ms: "
            f"{timing['dense_over_sparse']:.2f}x as fast",
            highlight=False,
            soft_wrap=True,
        )


app.add_typer(bench, name="bench")
app.command()(queue)
