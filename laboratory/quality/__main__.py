"""The command `python -m laboratory.quality`: its options, and the claims as a table."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lightforcing.benchmarks.console import Backend, Device, Threads, integers, new_console, new_table, prepare, show

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _CleanCommand(TyperCommand):
    """A command whose errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"laboratory.quality: {error}", err=True)
            raise typer.Exit(1) from error


@app.command(cls=_CleanCommand)
def quality(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, quality.json, table.md and plots; runs resume.")],
    models: Annotated[
        Path | None, typer.Option(help="Folder of a demo model; the one that comes with the pack without it.")
    ] = None,
    arms: Annotated[
        str, typer.Option(help='Arms by name or pattern, with commas: "dense,published,long *"; all without it.')
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, a video each per arm.")] = "0-31",
    sparsities: Annotated[str, typer.Option(help="Mean sparsities of the sparse chunks, with commas.")] = (
        "0.5,0.75,0.88"
    ),
    keep: Annotated[str, typer.Option(help="Past latent frames that stay eligible, of them sinks, nearest.")] = "6,1,2",
    long_frames: Annotated[int, typer.Option(help="Video frames of long rollouts, 1 + 4k; 0 makes none.")] = 241,
    window: Annotated[str, typer.Option(help="Visible latent frames and sinks of long rollouts.")] = "12,1",
    probes: Annotated[int, typer.Option(help="Seeds whose attention is compared layer by layer.")] = 8,
    batch: Annotated[int, typer.Option(help="Seeds that run together.")] = 8,
    backend: Backend = "reference",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """What sparsity does to the demo model's videos: judged by caption, against dense, over time and by layer."""
    place = prepare(device, threads)
    from lightforcing.lightforcing_core.demo import model as demo_model

    from .bench import QualityBench, run_quality
    from .report import report

    bench = QualityBench(
        models=models or demo_model.SHIPPED,
        seeds=_seeds(seeds),
        sparsities=_numbers(sparsities, "--sparsities"),
        arms=tuple(part.strip() for part in arms.split(",") if part.strip()),
        keep=_some(keep, "--keep", 3),  # type: ignore[arg-type]
        long_frames=long_frames,
        window=_some(window, "--window", 2),  # type: ignore[arg-type]
        probe_seeds=probes,
        batch=batch,
        backend=backend,
        device=place,
    )
    console = new_console()
    with console.status("running") as status:
        rows = run_quality(bench, out, lambda done, total: status.update(f"{done} of {total} rows"))
    result, pages = report(bench, out, rows)
    headings = ("sparsity", "measure", "worse by", "95 % interval", "effect", "seeds", "verdict")
    table = new_table("the paper's claims", "claim", *headings)
    for claim in result["claims"]:
        effect = "-" if claim["effect"] is None else f"{claim['effect']:.2f}"
        interval = f"{claim['low']:.3g} to {claim['high']:.3g}"
        numbers = f"{claim['mean']:.3g}", interval, effect, str(claim["seeds"])
        names = f"{claim['worse'].rpartition(' ')[0]} / {claim['better'].rpartition(' ')[0] or claim['better']}"
        table.add_row(names, f"{claim['sparsity']:g}", claim["measure"], *numbers, claim["verdict"])
    show(console, result, table, None)
    for page in pages:
        console.print(f"wrote {page}", highlight=False, soft_wrap=True)


def _some(text: str, option: str, count: int) -> tuple[int, ...]:
    values = integers(text, option)
    if len(values) != count:
        raise ValueError(f"{option} {text!r} holds {len(values)} numbers; give {count}")
    return values


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} is not a list of numbers like 0.5,0.88") from None


def _seeds(text: str) -> tuple[int, ...]:
    """ "0-3,8" as 0, 1, 2, 3, 8."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ValueError(f"--seeds {text!r} is not a list of seeds and ranges like 0-31,40")
        seeds += range(int(first), int(last or first) + 1)
    return tuple(seeds)


if __name__ == "__main__":
    app(prog_name="python -m laboratory.quality")
