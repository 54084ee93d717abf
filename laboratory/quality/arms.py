"""The arms: ways to make a video that skip, choose and round differently, some of them at the same cost."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout.schedule import Schedule

STEP_TO_BASE, HIGHEST_BASE = 0.1, 0.98  # growth tends to the target plus 0.1, as published, and never past 98 %
LONG = "long "  # prefix of the names of long rollouts

# The changes of each option or policy to the published method at the same sparsities.
OPTIONS: dict[str, dict[str, object]] = {
    "tail": {"tail": True},
    "tiles": {"tiles": True},
    "lse": {"estimator": "lse"},
    "tail+lse": {"tail": True, "estimator": "lse"},
    "tail+tiles": {"tail": True, "tiles": True},
    "mass": {"policy": "mass"},
    "mass+tail": {"policy": "mass", "tail": True},
    "mass+lse": {"policy": "mass", "estimator": "lse"},
    "mass+tail+lse": {"policy": "mass", "tail": True, "estimator": "lse"},
    "topk+tail+lse": {"policy": "topk", "tail": True, "estimator": "lse"},
    "window": {"policy": "window"},
    "window+tail": {"policy": "window", "tail": True},
}
# Policies with a density of their own; each is compared with the published method at the densities that it has.
OWN_DENSITY: dict[str, dict[str, object]] = {
    "radial": {"policy": "radial"},
    "sta": {"policy": "sta"},
    "sta+tiles": {"policy": "sta", "tiles": True},
    "svg1": {"policy": "svg1"},
    "vmoba": {"policy": "vmoba"},
    "forcing_kv": {"policy": "forcing_kv"},
    "dummy_forcing": {"policy": "dummy_forcing"},
}
LONG_ARMS = ("published", "tail+lse", "topk+tail+lse", "mass+tail+lse")  # come as long rollouts too
LONG_OWN = ("forcing_kv", "dummy_forcing", "pbsa")  # densities of their own, as long rollouts
EIGHT_BIT = {"kv int8": KVOptions("int8"), "kv fp8": KVOptions("fp8")}


@dataclass(frozen=True)
class Arm:
    """One way to make a video. growth: a sparsity per chunk, None for dense; fp8: linear layers in FP8.

    like: the arm whose densities, chunk by chunk, replace `growth`.
    """

    name: str
    growth: tuple[float, ...] | None
    attention: AttentionOptions
    kv: KVOptions = field(default_factory=KVOptions)
    fp8: bool = False
    like: str = ""

    @property
    def is_long(self) -> bool:
        return self.name.startswith(LONG)


def all_arms(
    short: Schedule, long: Schedule | None, sparsities: Sequence[float], attention: AttentionOptions
) -> dict[str, Arm]:
    """Every arm by name, dense first. short, long: dense schedules of the videos (long None: no long arms).

    attention: the published method with this bench's blocks. Raises ValueError for sparsities outside (0, 1).
    """
    arms = [Arm("dense", None, attention)]
    arms += [Arm(f"dense {name}", None, attention, kv) for name, kv in EIGHT_BIT.items()]
    arms += [Arm("dense fp8 linears", None, attention, fp8=True)]
    if long is not None:
        arms.append(Arm(f"{LONG}dense", None, attention))
        arms.append(Arm(f"{LONG}rolling_sink", None, replace(attention, policy="rolling_sink")))
        for name in LONG_OWN:
            arms.append(Arm(f"{LONG}{name}", growth_of(long, 0.5), replace(attention, policy=name)))
    for name, changes in OWN_DENSITY.items():
        growth = growth_of(short, 0.5)  # which chunks are sparse
        arms.append(Arm(name, growth, replace(attention, **changes)))  # type: ignore[arg-type]
        arms.append(Arm(f"published as {name}", growth, attention, like=name))
    for sparsity in sparsities:
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"sparsity {sparsity} is outside (0, 1); 0.88 skips 88 % of the key blocks")
        growth = growth_of(short, sparsity)
        published = Arm(f"published {sparsity:g}", growth, attention)
        arms.append(published)
        arms.append(Arm(f"uniform {sparsity:g}", growth_of(short, sparsity, "constant"), attention))
        arms.append(Arm(f"one-stage {sparsity:g}", growth, replace(attention, policy="topk")))
        for name, changes in OPTIONS.items():
            options = replace(attention, **changes)  # type: ignore[arg-type]
            arms.append(replace(published, name=f"{name} {sparsity:g}", attention=options))
        for name, kv in EIGHT_BIT.items():
            arms.append(replace(published, name=f"{name} {sparsity:g}", kv=kv))
        arms.append(replace(published, name=f"fp8 linears {sparsity:g}", fp8=True))
        for name, half in zip(("early", "late"), halves(short.chunk_lengths(), sparsity), strict=True):
            arms.append(Arm(f"{name} {sparsity:g}", half, attention))
        if long is not None:
            for name in LONG_ARMS:
                options = replace(attention, **OPTIONS.get(name, {}))  # type: ignore[arg-type]
                arms.append(Arm(f"{LONG}{name} {sparsity:g}", growth_of(long, sparsity), options))
    return {arm.name: arm for arm in arms}


def chosen(arms: dict[str, Arm], patterns: Sequence[str]) -> dict[str, Arm]:
    """The arms whose names match any pattern (*, ?), with or without their sparsity; all without patterns.

    Raises ValueError for a pattern that matches none.
    """
    if not patterns:
        return arms
    found: set[str] = set()
    for pattern in patterns:
        names = {name for name in arms if any(fnmatch.fnmatch(part, pattern) for part in (name, kind_of(name)))}
        if not names:
            raise ValueError(f"no arm is called {pattern!r}; there are {', '.join(arms)}")
        found |= names | {arms[name].like for name in names}
    return {name: arm for name, arm in arms.items() if name in found}


def kind_of(name: str) -> str:
    """An arm's name without its sparsity."""
    kind, _, last = name.rpartition(" ")
    return kind if last.replace(".", "", 1).isdigit() else name


def growth_of(schedule: Schedule, target: float, curve: str = "inverse_sqrt") -> tuple[float, ...]:
    """Chunk-Aware Growth to this target, or the "constant" curve; both skip the same FLOPs, the first chunk none."""
    base = max(target, min(target + STEP_TO_BASE, HIGHEST_BASE))
    return tuple(replace(schedule, target=target, base=base, curve=curve).sparsities() or ())


def halves(lengths: Sequence[int], sparsity: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Growths that skip as many FLOPs in the early chunks alone as in the late ones alone.

    The first chunk is always dense. The others are cut so that both sides cost most nearly the same; the cheaper side
    has `sparsity`, the other one a little less. Raises ValueError for videos of fewer than three chunks.
    """
    if len(lengths) < 3:
        raise ValueError(f"{len(lengths)} chunks have no early and late ones to compare; use 3 or more")
    costs = [frames * end for frames, end in zip(lengths, accumulate(lengths), strict=True)]
    cut = min(range(2, len(costs)), key=lambda place: abs(sum(costs[1:place]) - sum(costs[place:])))
    sides = sum(costs[1:cut]), sum(costs[cut:])
    early, late = (sparsity * min(sides) / side for side in sides)
    rest = len(costs) - cut
    return (0.0, *[early] * (cut - 1), *[0.0] * rest), (0.0, *[0.0] * (cut - 1), *[late] * rest)
