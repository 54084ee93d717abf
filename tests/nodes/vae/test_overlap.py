"""Decode beside the sampling on the sampling node: nothing that an artist gets differs from decoding at once.

A stand-in for the second stream does its work only when it is waited for; "slow" frames never arrive by themselves.
"""

import pytest

BESIDE = ["beside", "beside, slow"]


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("vae/overlap")


@pytest.mark.parametrize("way", BESIDE)
def test_latents_and_frames_are_the_same(facts, way):
    assert facts["at once"]["whole"] == facts[way]["whole"] == [9, 33, None]
    assert facts[f"{way} equals"] == [True, True]
    assert facts[f"{way}, continued equals"] == [True, True]


def test_a_chunk_is_decoded_while_the_next_one_is_sampled(facts):
    assert facts["at once"]["log"] == []
    assert facts["beside"]["log"] == ["put", "frames", "put", "frames", "put", "frames"]
    # The second chunk is under way before anything waits for the first.
    assert facts["beside, slow"]["log"] == ["put", "put", "frames", "put", "frames", "frames"]


@pytest.mark.parametrize("way", BESIDE)
def test_the_live_view_gets_every_frame_in_order(facts, way):
    assert facts[way]["shown"] == facts["at once"]["shown"] == [[0, 9], [9, 21], [21, 33]]


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("end", ["step fails", "cancelled in a step", "not kept", "decode fails"])
def test_a_run_that_ends_early_leaves_what_it_leaves_otherwise(facts, way, end):
    assert facts[way][end] == facts["at once"][end]
    latent, frames, _ = facts["at once"][end]
    assert (latent, frames) == {
        "step fails": (3, 9),
        "cancelled in a step": (3, 9),
        "not kept": ("InterruptProcessingException", None),
        "decode fails": (6, 9),
    }[end]


@pytest.mark.parametrize("way", BESIDE)
def test_frames_of_a_chunk_that_is_given_up_do_not_come_later(facts, way):
    """Cancelled while a chunk is handed on: LATENT and frames still tell the same video."""
    latent, frames, _ = facts[way]["cancelled while shown"]
    assert frames == 4 * latent - 3


@pytest.mark.parametrize("way", BESIDE)
def test_video_files_hold_the_same_frames_also_when_the_run_breaks(facts, way):
    for kind, file, count in (("video", "_00001.mp4", 33), ("broken video", "_00001.partial.mp4", 21)):
        plain, beside = facts["at once"][kind], facts[way][kind]
        assert list(plain) == list(beside) == [file]
        assert len(plain[file]) == count
        # The encoder's threads decide a little, more so on a busy machine: up to 0.2 between two of the same frames.
        assert beside[file] == pytest.approx(plain[file], abs=0.4)
