"""`lightforcing bench`: dense against sparse on this machine, in one process.

The measurements are imported when a command runs, because they need torch.
"""

import typer

from .console import Measured, measurement, milliseconds, new_table, ratio_text
from .settings import AttentionBench, RolloutBench, Say, StepBench

app = typer.Typer(no_args_is_help=True, help="Measure dense against sparse on this machine, both in one process.")


@measurement(app, AttentionBench)
def attention(bench: AttentionBench, say: Say) -> Measured:
    """One layer's self-attention, chunk by chunk of an 81-frame video: the kernel alone and with its selection."""
    from .attention import run_attention

    result = run_attention(bench, say)
    headings = ("backend", "with selection", "kernel", "ideal", "selection", "dense ms", "kernel ms", "whole ms")
    table = new_table("times as fast as the best dense attention", "chunk", *headings)
    for row in result["chunks"]:
        for name, ratios in row["ratios"].items():
            table.add_row(
                str(row["chunk"]),
                name,
                ratio_text(ratios["with_selection"]),
                ratio_text(ratios["kernel"]),
                f"{row['ideal_ratio']:.2f}x",
                f"{row['selection_share_of_dense']:.2%}",
                *(milliseconds(row["arms"][arm]) for arm in (f"dense {row['best_dense']}", f"kernel {name}")),
                milliseconds(row["arms"][f"whole {name}"]),
            )
    return result, table, [f"not measured: {name} ({reason})" for name, reason in result["not_here"].items()]


@measurement(app, StepBench)
def step(bench: StepBench, say: Say) -> Measured:
    """One forward of one chunk at real 1.3B shapes with random weights and a full cache, stage by stage."""
    from .step import run_step

    result = run_step(bench)
    layers, stages, arms = result["layers"], result["stages"], ("dense", "sparse")
    table = new_table(f"one forward of {layers} layers, chunk {bench.chunk}", "stage", "dense ms", "sparse ms")
    for name in dict.fromkeys(name for arm in arms for name in stages[arm]):
        table.add_row(name, *(f"{1e3 * stages[arm].get(name, 0.0):.1f}" for arm in arms))
    table.add_row("whole forward", *(milliseconds(result["arms"][arm]) for arm in arms), style="bold")
    lines = [f"sparse forward: {ratio_text(result['ratio'])} as fast as dense"]
    for name, found in result["graph_ratio"].items():
        lines.append(f"{name} forward as a CUDA graph: {ratio_text(found)} as fast as without")
    return result, table, lines


@measurement(app, RolloutBench)
def rollout(bench: RolloutBench, say: Say) -> Measured:
    """A whole video with random weights, tiny by default: seconds and peak memory of every chunk."""
    from .rollout import run_rollout

    result = run_rollout(bench, say)
    title = f"{bench.frames} frames, {bench.setting} setting"
    table = new_table(title, "chunk", *(f"{arm} ms" for arm in bench.arm), "peak MB")
    rows = result["chunks"]
    for row in rows if len(rows) <= 21 else rows[::10]:
        times = (f"{1e3 * sum(row[arm].values()):.1f}" for arm in bench.arm)
        table.add_row(str(row["chunk"]), *times, f"{row['peak_bytes'] / 1e6:.1f}")
    lines = [f"CUDA graphs, {name}: {text}" for name, text in result["cuda_graphs"].items()]
    for name, value in result.get("dense_over_sparse", {}).items():
        lines.append(f"sparse is {value:.2f}x as fast as dense: {name.replace('_', ' ')}")
    if flatness := result.get("flatness"):
        early, late = flatness["chunks"]
        lines.append(f"peak memory at chunk {late} / chunk {early}: {flatness['memory']:.4f}")
        for arm in bench.arm:
            lines.append(f"{arm}, seconds of the last 10 chunks / chunks 10-20: {flatness[f'{arm}_seconds']:.3f}")
    return result, table, lines
