"""How a video falls into chunks, what each chunk may see, and how sparse each may be (Chunk-Aware Growth)."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import numpy as np

from ..families import Family, SinkRope
from ..refusal import Refusal, check_choice

Curve = Literal["inverse_sqrt", "linear", "exponential", "constant"]
CURVES = get_args(Curve)
HEADROOM = 0.1  # of the base over the target
LARGEST = math.nextafter(1.0, 0.0)  # sparsities live in [0, 1)


def latent_frames_of(video_frames: int) -> int:
    """Latent frames of a video of 1 + 4·k frames; Refusal for another length."""
    if video_frames < 1 or (video_frames - 1) % 4:
        below = max(1, 1 + (video_frames - 1) // 4 * 4)
        raise Refusal("length", f"{video_frames} is not 1 + 4·k video frames", f"use {below} or {below + 4}")
    return (video_frames - 1) // 4 + 1


def video_frames_of(latent_frames: int) -> int:
    """Video frames that `latent_frames` latent frames decode to: 1 for the first, 4 for each later one."""
    return 4 * latent_frames - 3


def latent_frame_at(video_frame: int) -> int:
    """The latent frame that video frame `video_frame`, counted from 0, is decoded from."""
    return (video_frame + 3) // 4


def chunk_lengths(latent_frames: int, frames_per_chunk: int, initial_frames: int = 0) -> list[int]:
    """Latent frames of every chunk, a shorter rest last; `initial_frames` given ones start the video.

    Given frames make whole chunks; if they do not, the first chunk takes the rest: one image → 1, n, n, …
    """
    for name, value in (("latent_frames", latent_frames), ("frames_per_chunk", frames_per_chunk)):
        if value < 1:
            raise Refusal(name, f"{value} is not positive", "use at least 1 latent frame")
    first = initial_frames % frames_per_chunk or frames_per_chunk
    return [end - start for start, end in pairwise([0, *range(first, latent_frames, frames_per_chunk), latent_frames])]


def opening_chunk(frames_per_chunk: int, initial_frames: int) -> int:
    """The index of the chunk that opens a video: the one after a given image, else the first.

    An image is one given frame, or given frames that do not fill chunks; whole given chunks continue a video.
    """
    return int(initial_frames == 1 or initial_frames % frames_per_chunk > 0)


def check_window(window: int | None, sink_frames: int, sink_rope: str, longest_chunk: int) -> None:
    """Refusal unless a window of latent frames holds the sinks and the longest chunk; None holds everything."""
    check_choice("sink_rope", sink_rope, SinkRope)
    if sink_frames < 0:
        raise Refusal("sink_frames", f"{sink_frames} is negative", "use 0 or more latent frames")
    least = sink_frames + longest_chunk
    if window is not None and window < least:
        problem = f"{window} cannot hold {sink_frames} sink frames and a chunk of {longest_chunk}"
        raise Refusal("window", problem, f"use at least {least} latent frames")


def check_sparsity(field: str, sparsity: float, chunk: int | None = None) -> None:
    """Refusal unless `sparsity`, of chunk number `chunk` if given, is in [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        of = "" if chunk is None else f" of chunk {chunk}"
        raise Refusal(field, f"{sparsity}{of} is outside [0, 1)", "0 is dense, 0.88 skips 88 % of the key blocks")


@dataclass(frozen=True)
class Schedule:
    """The chunks, window and sparsity of a video, before its size and prompt are known.

    latent_frames: of the whole video.
    frames_per_chunk, window, sink_frames, sink_rope: as in `Recipe`.
    target, base, curve: as in `chunk_sparsities`; target None is dense throughout.
    dense_chunks: chunks that skip nothing, from the one on that opens the video.
    title: its origin, for display.
    overrides: (chunk index, sparsity) pairs that replace the curve's values; the target holds for the curve alone.
    reference: latent frames of the video over which the target holds. Every video takes that one's sparsities by
        `start // frames_per_chunk`, as published, and its last one for all later chunks, so that a longer video starts
        the same; its own mean then differs from the target. None: the target holds over this video.

    Raises Refusal when created with values that cannot be met.
    """

    latent_frames: int
    frames_per_chunk: int = 3
    window: int | None = None
    sink_frames: int = 0
    sink_rope: SinkRope = "fixed"
    target: float | None = None
    base: float | None = None
    curve: str = "inverse_sqrt"
    dense_chunks: int = 1
    title: str = "custom"
    overrides: tuple[tuple[int, float], ...] = ()
    reference: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.sink_frames, self.sink_rope, max(self.chunk_lengths()))
        self.sparsities()

    @classmethod
    def of_family(cls, family: Family, latent_frames: int) -> "Schedule":
        """The defaults of a checkpoint family."""
        shared = ("frames_per_chunk", "window", "sink_frames", "sink_rope", "target", "base", "title")
        values = {name: getattr(family, name) for name in shared}
        return cls(latent_frames, reference=family.sparse.reference, **values)

    def dense(self) -> "Schedule":
        """The same chunks and window, dense throughout."""
        return replace(self, target=None, base=None, overrides=(), title=f"{self.title}, dense")

    def chunk_lengths(self, initial_frames: int = 0) -> list[int]:
        """Latent frames of every chunk of a video that starts with `initial_frames` given ones."""
        return chunk_lengths(self.latent_frames, self.frames_per_chunk, initial_frames)

    def sparsities(self, initial_frames: int = 0) -> list[float] | None:
        """One sparsity in [0, 1) per chunk, or None for dense."""
        if self.target is None and not self.overrides:
            return None
        lengths, per_chunk = self.chunk_lengths(initial_frames), self.frames_per_chunk
        values = [0.0] * len(lengths)
        dense = self.dense_chunks + opening_chunk(per_chunk, initial_frames)
        if self.target is not None:
            curve: dict[str, Any] = {name: getattr(self, name) for name in ("target", "base", "window", "curve")}
            if self.reference is None:
                curve |= {"dense_chunks": dense, "first_chunk": lengths[0]}
                values = chunk_sparsities(self.latent_frames, per_chunk, **curve)
            else:
                known = chunk_sparsities(self.reference, per_chunk, dense_chunks=self.dense_chunks, **curve)
                starts = accumulate(lengths[:-1], initial=0)
                values = [known[min(start // per_chunk, len(known) - 1)] for start in starts]
                values[:dense] = [0.0] * len(values[:dense])
        for chunk, sparsity in self.overrides:
            if not 0 <= chunk < len(values):
                raise Refusal("sparsity", f"names chunk {chunk}", f"this video has chunks 0 to {len(values) - 1}")
            check_sparsity("sparsity", sparsity, chunk)
            values[chunk] = sparsity
        return values

    def arguments(self, initial_frames: int = 0) -> dict[str, Any]:
        """The fields of a `Recipe` for a video that starts with `initial_frames`, by name."""
        same = ("frames_per_chunk", "window", "sink_frames", "sink_rope")
        # A short video holds the growth of the whole reference, since it may be lengthened later.
        planned = replace(self, latent_frames=max(self.latent_frames, self.reference or 0))
        return {"growth": planned.sparsities(initial_frames), **{name: getattr(self, name) for name in same}}


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
    """One sparsity in [0, 1) per chunk: `s_i = base − g_i · β`.

    target: the mean sparsity over the sparse chunks, each weighted by the key frames it sees,
        `kv_i = min(frames up to its end, window)`; β is solved from `Σ (1 − s_i) · kv_i = (1 − target) · Σ kv_i`.
    base: the sparsity that growth tends to; None is the target + 0.1, as published.
    dense_chunks: chunks at the start that skip nothing: s_i is 0.
    curve: the shape g_i, one of
        "inverse_sqrt": the published `1/√(frames up to the chunk's end)`;
        "linear": from 1 at the first sparse chunk to 0 at the last;
        "exponential": decay by e for each length of the first sparse chunk's context;
        "constant": `target` everywhere, `base` is not read;
        or a list with one sparsity per chunk, which is shifted as a whole to meet the target.
    first_chunk: latent frames of the first chunk if it is shorter than the others.

    A value that would leave [0, 1) is clamped and the others are solved again, so the target always holds.
    Raises Refusal, naming values that work, for requests that cannot be met.

    Source: Light Forcing, arXiv 2602.04789, Chunk-Aware Growth.
    """
    lengths = chunk_lengths(latent_frames, frames_per_chunk, first_chunk or 0)
    ends = list(accumulate(lengths))
    check_sparsity("target", target)
    check_window(window, 0, "fixed", max(lengths))
    if dense_chunks < 0:
        raise Refusal("dense_chunks", f"{dense_chunks} is negative", "use 0 or more")
    if not isinstance(curve, str) and len(curve) != len(lengths):
        raise Refusal("curve", f"lists {len(curve)} values for {len(lengths)} chunks", "give one sparsity per chunk")
    sparse_ends = ends[dense_chunks:]
    if not sparse_ends:
        return [0.0] * len(lengths)
    weights = [float(min(end, window or end)) for end in sparse_ends]
    if isinstance(curve, str):
        tops, slopes = _growth(curve, sparse_ends, target, base)
    else:
        tops, slopes = [float(value) for value in curve][dense_chunks:], [1.0] * len(sparse_ends)
        for chunk, value in enumerate(tops, dense_chunks):
            check_sparsity("curve", value, chunk)
    return [0.0] * dense_chunks + _solve(tops, slopes, weights, target)


def _growth(curve: str, ends: list[int], target: float, base: float | None) -> tuple[list[float], list[float]]:
    """The lines `top_i − slope_i · β` along which the sparse chunks' sparsities move."""
    check_choice("curve", curve, Curve)
    count = len(ends)
    if curve == "constant":
        return [target] * count, [1.0] * count
    remedy = f"use a base of at least {target}, a lower target, or the constant curve"
    base = min(target + HEADROOM, 1.0) if base is None else base
    if not target <= base <= 1.0:
        problem = f"{base} is not between target {target} and 1: growth starts below the target and ends at base"
        raise Refusal("base", problem, remedy)
    if curve == "linear":
        return [base] * count, [1.0 - i / max(count - 1, 1) for i in range(count)]
    if curve == "exponential":
        # Below 1e-250 growth is complete; the bound keeps β finite.
        return [base] * count, [max(math.exp(1.0 - end / ends[0]), 1e-250) for end in ends]
    return [base] * count, [1.0 / math.sqrt(end) for end in ends]


def _solve(tops: list[float], slopes: list[float], weights: list[float], target: float) -> list[float]:
    """Sparsities on the lines `top − slope · β`, clamped to [0, 1), whose weighted mean is `target`."""
    top, slope, weight = map(np.array, (tops, slopes, weights))
    total = sum(weights)
    budget = target * total

    def at(beta: float) -> np.ndarray:
        return np.clip(top - slope * beta, 0.0, LARGEST)

    def spent(values: np.ndarray) -> float:
        return math.fsum((weight * values).tolist())

    # Between the β at which some value reaches an end of [0, 1), every value and the spent budget are linear in β.
    moving = slope > 0.0
    bends = np.sort(np.concatenate([(top[moving] - end) / slope[moving] for end in (0.0, LARGEST)])).tolist()
    after = bisect_left(bends, -budget, key=lambda beta: -spent(at(beta)))
    low, high = at(bends[max(after - 1, 0)]), at(bends[min(after, len(bends) - 1)])
    width = spent(low) - spent(high)
    share = (spent(low) - budget) / width if width > 0.0 else 0.0
    values = np.clip(low + share * (high - low), 0.0, LARGEST)
    if not abs(spent(values) - budget) <= 1e-9 * total:
        nearest = f"use {spent(values) / total:.6f}, the nearest mean sparsity, or move base"
        raise Refusal("target", f"{target} cannot be met with this curve and base", nearest)
    return list(values.tolist())
