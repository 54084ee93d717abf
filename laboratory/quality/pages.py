"""A folder's rows as pages: a table in Markdown, and plots."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from lightforcing.lightforcing_core.files.output import whole_file

from .arms import EIGHT_BIT, LONG, OPTIONS
from .claims import DEFAULT, DEFAULT_MEASURES, FEWEST, MEASURES, Row, Table

LINES = ("published", "uniform", "one-stage", *OPTIONS)
LINE: dict[str, Any] = {"marker": "o", "linewidth": 1.2, "markersize": 4}
OPTION_MEASURES = ("latent_error", "psnr", "position_error", "right", "copies", "attention_error")
MEANS = {
    "video": (
        *("Means", "flops", "latent_error", "psnr", "ms_ssim", "right", "colour", "shape", "direction", "speed"),
        *("identity", "copies", "position_error", "velocity_error"),
    ),
    "long": ("Long rollouts", "flops", *MEASURES["long"]),
    "attention": ("Attention error, mean over layers and sparse chunks", "attention_error"),
}
COMPARED = (
    ("default", f"the default for untrained models, {DEFAULT}", DEFAULT_MEASURES),
    ("long", f"{LONG}dense", tuple(MEASURES["long"])),
)

Summary = Mapping[str, Any]
Draw = Callable[[Axes, Axes, Table, Summary], None]


def write_pages(folder: Path, rows: Sequence[Row], summary: Summary) -> list[Path]:
    """table.md and the plots that the rows have numbers for, in `folder`."""
    table, page = Table(rows), folder / "table.md"
    with whole_file(page) as partial:
        partial.write_text(markdown(summary), encoding="utf-8")
    written = [page]
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        draw(axes[0], axes[1], table, summary)
        if any(axis.has_data() for axis in axes):
            for axis in axes:
                if axis.get_legend_handles_labels()[1]:
                    axis.legend(fontsize=8)
            with whole_file(folder / name) as partial:
                figure.savefig(partial, dpi=110)
            written.append(folder / name)
        plt.close(figure)
    return written


def markdown(summary: Summary) -> str:
    """Claims, options, comparisons with the default, and means as tables."""
    head = ("sparsity", "measure", "worse by", "95 % interval", "effect", "worse in", "seeds", "verdict")
    lines = []
    for says in dict.fromkeys(claim["says"] for claim in summary["claims"]):
        found = [claim for claim in summary["claims"] if claim["says"] == says]
        lines += [f"## {says[0].upper()}{says[1:]}", "", *_rows(head, [_cells(claim) for claim in found]), ""]
    lines += ["## Options against the published method", "", "Negative is better.", ""]
    found = [option for option in summary["options"] if option["measure"] in OPTION_MEASURES]
    lines += _rows(("option", *head), [(option["says"], *_cells(option)) for option in found])
    for name, title, measures in COMPARED:
        if summary[name]:
            cells = [
                (row["arm"], str(row["seeds"]), _number(row["flops"]), *(_interval(row[each]) for each in measures))
                for row in summary[name]
            ]
            lines += ["", f"## Worse than {title}", "", "Negative is better.", ""]
            lines += _rows(("arm", "seeds", "flops", *measures), cells)
    for kind, (title, *columns) in MEANS.items():
        found = [row for row in summary["means"] if row["kind"] == kind]
        if found:
            cells = [(row["arm"], str(row["videos"]), *(_number(row[name]) for name in columns)) for row in found]
            lines += ["", f"## {title}", "", *_rows(("arm", "videos", *columns), cells)]
    return "\n".join(lines) + "\n"


def _rows(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    mean, low, high = (_number(entry[name]) for name in ("mean", "low", "high"))
    return mean if entry["seeds"] < FEWEST else f"{mean} ({low} to {high})"


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"{_number(entry['low'])} to {_number(entry['high'])}"
    numbers = _number(entry["mean"]), interval, _number(entry["effect"]), f"{entry['worse_in']:.0%}"
    return f"{entry['sparsity']:g}", entry["measure"], *numbers, str(entry["seeds"]), entry["verdict"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _sparsity(left: Axes, right: Axes, table: Table, summary: Summary) -> None:
    """Error and share of right videos over the cost of attention."""
    for axis, measure in ((left, "latent_error"), (right, "right")):
        for line in LINES:
            arms = [f"{line} {sparsity}" for sparsity in table.sparsities()]
            points = [(table.mean("video", arm, "flops"), table.mean("video", arm, measure)) for arm in arms]
            points = [point for point in points if None not in point]
            if points:
                axis.plot(*zip(*points, strict=True), label=line, **LINE)
        dense = table.mean("video", "dense", measure)
        if dense is not None and axis.has_data():
            axis.axhline(dense, color="grey", linewidth=0.8, linestyle="--", label="dense")
        axis.set(xlabel="attention FLOPs / dense", ylabel=measure)
    right.set(ylim=(0, 1.05))


def _chunks(left: Axes, right: Axes, table: Table, summary: Summary) -> None:
    """Latent error and position error over the video, at the highest sparsity."""
    last = table.sparsities()[-1:]
    for arm in [f"{line} {s}" for line in ("published", "uniform", "one-stage", "early", "late", "tail") for s in last]:
        _plot(left, _over_time(table, "video", arm, "latent_errors"), arm)
        _plot(right, _over_time(table, "video", arm, "position_errors"), arm)
    _plot(right, _over_time(table, "video", "dense", "position_errors"), "dense")
    left.set(xlabel="chunk", ylabel="latent error against dense")
    right.set(xlabel="eighth of the video", ylabel="distance from the promised path, heights")


def _layers(left: Axes, right: Axes, table: Table, summary: Summary) -> None:
    """Attention error by layer and by chunk, at the highest sparsity; the first chunk is dense."""
    for line in (*LINES, *EIGHT_BIT):
        for sparsity in table.sparsities()[-1:]:
            errors = np.array([row["errors"] for row in table.rows("attention", f"{line} {sparsity}")])
            if errors.size:
                mean = errors[:, 1:].mean(axis=0)  # [chunks, layers]
                _plot(left, mean.mean(axis=0), line)
                _plot(right, mean.mean(axis=1), line, first=2)
    for axis, label in ((left, "layer"), (right, "chunk")):
        axis.set(xlabel=label, ylabel="attention error against dense")


def _drift(left: Axes, right: Axes, table: Table, summary: Summary) -> None:
    """Long rollouts: the distance from their own first chunk, and the things that their last quarter still shows."""
    arms = table.arms("long")
    names = [arm.removeprefix(LONG) for arm in arms]
    for arm, name in zip(arms, names, strict=True):
        left.plot(
            range(1, 1 + len(values := _over_time(table, "long", arm, "drifts"))), values, label=name, linewidth=1.2
        )
    for offset, measure in ((-0.2, "colour_late"), (0.2, "shape_late")):
        heights = [table.mean("long", arm, measure) or 0.0 for arm in arms]
        if arms:
            right.bar([place + offset for place in range(len(arms))], heights, 0.38, label=measure)
    left.set(xlabel="chunk", ylabel="change of look since the first chunk")
    right.set_xticks(range(len(arms)), names)
    right.set(ylabel="share of promised things", ylim=(0, 1.05))


def _claims(left: Axes, right: Axes, table: Table, summary: Summary) -> None:
    """Differences in the latent error (left) and the position error (right), with intervals."""
    for axis, measure in ((left, "latent_error"), (right, "position_error")):
        entries = [claim for claim in summary["claims"] if claim["measure"] == measure]
        for place, entry in enumerate(entries):
            axis.plot([entry["low"], entry["high"]], [place, place], color="#3b7dd8", linewidth=2)
            axis.plot(entry["mean"], place, "o", color="#1d2733", markersize=4)
        if entries:
            axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(entries)), [f"{entry['worse']} − {entry['better']}" for entry in entries], fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel=f"difference in {measure}, 95 % interval")


PLOTS: dict[str, Draw] = {
    "sparsity.png": _sparsity,
    "chunks.png": _chunks,
    "layers.png": _layers,
    "drift.png": _drift,
    "claims.png": _claims,
}


def _plot(axis: Axes, values: Sequence[float] | np.ndarray, label: str, first: int = 1, marker: str = "o") -> None:
    if len(values):
        axis.plot(range(first, first + len(values)), values, label=label, **{**LINE, "marker": marker})


def _over_time(table: Table, kind: str, arm: str, measure: str) -> list[float]:
    """The mean over videos of every entry of a list; NaN if no video has a number there."""
    columns = zip(*(row[measure] for row in table.rows(kind, arm)), strict=True)
    numbers = ([value for value in column if value is not None] for column in columns)
    return [statistics.fmean(column) if column else float("nan") for column in numbers]
