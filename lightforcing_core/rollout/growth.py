"""Chunk-Aware Growth: how sparse each chunk may be, so that a FLOP budget is met exactly.

Early chunks stay dense because later ones inherit their errors; sparsity then grows towards `base`.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

CURVES = ("inverse_sqrt", "linear", "exponential", "constant")
LARGEST = math.nextafter(1.0, 0.0)  # sparsities live in [0, 1)


def chunk_lengths(latent_frames: int, frames_per_chunk: int, first_chunk: int | None = None) -> list[int]:
    """Latent frames of every chunk: `first_chunk` (default `frames_per_chunk`) first, a shorter rest last."""
    for name, value in (("latent_frames", latent_frames), ("frames_per_chunk", frames_per_chunk)):
        if value < 1:
            raise ValueError(f"{name} {value} is not positive; a video has at least 1 latent frame per chunk")
    first = frames_per_chunk if first_chunk is None else first_chunk
    if first < 1:
        raise ValueError(f"first_chunk {first} is not positive; leave it out for chunks of {frames_per_chunk}")
    lengths = [min(first, latent_frames)]
    rest = latent_frames - lengths[0]
    lengths += [frames_per_chunk] * (rest // frames_per_chunk)
    if rest % frames_per_chunk:
        lengths.append(rest % frames_per_chunk)
    return lengths


def first_chunk_length(frames_per_chunk: int, initial_frames: int = 0) -> int:
    """Latent frames of the first chunk of a video that starts with `initial_frames` given ones.

    Given frames make whole chunks; where they do not, the first chunk takes the rest: one image → 1, n, n, …
    """
    return initial_frames % max(frames_per_chunk, 1) or frames_per_chunk


def chunk_sparsities(
    latent_frames: int,
    frames_per_chunk: int,
    *,
    target: float,
    base: float | None = None,
    window: int | None = None,
    dense_chunks: int = 1,
    curve: str | Sequence[float] = "inverse_sqrt",
    first_chunk: int | None = None,
) -> list[float]:
    """One sparsity in [0, 1) per chunk: `s_i = base − g_i · β`, the first `dense_chunks` of them 0.

    latent_frames, frames_per_chunk, window, first_chunk: latent frames (window None: every frame is visible).
    target: the mean sparsity over the sparse chunks, each weighted by the key frames it sees,
    `kv_i = min(frames up to its end, window)`; β is solved from `Σ (1 − s_i) · kv_i = (1 − target) · Σ kv_i`.
    base: the sparsity that growth tends to. curve: the shape g_i, "inverse_sqrt" (the published
    `1/√(frames up to the chunk's end)`), "linear" (from 1 at the first sparse chunk to 0 at the last),
    "exponential" (decay by e for each length of the first sparse chunk's context), "constant" (target everywhere,
    base is not read), or a list with one sparsity per chunk, which is shifted as a whole to meet the target.

    A value that would leave [0, 1) is clamped and the others are solved again, so the target always holds.
    Raises ValueError for requests that cannot be met, naming what can.

    Source: Light Forcing, arXiv 2602.04789, Chunk-Aware Growth.
    """
    lengths = chunk_lengths(latent_frames, frames_per_chunk, first_chunk)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    if not 0.0 <= target < 1.0:
        raise ValueError(f"target {target} is outside [0, 1); 0 is dense, 0.88 skips 88 % of the key blocks")
    if dense_chunks < 0:
        raise ValueError(f"dense_chunks {dense_chunks} is negative; use 0 or more")
    if window is not None and window < max(lengths):
        raise ValueError(f"window {window} is shorter than a chunk of {max(lengths)} latent frames; use at least that")
    if not isinstance(curve, str) and len(curve) != len(lengths):
        raise ValueError(f"the sparsity list has {len(curve)} values for {len(lengths)} chunks; give one per chunk")
    sparse_ends = ends[dense_chunks:]
    if not sparse_ends:
        return [0.0] * len(lengths)
    weights = [float(min(end, window or end)) for end in sparse_ends]
    tops, slopes = _shape(curve, sparse_ends, dense_chunks, target, base)
    sparsities = _solve(tops, slopes, weights, target)
    return [0.0] * min(dense_chunks, len(lengths)) + sparsities


def _shape(
    curve: str | Sequence[float], ends: list[int], dense_chunks: int, target: float, base: float | None
) -> tuple[list[float], list[float]]:
    """The lines `top_i − slope_i · β` along which the sparse chunks' sparsities move."""
    count = len(ends)
    if not isinstance(curve, str):
        values = [float(value) for value in curve][dense_chunks:]
        for value in values:
            if not 0.0 <= value < 1.0:
                raise ValueError(f"the sparsity list holds {value}, which is outside [0, 1)")
        return values, [1.0] * count
    if curve == "constant":
        return [target] * count, [1.0] * count
    if base is None:
        raise ValueError(f"curve {curve!r} grows towards base, which is missing; give base between {target} and 1")
    if not target <= base <= 1.0:
        raise ValueError(
            f"base {base} is not between target {target} and 1: growth starts below the target and ends at base; "
            f"raise base to at least {target}, lower target, or use the constant curve"
        )
    if curve == "inverse_sqrt":
        return [base] * count, [1.0 / math.sqrt(end) for end in ends]
    if curve == "linear":
        return [base] * count, [1.0 - i / (count - 1) for i in range(count)] if count > 1 else [1.0]
    if curve == "exponential":
        # Below 1e-250 growth is complete; the floor keeps β finite.
        return [base] * count, [max(math.exp(1.0 - end / ends[0]), 1e-250) for end in ends]
    raise ValueError(f"curve {curve!r} is not known; use one of {', '.join(CURVES)} or a list of sparsities")


def _solve(tops: list[float], slopes: list[float], weights: list[float], target: float) -> list[float]:
    """Sparsities on the lines `top − slope · β`, clamped to [0, 1), whose weighted mean is `target`."""
    budget = target * sum(weights)

    def at(beta: float) -> list[float]:
        return [min(max(top - slope * beta, 0.0), LARGEST) for top, slope in zip(tops, slopes, strict=True)]

    def spent(values: list[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))

    # Between the β at which some value reaches an end of [0, 1), every value and the spent budget are linear in β.
    bends = sorted(
        (top - end) / slope for top, slope in zip(tops, slopes, strict=True) if slope > 0.0 for end in (0.0, LARGEST)
    )
    after = bisect_left(bends, -budget, key=lambda beta: -spent(at(beta)))
    low, high = at(bends[max(after - 1, 0)]), at(bends[min(after, len(bends) - 1)])
    width = spent(low) - spent(high)
    share = (spent(low) - budget) / width if width > 0.0 else 0.0
    values = [min(max(a + share * (b - a), 0.0), LARGEST) for a, b in zip(low, high, strict=True)]
    if not abs(spent(values) - budget) <= 1e-9 * sum(weights):
        raise ValueError(
            f"target {target} cannot be met with this curve and base; the nearest mean sparsity is "
            f"{spent(values) / sum(weights):.6f}: use that, or move base"
        )
    return values
