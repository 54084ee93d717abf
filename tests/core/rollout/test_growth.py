import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.rollout.schedule import CURVES, chunk_lengths, chunk_sparsities

SHORT = [0, 0.826990, 0.855068, 0.871806, 0.883228, 0.891660, 0.898213]
LONG = [
    *(0, 0.734473, 0.774023, 0.797599, 0.813689, 0.825565, 0.834796, 0.842236, 0.848399, 0.853613, 0.858099),
    *(0.862011, 0.865463, 0.868538, 0.871301, 0.873800, 0.876075, 0.878158, 0.880074, 0.881844, 0.883487),
]
FRAMEWISE = [
    *(0, 0.730746, 0.776485, 0.803751, 0.822358, 0.836093, 0.846768, 0.855373, 0.862501, 0.868530, 0.873718),
    *(0.878243, 0.882235, 0.885791, 0.888985, 0.891875, 0.894507, 0.896915, 0.899131, 0.901179, 0.903079),
]


def budget(sparsities, lengths, window, dense):
    """(mean density over the sparse chunks, weighted by visible frames), by its definition."""
    end, kept, total = 0, 0.0, 0.0
    for i, (sparsity, length) in enumerate(zip(sparsities, lengths, strict=True)):
        end += length
        if i >= dense:
            visible = min(end, window or end)
            kept += (1 - sparsity) * visible
            total += visible
    return kept / total


@pytest.mark.parametrize("window", [21, None])
def test_short_setting_equals_the_published_list(window):
    assert chunk_sparsities(21, 3, target=0.88, base=0.98, window=window) == pytest.approx(SHORT, abs=1e-6)


def test_long_setting_equals_the_published_list():
    assert chunk_sparsities(63, 3, target=0.85, base=0.95, window=12) == pytest.approx(LONG, abs=1e-6)


def test_framewise_setting_equals_the_published_list():
    assert chunk_sparsities(21, 1, target=0.88, base=0.98, window=21) == pytest.approx(FRAMEWISE, abs=1e-6)


@given(
    frames=st.integers(1, 200),
    per_chunk=st.integers(1, 7),
    target=st.floats(0.0, 0.99),
    headroom=st.floats(0.0, 1.0),
    extra_window=st.none() | st.integers(0, 40),
    dense=st.integers(0, 3),
    first=st.none() | st.integers(1, 7),
)
def test_budget_holds_exactly_and_sparsity_grows(frames, per_chunk, target, headroom, extra_window, dense, first):
    lengths = chunk_lengths(frames, per_chunk, first)
    window = None if extra_window is None else max(lengths) + extra_window
    base = target + headroom * (1.0 - target)
    result = chunk_sparsities(
        frames, per_chunk, target=target, base=base, window=window, dense_chunks=dense, first_chunk=first
    )
    assert len(result) == len(lengths)
    assert all(0.0 <= s < 1.0 for s in result)
    assert result[:dense] == [0.0] * min(dense, len(lengths))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(result))
    if len(lengths) > dense:
        assert budget(result, lengths, window, dense) == pytest.approx(1 - target, abs=1e-9)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("target", "base"), [(0.6, 0.7), (0.88, 0.98), (0.5, 0.99)])
def test_every_curve_meets_the_same_budget(curve, target, base):
    result = chunk_sparsities(45, 3, target=target, base=base, curve=curve, window=12)
    assert budget(result, [3] * 15, 12, 1) == pytest.approx(1 - target, abs=1e-9)


def test_a_given_list_keeps_its_shape_and_meets_the_budget():
    given_list = [0.0, 0.5, 0.6, 0.7, 0.6, 0.5, 0.4]
    result = chunk_sparsities(21, 3, target=0.7, curve=given_list)
    assert budget(result, [3] * 7, None, 1) == pytest.approx(0.3, abs=1e-12)
    shifts = {round(b - a, 12) for a, b in zip(given_list[1:], result[1:], strict=True)}
    assert len(shifts) == 1


def test_a_given_list_is_clamped_at_both_ends_and_still_meets_the_budget():
    result = chunk_sparsities(21, 3, target=0.95, curve=[0, 0.0, 0.99, 0.99, 0.99, 0.99, 0.99])
    assert budget(result, [3] * 7, None, 1) == pytest.approx(0.05, abs=1e-9)
    assert max(result) < 1.0


def test_a_value_that_would_be_negative_is_clamped_and_the_rest_solved_again():
    result = chunk_sparsities(21, 3, target=0.1, base=0.9)
    assert result[1] == 0.0
    assert result[-1] > 0.1
    assert budget(result, [3] * 7, None, 1) == pytest.approx(0.9, abs=1e-12)


def test_equal_target_and_base_is_constant():
    assert chunk_sparsities(12, 3, target=0.7, base=0.7) == pytest.approx([0.0, 0.7, 0.7, 0.7])


def test_zero_target_is_dense():
    assert chunk_sparsities(12, 3, target=0.0, base=0.9) == pytest.approx([0.0] * 4, abs=1e-12)


def test_chunks_cover_the_video_with_a_shorter_rest():
    assert chunk_lengths(20, 3) == [3, 3, 3, 3, 3, 3, 2]
    assert chunk_lengths(7, 3, first_chunk=1) == [1, 3, 3]
    assert chunk_lengths(2, 3) == [2]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"target": 0.9, "base": 0.8}, ["base 0.8", "target 0.9", "constant"]),
        ({"target": 1.0, "base": 1.0}, ["target 1.0", "[0, 1)"]),
        ({"target": -0.1, "base": 0.5}, ["target -0.1"]),
        ({"target": math.nan, "base": 0.5}, ["target nan"]),
        ({"target": 0.5, "base": 1.5}, ["base 1.5"]),
        ({"target": 0.5}, ["base", "missing"]),
        ({"target": 0.5, "base": 0.6, "window": 2}, ["window 2", "3"]),
        ({"target": 0.5, "base": 0.6, "curve": "steep"}, ["steep", "inverse_sqrt"]),
        ({"target": 0.5, "curve": [0.5]}, ["1 values", "7 chunks"]),
        ({"target": 0.5, "curve": [0, 0.5, 0.5, 1.5, 0.5, 0.5, 0.5]}, ["1.5"]),
        ({"target": 0.1, "base": 0.9, "curve": "linear"}, ["target 0.1", "0.233"]),
        ({"target": 0.5, "base": 0.6, "dense_chunks": -1}, ["dense_chunks -1"]),
    ],
)
def test_impossible_requests_say_what_is_possible(arguments, names):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is what is tested
        chunk_sparsities(21, 3, **arguments)
    assert all(name in str(error.value) for name in names), str(error.value)


@pytest.mark.parametrize(("frames", "per_chunk"), [(0, 3), (21, 0), (-3, 3)])
def test_empty_videos_and_chunks_are_refused(frames, per_chunk):
    with pytest.raises(ValueError, match="not positive"):
        chunk_lengths(frames, per_chunk)
