"""The command `lightforcing`; its commands import torch only when they run."""

from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from ..benchmarks.console import Out, carry_out, with_options
from ..benchmarks.settings import (
    AttentionBench,
    CoreBench,
    DecodeBench,
    GpuBench,
    PoliciesBench,
    RolloutBench,
    StepBench,
)
from ..lightforcing_core.families import Family
from .queue.command import complain, queue
from .render.command import render

INTERRUPTED = 130  # the exit code of shells for Ctrl-C


class _CleanGroup(TyperGroup):
    """A command group that reports a user's errors and Ctrl-C as a line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            complain(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="lightforcing",
    cls=_CleanGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
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
        str | None, typer.Option(help="The video's content, in words that the demo model knows.")
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="Chunks of 3 latent frames (12 video frames) each.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Video height in pixels, a multiple of 16.")] = None,
    width: Annotated[int | None, typer.Option(help="Video width in pixels, a multiple of 16.")] = None,
    target: Annotated[
        float, typer.Option(help="Mean sparsity of the sparse chunks; 0.7 skips 70 % of the blocks, 0 none.")
    ] = Family.target,
    base: Annotated[
        float | None, typer.Option(help="Sparsity that late chunks approach; by default the target + 0.1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    models: Annotated[Path | None, typer.Option(help="Folder of a demo model; by default the one of the pack.")] = None,
) -> None:
    """Run the whole method on a small model and write a video. By default the sizes are the model's own."""
    console = Console()
    with console.status("loading PyTorch"):
        from ..lightforcing_core.report.pages import describe
        from .demo import make_demo
    with _progress(console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)
            if not console.is_terminal and stage == "decoding":
                console.print(f"chunk {done} of {total} done", highlight=False)

        sizes: dict[str, Any] = {"chunks": chunks, "height": height, "width": width, "target": target, "base": base}
        record, files = make_demo(out, show, models=models, caption=caption, seed=seed, **sizes)
    for line in (describe(record), *(f"wrote {path}" for path in files)):
        typer.echo(line)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .pt, a shard, an index or a folder.")],
    height: Annotated[int, typer.Option(help="Video height for the memory figures, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Video width for the memory figures, a multiple of 16.")] = 832,
    length: Annotated[int, typer.Option(help="Video frames for the memory figures, 1 + 4k.")] = 81,
) -> None:
    """Describe a checkpoint, the weights that would be loaded from it, and the memory that it needs."""
    from ..lightforcing_core.checkpoint.load import describe, inspect_checkpoint
    from ..lightforcing_core.memory.plan import describe_memory

    info = inspect_checkpoint(file)
    rows = describe(info)
    rows += describe_memory(info.size, info.family, height=height, width=width, length=length)
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
    weights: Annotated[str | None, typer.Option(help="Which of several sets of weights; inspect lists them.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA of the model, such as LongLive's, to merge first.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of Light Forcing Save Text Embeds: run the model on it first to choose the scales of "
            "activations. Without it, ComfyUI clips activations at 448."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a checkpoint as FP8 in ComfyUI's format: half the size of bf16, for Load Diffusion Model and our loader."""
    console = Console()
    with _progress(console) as progress:
        from ..lightforcing_core.fp8.export import write_fp8_checkpoint

        bar = progress.add_task("reading", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(bar, description=stage, completed=done, total=total)

        report = write_fp8_checkpoint(
            file, out, weights=weights, lora=lora, prompts=prompts, overwrite=force, on_progress=show
        )
    for line in report:
        typer.echo(line)


@app.command()
def doctor(
    file: Annotated[Path | None, typer.Option("--json", help="File for the report, to paste into an issue.")] = None,
) -> None:
    """Check in a minute what this machine has, and that every fast path is right on it and, on a GPU, compiles."""
    if not carry_out(partial(_measure, "gpu", everything=False), GpuBench(quick=True), file)["ok"]:
        raise typer.Exit(1)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _measure(name: str, *arguments: Any, **options: Any) -> None:
    import_module(f"..benchmarks.{name}", __package__).measure(*arguments, **options)


bench = typer.Typer(no_args_is_help=True, help="Measure dense against sparse on this machine, both in one process.")
for _kind in AttentionBench, PoliciesBench, StepBench, DecodeBench, RolloutBench, CoreBench, GpuBench:
    _name = _kind.__name__.removesuffix("Bench").lower()
    _command = with_options(_kind, partial(carry_out, partial(_measure, _name)), Out, None)
    bench.command(_name, help=_kind.__doc__)(_command)
app.add_typer(bench, name="bench")
app.command()(queue)
app.command()(render)
