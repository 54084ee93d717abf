"""The laboratory's commands: python -m laboratory.quality run --out DIR, and python -m laboratory.quality pages DIR."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lightforcing.benchmarks.console import Put, carry_out, with_options
from lightforcing.benchmarks.settings import Say
from lightforcing.benchmarks.timing import describe
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

    def measure(bench: QualityBench, put: Put, say: Say) -> None:
        rows = run_quality(bench, out, lambda done, total: say(f"{done} of {total} rows"))
        describe(put, bench.machine.prepare(), "quality", bench)
        put("", "bench", "quality")
        put("", "rows", len(rows))
        put("arguments", "quality", {"models": bench.models.name})
        for name, value in asdict(demo_video(bench.models)).items():
            put("video", name, value)
        found = summary(rows)
        for claim in found["claims"]:
            worse, better = (claim[side].rpartition(" ")[0] or claim[side] for side in ("worse", "better"))
            columns = {name: claim[name] for name in ("sparsity", "measure", "effect", "seeds", "verdict")}
            interval = {"median": claim["mean"], "low": claim["low"], "high": claim["high"]}
            name = f"{worse} / {better}, {claim['measure']} at {claim['sparsity']:g}"
            put("the paper's claims", name, {"worse by": interval, **columns})
        for page in write_pages(out, rows, found):
            put("wrote", page.name, "")

    carry_out(measure, bench, out / "quality.json")


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
