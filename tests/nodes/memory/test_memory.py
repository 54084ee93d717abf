"""The sampling node with plenty of memory and with little, and frames that are encoded a few at a time."""

import re

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("memory/memory")


def test_with_plenty_of_memory_nothing_is_given_up(facts):
    assert facts["plenty"]["given up"] == []
    assert re.match(r"needs about [\d.]+ GiB \(weights .*\), [\d.]+ GiB free$", facts["plenty"]["line"])


def test_with_little_memory_the_cache_goes_to_eight_bits_and_the_line_says_so(facts):
    assert facts["tight"]["given up"] == ["8-bit KV cache (int8)"]
    assert "8-bit KV cache (int8) (without: " in facts["tight"]["line"]
    assert "too little" in facts["tight"]["line"]  # a CPU has no other memory to move to


def test_each_way_to_keep_the_cache_gives_the_same_video_as_near_as_it_can(facts):
    found = facts["kv_cache"]
    assert found["auto"][0] == found["full"][0] == found["host"][0] == 0.0
    assert found["int8"][0] == found["int8_host"][0] > 0.0
    for name in ("int8", "fp8"):
        error, spread, said = found[name]
        assert 0.0 < error < 0.2 * spread
        assert said == f"8-bit KV cache ({name})"
    assert found["int8_host"][2] == "8-bit KV cache (int8) in CPU memory"


def test_decode_is_cut_into_tiles_where_memory_is_short(facts):
    before, after, shape, difference = facts["tiles"]
    assert (before, shape) == (1, [5, 256, 256, 3])
    assert after > 1
    assert 0.0 < difference < 0.1


def test_a_saved_run_goes_on_with_the_precision_it_began_with(facts):
    assert facts["state"] == ["int8", 3]
    assert facts["resumed equals uninterrupted"]


def test_estimates_are_the_same_in_the_mode_in_which_the_host_runs_nodes(facts):
    inside, outside = facts["estimates"]
    assert inside == outside


def test_encode_equals_the_hosts_and_keeps_the_end_of_a_video(facts):
    shape, difference = facts["encode"]
    assert shape == [1, 16, 3, 4, 6]
    assert difference <= 1e-5


def test_encode_refuses_what_it_cannot_take(facts):
    assert "height 40 is not a multiple of 16; use 32 or 48" in facts["odd size"]
    assert "use the Wan 2.1 VAE or LightVAE" in facts["another VAE"]


def test_memory_that_runs_out_while_encoding_is_an_error_that_the_host_knows(facts):
    assert facts["encode runs out"]["to ComfyUI"]
    error = facts["encode runs out"]["error"]
    assert re.search(r"encoding frame 8 of 9 at 48×32, which needs about \d\.\d\d GiB of the \d+\.\d\d GiB", error)
    assert "lower the size to 32×16, or use LightVAE" in error


def test_weights_that_the_host_keeps_away_are_not_counted(facts):
    without, usual = facts["novram"]
    assert without == 0 < usual


def test_what_the_host_can_move_out_counts_as_free(facts):
    assert facts["loaded models count"]
