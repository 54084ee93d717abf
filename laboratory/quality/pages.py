"""The results of the laboratory as pages: a table in Markdown, and plots."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightforcing.lightforcing_core.files.output import whole_file

from .arms import LONG, OPTIONS
from .claims import Table, sparsities_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("right", "colour", "shape", "direction", "speed", "identity", "copies", "position_error", "velocity_error")
PICTURE = ("latent_error", "psnr", "ms_ssim")
LINES = ("published", "uniform", "one-stage", *OPTIONS)
PLOTS = ("sparsity.png", "chunks.png", "layers.png", "drift.png", "claims.png")


def write_pages(folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Path]:
    """table.md and the plots that the rows have numbers for, in `folder`."""
    table = Table(rows)
    page = folder / "table.md"
    with whole_file(page) as partial:
        partial.write_text(markdown(summary), encoding="utf-8")
    return [page, *_plots(folder, table, summary)]


def markdown(summary: Mapping[str, Any]) -> str:
    """Claims, options and means as tables."""
    head = ("sparsity", "measure", "worse by", "95 % interval", "effect", "worse in", "seeds", "verdict")
    lines = []
    for says in dict.fromkeys(claim["says"] for claim in summary["claims"]):
        found = [claim for claim in summary["claims"] if claim["says"] == says]
        lines += [f"## {says[0].upper()}{says[1:]}", "", *_rows(head, [_cells(claim) for claim in found]), ""]
    lines += ["## Options against the published method", "", "Negative is better.", ""]
    short = ("latent_error", "psnr", "position_error", "right", "copies", "attention_error")
    found = [option for option in summary["options"] if option["measure"] in short]
    lines += _rows(("option", *head), [(option["says"], *_cells(option)) for option in found])
    for kind, title, columns in (
        ("video", "Means", ("flops", *PICTURE, *COLUMNS)),
        ("long", "Long rollouts", ("flops", "drift", "colour_late", "shape_late")),
        ("attention", "Attention error, mean over layers and sparse chunks", ("attention_error",)),
    ):
        found = [row for row in summary["means"] if row["kind"] == kind]
        if found:
            cells = [(row["arm"], str(row["videos"]), *(_number(row[name]) for name in columns)) for row in found]
            lines += ["", f"## {title}", "", *_rows(("arm", "videos", *columns), cells)]
    return "\n".join(lines) + "\n"


def _rows(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{_number(entry['low'])} to {_number(entry['high'])}"
    numbers = _number(entry["mean"]), interval, _number(entry["effect"]), f"{entry['worse_in']:.0%}"
    return f"{entry['sparsity']:g}", entry["measure"], *numbers, str(entry["seeds"]), entry["verdict"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _plots(folder: Path, table: Table, summary: Mapping[str, Any]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for name, draw in zip(PLOTS, (_sparsity, _chunks, _layers, _drift, _claims), strict=True):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        if draw(list(axes), table, summary):
            with whole_file(folder / name) as partial:
                figure.savefig(partial, dpi=110)
            written.append(folder / name)
        plt.close(figure)
    return written


def _mean(table: Table, kind: str, arm: str, measure: str) -> float | None:
    values = list(table.values(kind, arm, measure).values())
    return statistics.fmean(values) if values else None


def _sparsity(axes: Sequence["Axes"], table: Table, summary: Mapping[str, Any]) -> bool:
    """Error and share of right videos over what attention costs."""
    drawn = False
    for axis, measure in zip(axes, ("latent_error", "right"), strict=True):
        for line in LINES:
            points = []
            for sparsity in sparsities_of(table):
                cost, value = (_mean(table, "video", f"{line} {sparsity}", name) for name in ("flops", measure))
                if cost is not None and value is not None:
                    points.append((cost, value))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=line, linewidth=1.2, markersize=4)
                drawn = True
        dense = _mean(table, "video", "dense", measure)
        if dense is not None:
            axis.axhline(dense, color="grey", linewidth=0.8, linestyle="--", label="dense")
        axis.set(xlabel="attention FLOPs / dense", ylabel=measure)
    axes[1].set(ylim=(0, 1.05))
    if drawn:
        axes[0].legend(fontsize=8)
    return drawn


def _chunks(axes: Sequence["Axes"], table: Table, summary: Mapping[str, Any]) -> bool:
    """Latent error and position error over the video, at the highest sparsity."""
    sparsities = sparsities_of(table)
    drawn = False
    for line in ("published", "uniform", "one-stage", "early", "late", "tail", "dense"):
        arm = line if line == "dense" else f"{line} {sparsities[-1]}" if sparsities else line
        for axis, measure in zip(axes, ("latent_errors", "position_errors"), strict=True):
            over_time = _means_over_time(table, "video", arm, measure)
            if over_time and not (line == "dense" and measure == "latent_errors"):
                axis.plot(range(1, len(over_time) + 1), over_time, "o-", label=arm, linewidth=1.2, markersize=4)
                drawn = True
    axes[0].set(xlabel="chunk", ylabel="latent error against dense")
    axes[1].set(xlabel="eighth of the video", ylabel="distance from the promised path, heights")
    if drawn:
        axes[1].legend(fontsize=8)
    return drawn


def _layers(axes: Sequence["Axes"], table: Table, summary: Mapping[str, Any]) -> bool:
    """Attention error by layer and by chunk, at the highest sparsity."""
    sparsities = sparsities_of(table)
    drawn = False
    for line in (*LINES, "kv int8", "kv fp8"):
        rows = table.rows("attention", f"{line} {sparsities[-1]}") if sparsities else []
        errors = [row["errors"] for row in rows]
        if errors:
            layers, chunks = range(len(errors[0][0])), range(1, len(errors[0]))
            by_layer = [statistics.fmean(e[chunk][layer] for e in errors for chunk in chunks) for layer in layers]
            by_chunk = [statistics.fmean(e[chunk][layer] for e in errors for layer in layers) for chunk in chunks]
            axes[0].plot([layer + 1 for layer in layers], by_layer, "o-", label=line, linewidth=1.2, markersize=4)
            axes[1].plot([chunk + 1 for chunk in chunks], by_chunk, "o-", label=line, linewidth=1.2, markersize=4)
            drawn = True
    axes[0].set(xlabel="layer", ylabel="attention error against dense")
    axes[1].set(xlabel="chunk", ylabel="attention error against dense")
    if drawn:
        axes[0].legend(fontsize=8)
    return drawn


def _drift(axes: Sequence["Axes"], table: Table, summary: Mapping[str, Any]) -> bool:
    """Long rollouts: the distance from their own first chunk, and what their last quarter still shows."""
    arms = table.arms("long")
    for arm in arms:
        over_time = _means_over_time(table, "long", arm, "drifts")
        axes[0].plot(range(1, len(over_time) + 1), over_time, label=arm.removeprefix(LONG), linewidth=1.2)
    places = range(len(arms))
    for offset, measure in ((-0.2, "colour_late"), (0.2, "shape_late")):
        heights = [_mean(table, "long", arm, measure) or 0.0 for arm in arms]
        axes[1].bar([place + offset for place in places], heights, 0.38, label=measure)
    axes[0].set(xlabel="chunk", ylabel="change of look since the first chunk")
    axes[1].set_xticks(list(places), [arm.removeprefix(LONG) for arm in arms])
    axes[1].set(ylabel="share of promised things", ylim=(0, 1.05))
    for axis in axes:
        if arms:
            axis.legend(fontsize=8)
    return bool(arms)


def _claims(axes: Sequence["Axes"], table: Table, summary: Mapping[str, Any]) -> bool:
    """Effect on the latent error (left) and on the position error (right), with intervals."""
    drawn = False
    for axis, measure in zip(axes, ("latent_error", "position_error"), strict=True):
        entries = [claim for claim in summary["claims"] if claim["measure"] == measure]
        labels = [f"{entry['worse']} − {entry['better']}" for entry in entries]
        for place, entry in enumerate(entries):
            axis.plot([entry["low"], entry["high"]], [place, place], color="#3b7dd8", linewidth=2)
            axis.plot(entry["mean"], place, "o", color="#1d2733", markersize=4)
            drawn = True
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel=f"difference in {measure}, 95 % interval")
    return drawn


def _means_over_time(table: Table, kind: str, arm: str, measure: str) -> list[float]:
    lists = [row[measure] for row in table.rows(kind, arm)]
    if not lists:
        return []
    columns = ([value for value in column if value is not None] for column in zip(*lists, strict=True))
    return [statistics.fmean(column) if column else float("nan") for column in columns]
