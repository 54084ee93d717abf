"""A schedule knows its chunks and their sparsities, meets its target at any length, and is checked when it is made."""

import itertools
import math
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.rollout.schedule import (
    CURVES,
    Schedule,
    chunk_lengths,
    chunk_sparsities,
    latent_frames_of,
    video_frames_of,
)

SHORT = [0, 0.826990, 0.855068, 0.871806, 0.883228, 0.891660, 0.898213]
LONG = [
    *(0, 0.734473, 0.774023, 0.797599, 0.813689, 0.825565, 0.834796, 0.842236, 0.848399, 0.853613, 0.858099),
    *(0.862011, 0.865463, 0.868538, 0.871301, 0.873800, 0.876075, 0.878158, 0.880074, 0.881844, 0.883487),
]
GIVEN = [0.0, 0.5, 0.6, 0.7, 0.6, 0.5, 0.4]


def budget(sparsities, lengths, window, dense):
    """(mean density over the sparse chunks, weighted by visible frames), by its definition."""
    ends = list(itertools.accumulate(lengths))[dense:]
    visible = [min(end, window or end) for end in ends]
    kept = ((1 - sparsity) * frames for sparsity, frames in zip(sparsities[dense:], visible, strict=True))
    return sum(kept) / sum(visible)


@pytest.mark.parametrize(("video", "latent"), [(1, 1), (5, 2), (9, 3), (81, 21), (249, 63)])
def test_lengths_convert_both_ways(video, latent):
    assert latent_frames_of(video) == latent
    assert video_frames_of(latent) == video


@pytest.mark.parametrize(("length", "ways_out"), [(80, "77 or 81"), (0, "1 or 5"), (-3, "1 or 5"), (3, "1 or 5")])
def test_other_lengths_name_the_nearest(length, ways_out):
    with pytest.raises(ValueError, match=f"length {length} .*{ways_out}"):
        latent_frames_of(length)


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Schedule.of_family(FAMILIES["light_forcing_short"], 21), SHORT),
        (Schedule.of_family(FAMILIES["light_forcing_long"], 63), LONG),
    ],
)
def test_published_settings_give_the_published_lists(schedule, published):
    assert schedule.sparsities() == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("frames", [1, 2, 3, 21, 64])
def test_every_family_takes_every_length(family, frames):
    schedule = Schedule.of_family(family, frames)
    lengths = schedule.chunk_lengths()
    assert sum(lengths) == frames
    assert len(schedule.sparsities()) == len(lengths)


@pytest.mark.parametrize(("initial", "lengths"), [(0, [3, 3, 1]), (1, [1, 3, 3]), (3, [3, 3, 1]), (5, [2, 3, 2])])
def test_given_frames_shorten_the_first_chunk(initial, lengths):
    schedule = Schedule(7, 3, target=0.5, base=0.6)
    assert schedule.chunk_lengths(initial) == lengths
    assert len(schedule.sparsities(initial)) == len(lengths)


@given(
    frames=st.integers(1, 200),
    per_chunk=st.integers(1, 7),
    target=st.floats(0.0, 0.99),
    headroom=st.floats(0.0, 1.0),
    extra_window=st.none() | st.integers(0, 40),
    dense=st.integers(0, 3),
    initial=st.integers(0, 8),
)
def test_budget_holds_exactly_and_sparsity_grows(frames, per_chunk, target, headroom, extra_window, dense, initial):
    lengths = chunk_lengths(frames, per_chunk, initial)
    window = None if extra_window is None else max(lengths) + extra_window
    base = target + headroom * (1.0 - target)
    result = chunk_sparsities(
        frames, per_chunk, target=target, base=base, window=window, dense_chunks=dense, first_chunk=lengths[0]
    )
    assert len(result) == len(lengths)
    assert all(0.0 <= s < 1.0 for s in result)
    assert result[:dense] == [0.0] * min(dense, len(lengths))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(result))
    if len(lengths) > dense:
        assert budget(result, lengths, window, dense) == pytest.approx(1 - target, abs=1e-9)


@pytest.mark.parametrize(("target", "base"), [(0.6, 0.7), (0.85, 0.95), (0.88, 0.98), (0.95, 1.0)])
def test_the_base_follows_the_target(target, base):
    assert chunk_sparsities(21, 3, target=target) == pytest.approx(chunk_sparsities(21, 3, target=target, base=base))
    assert chunk_sparsities(21, 3, target=0.6) == chunk_sparsities(21, 3, target=0.6, base=0.7)


@pytest.mark.parametrize("curve", [*CURVES, GIVEN, [0.0, 0.0, *[0.99] * 5]], ids=str)
@pytest.mark.parametrize(("target", "base"), [(0.6, 0.7), (0.88, 0.98), (0.5, 0.99), (0.95, 0.95)])
def test_every_curve_meets_the_same_budget(curve, target, base):
    """Values of a given list that would leave [0, 1) included."""
    result = chunk_sparsities(21, 3, target=target, base=base, curve=curve, window=12)
    assert budget(result, [3] * 7, 12, 1) == pytest.approx(1 - target, abs=1e-9)
    assert 0.0 <= min(result) <= max(result) < 1.0


def test_a_given_list_keeps_its_shape():
    result = chunk_sparsities(21, 3, target=0.7, curve=GIVEN)
    assert len({round(b - a, 12) for a, b in zip(GIVEN[1:], result[1:], strict=True)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.9, "base": 0.8}, "base 0.8 .*target 0.9.*constant"),
        ({"target": 1.0, "base": 1.0}, r"target 1\.0 is outside \[0, 1\)"),
        ({"target": -0.1, "base": 0.5}, "target -0.1"),
        ({"target": math.nan, "base": 0.5}, "target nan"),
        ({"target": 0.5, "base": 1.5}, "base 1.5"),
        ({"target": 0.5, "base": 0.6, "window": 2}, "window 2 .* at least 3"),
        ({"target": 0.5, "base": 0.6, "curve": "steep"}, "'steep'.*inverse_sqrt"),
        ({"target": 0.5, "curve": [0.5]}, "1 values for 7 chunks"),
        ({"target": 0.5, "curve": [0, 0.5, 0.5, 1.5, 0.5, 0.5, 0.5]}, "1.5 of chunk 3"),
        ({"target": 0.1, "base": 0.9, "curve": "linear"}, r"target 0.1 .*0\.233"),
        ({"target": 0.5, "base": 0.6, "dense_chunks": -1}, "dense_chunks -1"),
        ({"target": 0.5, "base": 0.6, "latent_frames": 0}, "latent_frames 0 is not positive"),
        ({"target": 0.5, "base": 0.6, "frames_per_chunk": 0}, "frames_per_chunk 0"),
    ],
)
def test_impossible_requests_say_what_is_possible(arguments, message):
    for make in (chunk_sparsities, Schedule):
        with pytest.raises(ValueError, match=message):
            make(**{"latent_frames": 21, "frames_per_chunk": 3, **arguments})


@pytest.mark.parametrize("curve", CURVES)
def test_work_grows_no_faster_than_the_chunks(curve):
    """ComfyUI checks a graph on its event loop, which a long video may not hold."""
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        made = Schedule(4001, 1, target=0.6, base=0.7, curve=curve)
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 5 * len(made.chunk_lengths())
