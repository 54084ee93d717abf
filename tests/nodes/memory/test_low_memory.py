"""Runs on a card that is too small for the weights, so that ComfyUI keeps them in main memory and casts at every use.

The card is made of main memory but is a device of its own: what reads a weight that lies elsewhere fails there.
"""

import pytest

KINDS = ["float32", "bfloat16", "fp8_e4m3fn", "fp8_rowwise"]
WITH_LORA = [f"{kind}, LoRA" for kind in KINDS]


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("memory/low_memory")


@pytest.mark.parametrize("kind", KINDS + WITH_LORA)
def test_the_host_keeps_weights_in_main_memory_and_the_run_fits_the_card(facts, kind):
    found = facts["kinds"][kind]
    modules, away, _ = found["partly"]
    assert found["fully"] == [modules, 0, 0]
    assert away > 0
    assert found["fits"] == [False, True]  # the plan says that it is too little, and yet it is enough
    assert "too little, so ComfyUI will offload weights" in found["line"]


@pytest.mark.parametrize("kind", KINDS + WITH_LORA)
def test_novram_moves_every_weight_in_when_it_is_used(facts, kind):
    modules, away, patched = facts["kinds"][kind]["novram"]
    assert away == modules
    assert (patched > 0) == (kind in WITH_LORA)
    assert facts["kinds"][kind]["novram weights"] == 0


@pytest.mark.parametrize("kind", [*KINDS, "float32, LoRA"])
def test_the_video_is_the_same_bit_for_bit_wherever_weights_lie(facts, kind):
    assert facts["kinds"][kind]["same"] == [True, True]


@pytest.mark.parametrize("kind", WITH_LORA[1:])
def test_a_lora_differs_by_the_rounding_of_weights_that_it_was_added_to(facts, kind):
    """ComfyUI rounds the sum of a weight on the card and its LoRA, but not where it adds them at every use."""
    rounding = facts["kinds"][kind]["rounding"]
    assert 0.0 < max(rounding) < (0.002 if "bfloat16" in kind else 0.1)


def test_lowvram_does_what_the_host_does_without_it(facts):
    same, away = facts["kinds"]["float32"]["lowvram"]
    assert same
    assert away == facts["kinds"]["float32"]["partly"]


@pytest.mark.parametrize("way", ["fully", "partly", "novram", "one norm wrapped"])
def test_latents_and_frames_with_lora_and_vae_are_the_same(facts, way):
    assert facts[f"{way}, watched"]["same"] == [True, True]


def test_fused_kernels_read_a_norm_only_where_the_host_reads_it_as_it_lies(facts):
    """Pairs of (taken, what is read equals what ComfyUI makes of the norm)."""
    assert facts["fully, watched"]["norms"] == [[True, True]]
    assert facts["novram, watched"]["norms"] == [[False, True]]
    assert facts["one norm wrapped, watched"]["norms"] == [[False, True], [True, True]]
    assert all(right for _, right in facts["partly, watched"]["norms"])


def test_steps_are_not_recorded_where_weights_move_or_are_patched(facts):
    assert facts["fully, watched"]["reason"] is None
    for way in ("partly", "novram", "one norm wrapped"):
        found = facts[f"{way}, watched"]
        assert "ComfyUI moves, casts or patches the weights of " in found["reason"]
        assert found["graphs"] == f"not used: {found['reason']}"


def test_no_decode_beside_the_sampling_with_a_vae_that_is_not_all_on_the_card(facts):
    assert facts["beside"] == {"fully": True, "partly": False}


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_nodes_give_the_same_with_a_vae_that_does_not_fit(facts, what):
    assert facts["VAE"][what] == {"same": True, "partly loaded": [False, True]}


def test_weights_may_leave_the_card_while_the_run_goes_on(facts):
    same, before, after = facts["another model comes"]
    assert same == [True, True]
    assert before[1:] == [0, 0]
    assert after[1] > 0
    assert after[2] > 0  # a LoRA is now added at every use


def test_the_vae_comes_back_when_the_host_has_taken_it_off_the_card(facts):
    same, where = facts["the VAE goes"]
    assert same == [True, True]
    assert where == ["cpu"]


def test_runs_leave_no_trace_on_the_model(facts):
    assert facts["no trace"] == [True, True]
    assert facts["stock result unchanged"]
    assert facts["nothing on the card"] == [0, 0]
