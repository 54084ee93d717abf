"""A schedule is a recipe that is checked when it is made and knows its chunks, its sparsities and its memory."""

import sys
from collections import Counter

import pytest

from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.rollout.schedule import CURVES, Schedule, latent_frames_of, video_frames_of


@pytest.mark.parametrize(("video", "latent"), [(1, 1), (5, 2), (9, 3), (81, 21), (249, 63)])
def test_lengths_convert_both_ways(video, latent):
    assert latent_frames_of(video) == latent
    assert video_frames_of(latent) == video


@pytest.mark.parametrize(("length", "ways_out"), [(80, "77 or 81"), (0, "1 or 5"), (-3, "1 or 5"), (3, "1 or 5")])
def test_other_lengths_name_the_nearest(length, ways_out):
    with pytest.raises(ValueError, match=f"length {length} .*{ways_out}"):
        latent_frames_of(length)


def test_published_families_give_their_published_values():
    short = Schedule.of_family(FAMILIES["light_forcing_short"], 21).sparsities()
    assert short == pytest.approx([0, 0.826990, 0.855068, 0.871806, 0.883228, 0.891660, 0.898213], abs=1e-6)
    long = Schedule.of_family(FAMILIES["light_forcing_long"], 63)
    assert long.sparsities()[:4] == pytest.approx([0, 0.734473, 0.774023, 0.797599], abs=1e-6)
    assert long.sparsities()[-1] == pytest.approx(0.883487, abs=1e-6)
    assert (long.window, long.sink_frames, long.sink_rope) == (12, 1, "follow")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("frames", [1, 2, 3, 21, 64])
def test_every_family_takes_every_length(family, frames):
    schedule = Schedule.of_family(family, frames)
    lengths = schedule.chunk_lengths()
    assert sum(lengths) == frames
    assert len(schedule.sparsities()) == len(lengths)


def test_dense_keeps_chunks_and_window_and_skips_nothing():
    sparse = Schedule.of_family(FAMILIES["light_forcing_long"], 63)
    dense = sparse.dense()
    assert dense.sparsities() is None
    assert dense.chunk_lengths() == sparse.chunk_lengths()
    assert dense.window == 12


@pytest.mark.parametrize(("initial", "lengths"), [(0, [3, 3, 1]), (1, [1, 3, 3]), (3, [3, 3, 1]), (5, [2, 3, 2])])
def test_given_frames_shorten_the_first_chunk(initial, lengths):
    schedule = Schedule(7, 3, target=0.5, base=0.6)
    assert schedule.chunk_lengths(initial) == lengths
    assert len(schedule.sparsities(initial)) == len(lengths)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"latent_frames": 0}, "latent_frames 0"),
        ({"frames_per_chunk": 0}, "frames_per_chunk 0"),
        ({"window": 3, "sink_frames": 1}, "window 3 .* at least 4"),
        ({"sink_frames": -1}, "sink_frames -1"),
        ({"target": 1.0, "base": 1.0}, "target 1.0"),
        ({"target": 0.8, "base": 0.7}, "base 0.7"),
        ({"target": 0.5, "base": 0.6, "curve": "sawtooth"}, "sawtooth"),
    ],
)
def test_impossible_recipes_are_refused_when_made(recipe, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"latent_frames": 21, **recipe})


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
