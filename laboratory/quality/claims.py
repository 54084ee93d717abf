"""What the rows of the laboratory say: means per arm, differences of paired seeds, and the paper's claims.

A difference is taken seed by seed, which is the same prompt and the same noise on both sides; its 95 % interval comes
from resampling the seeds. Effect sizes are the mean difference over the standard deviation of the differences.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .arms import LONG, OPTIONS

Row = Mapping[str, Any]
RESAMPLES = 10_000
FEWEST = 8  # seeds, below which an interval says nothing
MARGIN = 0.1  # sparse rollouts may drift this share of dense's drift further and still count as "not more"

# Measures of a video, and whether more of it is better.
VIDEO = {
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
}
LONG_VIDEO = {"drift": False, "colour_late": True, "shape_late": True}
ATTENTION = {"attention_error": False}


@dataclass(frozen=True)
class Difference:
    """How much worse one arm is than another: mean over paired seeds, its 95 % interval, and the effect size.

    worse_in: the share of seeds in which it is worse; effect is None where all differences are equal.
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


@dataclass(frozen=True)
class Claim:
    """ "`worse` is worse than `better`", by one measure at one sparsity. margin: what does not count as worse yet."""

    says: str
    worse: str
    better: str
    kind: str
    measures: tuple[str, ...]


OF_VIDEOS = ("latent_error", "psnr", "ms_ssim", "position_error", "right")
CLAIMS = (
    Claim(
        "sparsifying early chunks hurts more than late ones",
        "early {}",
        "late {}",
        "video",
        OF_VIDEOS,
    ),
    Claim(
        "growth (CAG) beats uniform sparsity at equal FLOPs",
        "uniform {}",
        "published {}",
        "video",
        OF_VIDEOS,
    ),
    Claim(
        "hierarchical selection (HSA) beats one-stage top-k at equal density",
        "one-stage {}",
        "published {}",
        "video",
        OF_VIDEOS,
    ),
    Claim(
        "hierarchical selection (HSA) beats one-stage top-k at equal density",
        "one-stage {}",
        "published {}",
        "attention",
        ("attention_error",),
    ),
)
DRIFT = "long sparse rollouts do not drift more than dense ones"


class Table:
    """The rows by (kind, arm), each a mapping of seed to values."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        for row in rows:
            if row["kind"] == "attention":
                # Chunks that are dense in every arm would only thin the error out.
                errors = [error for chunk in row["errors"][1:] for error in chunk]
                row = {**row, "attention_error": statistics.fmean(errors)} if errors else row
            self._rows.setdefault((row["kind"], row["arm"]), {})[row["seed"]] = row

    def arms(self, kind: str) -> list[str]:
        """The arms that have rows of this kind, in the order in which they were made."""
        return [arm for found, arm in self._rows if found == kind]

    def rows(self, kind: str, arm: str) -> list[Row]:
        return list(self._rows.get((kind, arm), {}).values())

    def values(self, kind: str, arm: str, measure: str) -> dict[int, float]:
        """The measure by seed, where there is a number."""
        found = self._rows.get((kind, arm), {})
        return {seed: row[measure] for seed, row in found.items() if row.get(measure) is not None}

    def worse(self, kind: str, arm: str, other: str, measure: str) -> Difference | None:
        """How much worse `arm` is than `other`; None without seeds that both have."""
        first, second = self.values(kind, arm, measure), self.values(kind, other, measure)
        sign = -1.0 if {**VIDEO, **LONG_VIDEO, **ATTENTION}[measure] else 1.0
        shared = sorted(first.keys() & second.keys())
        return paired([sign * (first[seed] - second[seed]) for seed in shared]) if shared else None


def paired(differences: Sequence[float]) -> Difference:
    """Mean and percentile bootstrap interval of paired differences; the same for the same numbers."""
    values = np.asarray(differences, float)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    mean = float(values.mean())
    effect = mean / spread if spread > 0 else None
    return Difference(len(values), mean, float(low), float(high), effect, float((values > 0).mean()))


def sparsities_of(table: Table) -> list[str]:
    """The sparsities that the rows hold, as they stand in arms' names, rising."""
    names = {arm.rpartition(" ")[2] for kind in ("video", "long") for arm in table.arms(kind)}
    return sorted((name for name in names if name.replace(".", "", 1).isdigit()), key=float)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means, claims, and what each option changes, in JSON types; made from all rows of a folder."""
    table = Table(rows)
    return {
        "bootstrap": f"95 % percentile intervals from {RESAMPLES} resamples of the seeds",
        "claims": claims(table),
        "options": options(table),
        "means": means(table),
    }


def claims(table: Table) -> list[dict[str, Any]]:
    """The paper's claims, each at every sparsity and by every measure that has numbers."""
    found = []
    for sparsity in sparsities_of(table):
        for claim in CLAIMS:
            worse, better = claim.worse.format(sparsity), claim.better.format(sparsity)
            for measure in claim.measures:
                difference = table.worse(claim.kind, worse, better, measure)
                if difference is not None:
                    holds = {"yes": "holds", "no, better": "contradicted", "undecided": "undecided"}
                    verdict = holds[difference.verdict]
                    found.append(_entry(claim.says, sparsity, worse, better, measure, difference, verdict))
        sparse, dense = f"{LONG}published {sparsity}", f"{LONG}dense"
        for measure in LONG_VIDEO:
            difference = table.worse("long", sparse, dense, measure)
            if difference is not None:
                allowed = MARGIN * statistics.fmean(table.values("long", dense, measure).values())
                verdict = "contradicted" if difference.low > 0 else "undecided"
                if difference.high <= allowed:
                    verdict = "holds"
                if difference.seeds < FEWEST:
                    verdict = "undecided"
                found.append(_entry(DRIFT, sparsity, sparse, dense, measure, difference, verdict))
    return found


def options(table: Table) -> list[dict[str, Any]]:
    """Each option against the published method at the same sparsity: how much worse it is (negative: better)."""
    found = []
    for sparsity in sparsities_of(table):
        for name in (*OPTIONS, "kv int8", "kv fp8", "fp8 linears"):
            for kind, measures in (("video", VIDEO), ("attention", ATTENTION)):
                for measure in measures:
                    arm, base = f"{name} {sparsity}", f"published {sparsity}"
                    difference = table.worse(kind, arm, base, measure)
                    if difference is not None:
                        found.append(_entry(name, sparsity, arm, base, measure, difference, difference.verdict))
    return found


def means(table: Table) -> list[dict[str, Any]]:
    """Per arm: how many videos, attention's FLOPs against dense, and the mean of every measure."""
    found = []
    for kind, measures in (("video", VIDEO), ("long", LONG_VIDEO), ("attention", ATTENTION)):
        for arm in table.arms(kind):
            rows = table.rows(kind, arm)
            row: dict[str, Any] = {"kind": kind, "arm": arm, "videos": len(rows)}
            if kind != "attention":
                row["flops"] = statistics.fmean(each["flops"] for each in rows)
            for measure in measures:
                values = list(table.values(kind, arm, measure).values())
                row[measure] = statistics.fmean(values) if values else None
            found.append(row)
    return found


def _entry(
    says: str, sparsity: str, worse: str, better: str, measure: str, difference: Difference, verdict: str
) -> dict[str, Any]:
    return {
        "says": says,
        "sparsity": float(sparsity),
        "worse": worse,
        "better": better,
        "measure": measure,
        "verdict": verdict,
        **asdict(difference),
    }
