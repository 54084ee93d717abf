"""Conclusions from the rows: means per arm, differences of paired seeds, and the paper's claims.

A difference is taken seed by seed, with the same prompt and the same noise on both sides; its 95 % interval comes
from resampling the seeds. Effect sizes are the mean difference over the standard deviation of the differences.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .arms import EIGHT_BIT, LONG, OPTIONS

Row = Mapping[str, Any]
RESAMPLES = 10_000
FEWEST = 8  # seeds; an interval of fewer says nothing
MARGIN = 0.1  # sparse rollouts may drift this share of dense's drift further and still count as "not more"

# The measures of each kind of row, and whether more is better.
MEASURES = {
    "video": {
        "latent_error": False,
        "psnr": True,
        "ssim": True,
        "ms_ssim": True,
        "right": True,
        "colour": True,
        "shape": True,
        "direction": True,
        "speed": True,
        "identity": True,
        "strangers": False,
        "position_error": False,
        "velocity_error": False,
        "copies": False,
    },
    "long": {
        "drift": False,
        "colour_late": True,
        "shape_late": True,
        "right": True,
        "identity": True,
        "motion_late": True,
    },
    "attention": {"attention_error": False},
}

# "The first arm is worse than the second", of both at one sparsity; of long rollouts, "is not worse than dense".
CLAIMS = {
    "sparsifying early chunks hurts more than late ones": ("early", "late"),
    "growth (CAG) beats uniform sparsity at equal FLOPs": ("uniform", "published"),
    "hierarchical selection (HSA) beats one-stage top-k at equal density": ("one-stage", "published"),
}
JUDGED = ("latent_error", "psnr", "ms_ssim", "position_error", "right", "attention_error")  # the measures of claims
DEFAULT, DEFAULT_MEASURES = "tail+lse 0.6", ("psnr", "right", "identity", "position_error", "velocity_error")
DRIFT = "long sparse rollouts do not drift more than dense ones"


@dataclass(frozen=True)
class Difference:
    """How much worse one arm is than another: mean over paired seeds, its 95 % interval, and the effect size.

    worse_in: the share of seeds in which it is worse; effect is None if all differences are equal.
    """

    seeds: int
    mean: float
    low: float
    high: float
    effect: float | None
    worse_in: float

    @property
    def verdict(self) -> str:
        """Whether the first arm is worse: "yes", "no, better", or "undecided", as it is with a handful of seeds."""
        if self.seeds < FEWEST:
            return "undecided"
        return "yes" if self.low > 0 else "no, better" if self.high < 0 else "undecided"


class Table:
    """The rows by kind and arm."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        for row in rows:
            self._rows.setdefault((row["kind"], row["arm"]), {})[row["seed"]] = row

    def arms(self, kind: str) -> list[str]:
        """The arms that have rows of this kind, in the order in which they were made."""
        return [arm for found, arm in self._rows if found == kind]

    def rows(self, kind: str, arm: str) -> list[Row]:
        return list(self._rows.get((kind, arm), {}).values())

    def values(self, kind: str, arm: str, measure: str) -> dict[int, float]:
        """The measure by seed, of the seeds that have a number."""
        found = self._rows.get((kind, arm), {})
        return {seed: row[measure] for seed, row in found.items() if row.get(measure) is not None}

    def mean(self, kind: str, arm: str, measure: str) -> float | None:
        values = list(self.values(kind, arm, measure).values())
        return statistics.fmean(values) if values else None

    def worse(self, kind: str, arm: str, other: str, measure: str) -> Difference | None:
        """How much worse `arm` is than `other`; None without seeds that both have."""
        first, second = self.values(kind, arm, measure), self.values(kind, other, measure)
        sign = -1.0 if MEASURES[kind][measure] else 1.0
        shared = sorted(first.keys() & second.keys())
        return paired([sign * (first[seed] - second[seed]) for seed in shared]) if shared else None

    def sparsities(self) -> list[str]:
        """The sparsities of the rows, as they are written in arms' names, rising."""
        names = {arm.rpartition(" ")[2] for kind in ("video", "long") for arm in self.arms(kind)}
        return sorted((name for name in names if name.replace(".", "", 1).isdigit()), key=float)


def paired(differences: Sequence[float]) -> Difference:
    """Mean and percentile bootstrap interval of paired differences; the same for the same numbers."""
    values = np.asarray(differences, float)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    mean = float(values.mean())
    effect = mean / spread if spread > 0 else None
    return Difference(len(values), mean, float(low), float(high), effect, float((values > 0).mean()))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Claims, the effect of each option, comparisons with the default and with long dense videos, and means."""
    table = Table(rows)
    sparsities = table.sparsities()
    return {
        "claims": [entry for sparsity in sparsities for entry in _claims(table, sparsity)],
        "options": [entry for sparsity in sparsities for entry in _options(table, sparsity)],
        "default": list(_against(table, "video", DEFAULT, DEFAULT_MEASURES)),
        "long": list(_against(table, "long", f"{LONG}dense", tuple(MEASURES["long"]))),
        "means": means(table),
    }


def _claims(table: Table, sparsity: str) -> Iterator[dict[str, Any]]:
    """The paper's claims at one sparsity, by every measure that has numbers."""
    verdicts = {"yes": "holds", "no, better": "contradicted", "undecided": "undecided"}
    for says, arms in CLAIMS.items():
        worse, better = (f"{arm} {sparsity}" for arm in arms)
        for kind in ("video", "attention") if "one-stage" in arms else ("video",):
            entries = {entry["measure"]: entry for entry in _entries(table, says, kind, worse, better)}
            for measure in JUDGED:
                if measure in entries:
                    yield entries[measure] | {"verdict": verdicts[entries[measure]["verdict"]]}
    for entry in _entries(table, DRIFT, "long", f"{LONG}published {sparsity}", f"{LONG}dense"):
        allowed = MARGIN * (table.mean("long", f"{LONG}dense", entry["measure"]) or 0.0)
        verdict = "holds" if entry["high"] <= allowed else "contradicted" if entry["low"] > 0 else "undecided"
        yield entry | {"verdict": verdict if entry["seeds"] >= FEWEST else "undecided"}


def _options(table: Table, sparsity: str) -> Iterator[dict[str, Any]]:
    """Each option against the published method: how much worse it is (negative: better)."""
    for name in (*OPTIONS, *EIGHT_BIT, "fp8 linears"):
        for kind in ("video", "attention"):
            yield from _entries(table, name, kind, f"{name} {sparsity}", f"published {sparsity}")


def _against(table: Table, kind: str, other: str, measures: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How much worse every arm is than `other` (negative: better), by each measure."""
    for arm in table.arms(kind):
        found = {name: table.worse(kind, arm, other, name) for name in measures}
        if arm != other and any(found.values()):
            seeds, flops = max(one.seeds for one in found.values() if one), table.mean(kind, arm, "flops")
            yield {
                "arm": arm,
                "seeds": seeds,
                "flops": flops,
                **{name: one and asdict(one) for name, one in found.items()},
            }


def _entries(table: Table, says: str, kind: str, worse: str, better: str) -> Iterator[dict[str, Any]]:
    """The difference of two arms by each measure that both have."""
    sparsity = float(worse.rpartition(" ")[2])
    for measure in MEASURES[kind]:
        difference = table.worse(kind, worse, better, measure)
        if difference is not None:
            arms = {"says": says, "sparsity": sparsity, "worse": worse, "better": better, "measure": measure}
            yield {**arms, "verdict": difference.verdict, **asdict(difference)}


def means(table: Table) -> list[dict[str, Any]]:
    """Per arm: the number of videos, attention's FLOPs against dense, and the mean of every measure."""
    found = []
    for kind, measures in MEASURES.items():
        for arm in table.arms(kind):
            row: dict[str, Any] = {"kind": kind, "arm": arm, "videos": len(table.rows(kind, arm))}
            columns = measures if kind == "attention" else ("flops", *measures)
            found.append(row | {name: table.mean(kind, arm, name) for name in columns})
    return found
