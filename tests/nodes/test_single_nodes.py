"""Single nodes in ComfyUI: what the decoder asks for, what the patch remembers, what text embeddings keep."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("single_nodes")


def test_memory_request_grows_with_the_vae_and_not_with_the_length(facts):
    asked = facts["asked"]
    assert asked["8/1"] == asked["8/5"] == asked["8/9"] > 0
    assert 1.8 * asked["8/9"] < asked["16/9"] < 2 * asked["8/9"]  # all but the frames themselves


def test_other_vaes_are_sent_to_the_hosts_decode(facts):
    assert "TAESD" in facts["another VAE"]
    assert "VAE Decode" in facts["another VAE"]


def test_bad_latents_are_refused(facts):
    assert "[1, 16, 4, 6]" in facts["flat latent"]
    assert "NaN" in facts["NaN"]


def test_apply_reads_the_family_from_the_loaded_file(facts):
    assert facts["family auto"] == ["causal_forcing_framewise", [32, 32], [6, 2, 2]]
    assert facts["family light_forcing_long"] == ["light_forcing_long", [32, 32], [3, 2, 1]]


def test_schedule_follows_the_model_or_the_named_family(facts):
    assert facts["presets"] == {"auto": [1, 0.6], "dense": [1, None], "light_forcing_short": [3, 0.88]}
    assert "connect the MODEL" in facts["auto without a model"]
    assert facts["family without a model"] == 12


def test_text_embeddings_come_back_as_they_were(facts):
    assert facts["embeddings return"]
    assert "hooks" in facts["embeddings with hooks"]


def test_full_disk_is_named_and_keeps_nothing(facts):
    assert "full" in facts["disk full"]
    assert "free" in facts["disk full"]
    assert facts["left on the full disk"] == []


def test_images_of_a_video_end_make_a_latent_frame_of_every_four(facts):
    assert facts["ends"] == {"1": 1, "3": 1, "4": 1, "5": 2, "8": 2}
    assert facts["an end is what core encodes behind a still"] <= 1e-5
    assert facts["starts"] == {"1": 1, "4": 1, "5": 2, "8": 2}
