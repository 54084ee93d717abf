"""Memory and disks that run out in the middle of a run: finished chunks are safe, and the message says what to do."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("sampling/faults")


def test_out_of_memory_in_a_step_returns_the_finished_chunks(facts):
    assert (facts["whole"]["latent"], facts["whole"]["frames"]) == (9, 33)
    for case in ("step", "CPU memory"):
        assert facts[case]["latent"] == 3
        (text,) = facts[case]["ui"]["text"]
        assert "out of memory while sampling a chunk, after 1 of 3 chunks: 9 of 33 frames" in text
        assert "window from 9 to 6 latent frames" in text
        assert "size from 48×32 to 32×16" in text
    assert facts["step"]["frames"] == 9


def test_out_of_memory_in_decoding_returns_all_latents_and_the_frames_so_far(facts):
    assert (facts["decode"]["latent"], facts["decode"]["frames"]) == (6, 9)
    assert "while decoding" in facts["decode"]["ui"]["text"][0]
    assert "LightVAE" in facts["decode"]["ui"]["text"][0]
    assert (facts["first decode"]["latent"], facts["first decode"]["frames"]) == (3, None)


@pytest.mark.parametrize("case", ["step, not kept", "first step"])
def test_out_of_memory_with_nothing_to_keep_is_an_error_that_the_host_knows(facts, case):
    assert facts[case]["kind"] == "OutOfMemoryError"
    assert facts[case]["to ComfyUI"]
    assert "lower the size from 48×32 to 32×16" in facts[case]["error"]


def test_advised_size_is_smaller_by_about_a_quarter_or_the_next_there_is(facts):
    wanted = {"832×480": "720×416 (2.00 GiB less)", "48×32": "32×16 (5.33 GiB less)", "64×16": "48×16 (2.00 GiB less)"}
    for size, smaller in wanted.items():
        assert f"lower the size from {size} to {smaller}" in facts["advice"][size]


def test_least_size_is_not_to_be_lowered(facts):
    assert "16×16" not in facts["advice at the least size"]
    assert facts["advice at the least size"].startswith("lower kv_cache to int8_host (")


def test_run_with_nothing_left_to_lower_is_told_what_else_helps(facts):
    sampling, decoding = facts["no advice left"]
    assert sampling == "every setting is at its lowest; close other programs"
    assert decoding.startswith(f"{sampling}; LightVAE (lightvaew2_1) decodes in")


@pytest.mark.parametrize("case", ["NaN", "infinity without a VAE"])
def test_a_model_that_makes_nan_is_an_error_at_the_first_chunk(facts, case):
    assert facts[case]["kind"] == "NotFinite"
    assert "chunk 0 of the video holds NaN or infinity; the model computes in torch.float32" in facts[case]["error"]
    assert "another dtype of its weights, or its LoRA" in facts[case]["error"]
    assert facts["NaN leaves"] == []


def test_a_vae_that_makes_nan_is_an_error_at_the_first_chunk(facts):
    for text in (facts["NaN of the VAE"]["error"], facts["NaN of the encoder"]):
        assert "holds NaN or infinity" in text
        assert "the VAE computes in torch.float32" in text


def test_nan_in_a_later_chunk_returns_the_finished_ones(facts):
    assert (facts["NaN later"]["latent"], facts["NaN later"]["frames"]) == (3, 9)
    (text,) = facts["NaN later"]["ui"]["text"]
    assert "chunk 1 of the video holds NaN" in text
    assert "stopped after 1 of 3 chunks: 9 of 33 frames" in text
    assert facts["NaN later, not kept"]["kind"] == "NotFinite"


def test_other_errors_go_on_as_they_are(facts):
    assert facts["another error"] == {"error": "boom", "kind": "RuntimeError", "to ComfyUI": False}


def test_full_disk_keeps_the_part_that_was_written(facts):
    assert "No space left on device" in facts["disk full, video"]["error"]
    assert "clip_00001.partial.mp4" in facts["disk full, video"]["error"]
    assert facts["left"] == ["clip_00001.partial.mp4"]
    assert 1 <= facts["frames in the partial file"] <= 14
    assert "No space left on device" in facts["disk full, state"]["error"]
    assert facts["chunks in the state"] == 1
