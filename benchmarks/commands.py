"""`lightforcing bench`: dense against sparse on this machine, in one process.

The measurements are imported when a command runs, because they need torch.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from .console import Measured, carry_out, measurement, ratio_text, table_of
from .settings import AttentionBench, GpuBench, RolloutBench, Say, StepBench

app = typer.Typer(no_args_is_help=True, help="Measure dense against sparse on this machine, both in one process.")


@measurement(app, AttentionBench)
def attention(bench: AttentionBench, say: Say) -> Measured:
    """One layer's self-attention, chunk by chunk of an 81-frame video: the kernel alone and with its selection."""
    from .attention import flat_rows, run_attention

    result = run_attention(bench, say)
    table = table_of("×: times as fast as the best dense attention; whole: with selection", flat_rows(result))
    return result, table, [f"not measured: {name} ({reason})" for name, reason in result["not_here"].items()]


@measurement(app, StepBench)
def step(bench: StepBench, say: Say) -> Measured:
    """One forward of one chunk at real 1.3B shapes with random weights and a full cache, stage by stage."""
    from .step import run_step

    result = run_step(bench)
    stages = {arm: {"whole forward": result["arms"][arm]["median"]} | found for arm, found in result["stages"].items()}
    names = dict.fromkeys(name for found in stages.values() for name in found)
    rows = [
        {"stage": name} | {f"{arm} ms": 1e3 * found.get(name, 0.0) for arm, found in stages.items()} for name in names
    ]
    table = table_of(f"one forward of {result['layers']} layers, chunk {bench.chunk}", rows)
    lines = [f"sparse forward: {ratio_text(result['ratio'])} as fast as dense"]
    for name, found in result["graph_ratio"].items():
        lines.append(f"{name} forward as a CUDA graph: {ratio_text(found)} as fast as without")
    return result, table, lines


@measurement(app, RolloutBench)
def rollout(bench: RolloutBench, say: Say) -> Measured:
    """A whole video with random weights, tiny by default: seconds and peak memory of every chunk."""
    from .rollout import run_rollout

    result = run_rollout(bench, say)
    rows = [
        {"chunk": row["chunk"]}
        | {f"{arm} ms": 1e3 * sum(row[arm].values()) for arm in bench.arm}
        | {"peak MB": row["peak_bytes"] / 1e6}
        for row in result["chunks"][:: 1 if len(result["chunks"]) <= 21 else 10]
    ]
    table = table_of(f"{bench.frames} frames, {bench.setting} setting", rows)
    lines = [f"CUDA graphs, {name}: {text}" for name, text in result["cuda_graphs"].items()]
    for name, value in result.get("dense_over_sparse", {}).items():
        lines.append(f"sparse is {value:.2f}x as fast as dense: {name.replace('_', ' ')}")
    if flatness := result.get("flatness"):
        early, late = flatness["chunks"]
        lines.append(f"peak memory at chunk {late} / chunk {early}: {flatness['memory']:.4f}")
        for arm in bench.arm:
            lines.append(f"{arm}, seconds of the last 10 chunks / chunks 10-20: {flatness[f'{arm}_seconds']:.3f}")
    return result, table, lines


@measurement(app, GpuBench)
def gpu(bench: GpuBench, say: Say) -> Measured:
    """Check and time everything on this machine, for a report without paths and names to paste into an issue."""
    return _report(True, bench, say)


def doctor(
    file: Annotated[Path | None, typer.Option("--json", help="File for the report, to paste into an issue.")] = None,
) -> None:
    """Check in a minute what this machine has, and that every fast path compiles and is right on it."""
    if not carry_out(partial(_report, False), GpuBench(quick=True), file)["ok"]:
        raise typer.Exit(1)


def _report(everything: bool, bench: GpuBench, say: Say) -> Measured:
    from .gpu import stages
    from .stages import SECTIONS, run_stages

    report = run_stages(stages(bench.level, everything=everything, apply=bench.apply), say)
    tables = [table_of(name, report[name]) for name in SECTIONS if report[name] and name != "advice"]
    return report, Group(*tables), ["all is well" if report["ok"] else "something is wrong", *report["advice"]]
