"""The laboratory's commands: python -m laboratory.quality run --out DIR, and python -m laboratory.quality pages DIR."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lightforcing.benchmarks.console import new_console, new_table, show, with_options
from lightforcing.benchmarks.record import facts, write
from lightforcing.lightforcing_core.demo.model import demo_video

from .bench import QualityBench, run_quality
from .claims import summary
from .pages import write_pages
from .rows import read_rows


class _CleanGroup(TyperGroup):
    """Commands whose errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"laboratory.quality: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_CleanGroup, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="Folder for rows.jsonl, quality.json, table.md and plots; runs resume.")]


def run(bench: QualityBench, out: Path) -> None:
    """Measure the effect of sparsity on videos: against their captions and dense ones, over time and by layer."""
    console = new_console()
    with console.status("running") as status:
        rows = run_quality(bench, out, lambda done, total: status.update(f"{done} of {total} rows"))
    record = {"bench": "quality", **facts(bench.machine.prepare(), bench)}
    record |= {"video": asdict(demo_video(bench.models)), "rows": len(rows)}
    record["arguments"]["models"] = bench.models.name
    write(out / "quality.json", record)
    found = summary(rows)
    table = new_table(
        "the paper's claims", "claim", "sparsity", "measure", "worse by", "95 % interval", "effect", "seeds"
    )
    table.add_column("verdict", justify="right")
    for claim in found["claims"]:
        names = f"{claim['worse'].rpartition(' ')[0]} / {claim['better'].rpartition(' ')[0] or claim['better']}"
        interval = f"{claim['low']:.3g} to {claim['high']:.3g}"
        effect = "-" if claim["effect"] is None else f"{claim['effect']:.2f}"
        numbers = f"{claim['sparsity']:g}", claim["measure"], f"{claim['mean']:.3g}", interval, effect
        table.add_row(names, *numbers, str(claim["seeds"]), claim["verdict"])
    show(console, record, table, [f"wrote {page}" for page in write_pages(out, rows, found)])


app.command("run", help=run.__doc__)(with_options(QualityBench, run, Folder, ...))


@app.command()
def pages(
    folder: Annotated[Path, typer.Argument(help="A folder with rows.jsonl, or with it compressed by xz.")],
) -> None:
    """Write the table and the plots of a folder anew."""
    _, rows = read_rows(folder)
    if not rows:
        raise ValueError(f"{folder} holds no rows; name the --out of a run")
    for page in write_pages(folder, rows, summary(rows)):
        typer.echo(f"wrote {page}")


if __name__ == "__main__":
    app(prog_name="python -m laboratory.quality")
