"""`lightforcing bench` and `lightforcing doctor`.

The measurements are imported when a command runs, because they need torch.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Out, carry_out, with_options
from .settings import AttentionBench, DecodeBench, GpuBench, RolloutBench, StepBench

app = typer.Typer(no_args_is_help=True, help="Measure dense against sparse on this machine, both in one process.")


def _measure(name: str, *arguments: Any, **options: Any) -> None:
    import_module(f".{name}", __package__).measure(*arguments, **options)


for _kind in AttentionBench, StepBench, DecodeBench, RolloutBench, GpuBench:
    _name = _kind.__name__.removesuffix("Bench").lower()
    app.command(_name, help=_kind.__doc__)(with_options(_kind, partial(carry_out, partial(_measure, _name)), Out, None))


def doctor(
    file: Annotated[Path | None, typer.Option("--json", help="File for the report, to paste into an issue.")] = None,
) -> None:
    """Check in a minute what this machine has, and that every fast path compiles and is right on it."""
    checks = partial(_measure, "gpu", everything=False)
    if not carry_out(checks, GpuBench(quick=True), file)["ok"]:
        raise typer.Exit(1)
