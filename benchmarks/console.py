"""What the bench commands share: options that several take, checks of them, tables and how results are shown."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich import box
from rich.console import Console
from rich.table import Table

LINE = 120  # characters of a table row where nothing else sets them

Out = Annotated[Path | None, typer.Option(help="File for the raw JSON; without it only the tables are printed.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where torch sees one.")]
Block = Annotated[str, typer.Option(help="Tokens per query and key block.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
CudaGraphs = Annotated[str, typer.Option(help="A chunk's steps as one CUDA graph: auto, on or off.")]
Height = Annotated[int, typer.Option(help="Video height, a multiple of 16.")]
Width = Annotated[int, typer.Option(help="Video width, a multiple of 16.")]
Backend = Annotated[str, typer.Option(help="Sparse backend.")]
Repeats = Annotated[int, typer.Option(help="Rounds in which each arm runs once.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice without it.")]


def prepare(device: str | None, threads: int | None) -> str:
    """Set the threads and say where to run."""
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads {threads} is not positive; use 1 or more")
        torch.set_num_threads(threads)
    seen = torch.cuda.is_available()
    place = device or ("cuda" if seen else "cpu")
    if torch.device(place).type not in ("cpu", "cuda"):
        raise ValueError(f"device {place!r} is not measured here; use cpu or cuda")
    if place.startswith("cuda") and not seen:
        raise ValueError("torch sees no CUDA GPU here; use --device cpu")
    return place


def checked_dtype(name: str) -> str:
    names = ("bfloat16", "float16", "float32")
    if name not in names:
        raise ValueError(f"dtype {name!r} is not measured; use {', '.join(names)}")
    return name


def checked_cuda_graph(choice: str) -> Any:
    from ..lightforcing_core.model.cuda_graph import CudaGraph

    if choice not in get_args(CudaGraph):
        raise ValueError(f"--cuda-graph {choice!r} is not known; use {', '.join(get_args(CudaGraph))}")
    return choice


def integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} is not a list of whole numbers like 2,7") from None


def pair(text: str) -> tuple[int, int]:
    sizes = integers(text, "--block")
    if len(sizes) != 2:
        raise ValueError(f"--block {text!r} is not two sizes like 64,64")
    return sizes[0], sizes[1]


def new_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def ratio_text(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f}x ({low:.2f}-{high:.2f})"


def milliseconds(arm: dict[str, Any]) -> str:
    return f"{1e3 * arm['median']:.3g}" if arm["median"] < 0.1 else f"{1e3 * arm['median']:.0f}"


def new_console() -> Console:
    """The terminal; in a file or a pipe, lines long enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=LINE)


def show(console: Console, result: dict[str, Any], table: Table, out: Path | None) -> None:
    """The table, where it was measured, and the file."""
    console.print(table)
    gpu = f", {result['gpu']['name']}" if result["gpu"] else ""
    where = f"{result['machine']}{gpu}, {result['threads']} threads, torch {result['torch']}, commit {result['commit']}"
    console.print(where, highlight=False, soft_wrap=True)
    if "warm_up" in result:
        console.print(f"warm-up: {result['warm_up']}", highlight=False, soft_wrap=True)
    if out is not None:
        from .record import write

        write(out, result)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
