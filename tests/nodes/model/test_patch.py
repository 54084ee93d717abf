"""The patch stays on its clone, refuses what it would drop, and a run gives its memory back."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("model/patching")


def test_stock_model_is_bit_identical_beside_the_patch(facts):
    assert facts["stock result unchanged"]
    assert facts["patched model under a stock sampler is stock"]


def test_runs_repeat(facts):
    assert facts["run repeats"]
    assert facts["run after interrupt repeats"]


def test_patch_sets_the_shift_and_survives_clones(facts):
    assert facts["shift"] == [8.0, 5.0]
    assert facts["settings survive clones"]
    assert facts["patching twice adds one wrapper"] == 1


def test_other_wrappers_still_run_once_per_forward(facts):
    assert facts["wrapped result unchanged"]
    assert facts["forwards"] == 2 * 4 + 1  # two chunks of four steps, and one clean pass between them


def test_replay_of_the_window_reads_only_what_is_visible(facts):
    """Four given chunks and one new: all of them, or the sink's, the last and the one that is partly visible."""
    assert facts["forwards to continue"] == {"all": 4 + 4, "window": 3 + 4}


CONFLICTS = (
    "easycache",
    "lazycache",
    "optimized_attention_override",
    "double_block",
    "attn1_patch",
    "attn2_patch",
    "rope_options",
    "diffusion_model.forward",
    "diffusion_model.blocks.0.self_attn.forward",
    "context_handler",
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicting_patch_is_refused_by_name(facts, name, when):
    assert name in facts[f"conflicts {when}"][name]


def test_memory_is_back_after_success_error_and_interrupt(facts):
    assert facts["interrupt is"] == "InterruptProcessingException"
    for case in ("success", "error", "interrupt"):
        assert facts[f"left after {case}"] == 0
    for case in ("error", "interrupt"):
        assert facts[f"left after {case}, exception held"] < facts["cache bytes"]


def test_callback_sees_the_whole_video_in_one_shape(facts):
    shape = [1, 16, 6, 8, 12]
    assert facts["callback"] == [shape, shape, 2 * 4]


def test_memory_request_is_a_chunk_and_the_cache_with_its_pooled_keys(facts):
    needed, one_frame = facts["needed"]
    assert needed <= facts["asked"] < needed + 0.1 * facts["cache bytes"] + one_frame
