"""Runs under ComfyUI's DynamicVRAM, with a stand-in for what its C library does with a GPU's page tables.

ComfyUI's own code decides which weights come, are cast, patched and kept; the stand-in spoils what it gives up.
"""

import re
from pathlib import Path

import pytest

HELP = Path(__file__).resolve().parents[3] / "nodes" / "web" / "docs" / "LightForcingSampler.md"
KINDS = ["float32", "bfloat16", "fp8_e4m3fn", "fp8_rowwise"]
WITH_LORA = [f"{kind}, LoRA" for kind in KINDS]
ROOMS = ["all", "half", "none"]


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("memory/dynamic_vram")


@pytest.mark.parametrize("kind", KINDS + WITH_LORA)
def test_the_host_streams_what_has_no_room(facts, kind):
    found = facts["kinds"][kind]
    assert found["dynamic"]
    assert (found["all"][1] > 0, found["all"][2]) == (True, 0)
    assert found["none"][1] == 0 < found["none"][2]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("kind", ["float32", "float32, LoRA", "bfloat16", "fp8_rowwise"])
def test_the_video_equals_the_one_without_dynamic_vram(facts, kind, room):
    assert facts["kinds"][kind][room][0]


def test_fp8_cast_by_the_host_is_nearer_to_the_file(facts):
    """Under DynamicVRAM ComfyUI leaves small weights as the file has them; FP8 holds only for the large ones."""
    usual, dynamic = facts["kinds"]["fp8_e4m3fn"]["from the file"]
    assert 0.0 < dynamic < usual


@pytest.mark.parametrize("kind", WITH_LORA[1:])
def test_a_lora_differs_by_the_rounding_of_weights_that_it_was_added_to(facts, kind):
    rounding = facts["kinds"][kind]["rounding"]
    assert max(rounding.values()) < (0.002 if "bfloat16" in kind else 0.1)


@pytest.mark.parametrize("kind", KINDS + WITH_LORA)
def test_runs_leave_the_weights_as_they_were(facts, kind):
    assert facts["kinds"][kind]["no trace"]


def test_fast_paths_know_what_is_streamed(facts):
    found = facts["watched"]
    assert found["dynamic"] == [True, True]
    assert found["same"] == [True, True]
    assert all(right for _, right in found["norms"])
    assert found["graphs"].startswith("not used: ComfyUI moves, casts or patches the weights of ")


def test_decode_beside_the_sampling_is_planned_only_with_weights_that_stay(facts):
    assert facts["beside"] == [True, False]


def test_a_card_that_is_too_small_for_the_weights_is_enough(facts):
    same, within, streamed = facts["small card"]
    assert same == [True, True]
    assert within
    assert streamed
    assert "so ComfyUI will offload weights" in facts["line"]


def test_pages_may_go_while_the_run_goes_on(facts):
    assert facts["some pages go"] == [[True, True], True]
    assert facts["all weights go"] == [[True, True], 0]


def test_what_a_run_may_take_does_not_depend_on_what_is_loaded(facts):
    for_a_run, free, weights = facts["free"]
    assert abs(for_a_run) < weights // 1000
    assert free < -weights


def test_where_hooks_need_an_ordinary_model_the_host_can_make_one(facts):
    assert facts["delegate"] == [False, [True, True]]


def test_decode_and_encode_nodes_give_the_same(facts):
    assert facts["nodes"] == [True, True]


def test_start_options_that_the_help_names_are_the_hosts_and_turn_dynamic_vram_off(facts):
    named = set(re.findall(r"--[a-z][a-z-]+", HELP.read_text(encoding="utf-8")))
    assert {"--disable-dynamic-vram", "--fast", "--disable-cuda-malloc"} <= named <= set(facts["start options"])
    assert facts["on by default, and when it is disabled"] == [True, False]
