"""TAE files in ComfyUI: each decoded from the latents it was made for, also those that ComfyUI scales wrongly."""

import pytest

ROUNDING = 1e-5  # the same float32 layers over one frame or several at once


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("vae/tae")


def test_the_two_spaces_give_different_pictures(facts):
    assert facts["spread"] > 0.03
    assert facts["apart"] > 0.05


@pytest.mark.parametrize("what", ["taew2_1 float16", "lighttaew2_1 float16", "no name, float16", "no name, float32"])
def test_each_file_is_decoded_from_the_latents_it_was_made_for(facts, what):
    assert facts[what] <= ROUNDING


def test_the_file_name_counts_more_than_the_dtype(facts):
    assert facts["taew2_1 bfloat16"] <= 0.03  # its weights are rounded
    assert facts["lighttaew2_1 float16"] <= ROUNDING


def test_float16_taew_is_right_where_the_hosts_own_decode_is_not(facts):
    assert facts["ComfyUI's own decode of float16 taew2_1"] > 0.05
    assert facts["taew2_1 float16"] <= ROUNDING


def test_where_the_host_is_right_the_frames_are_the_same(facts):
    assert facts["ComfyUI's decode of float32"] <= ROUNDING


@pytest.mark.parametrize("what", ["set to raw", "no name, set to normalised", "taehv.safetensors, set to normalised"])
def test_tae_latents_overrides_what_auto_finds(facts, what):
    assert facts[what] <= ROUNDING


def test_any_cut_gives_the_same_bits_on_the_hosts_layers(facts):
    assert facts["cut on ComfyUI's tree"] == 0


def test_another_models_tae_is_refused_with_the_way_out(facts):
    assert "taehv.safetensors is the TAE of HunyuanVideo; use taew2_1" in facts["taehv.safetensors"]
    assert "48 latent channels instead of 16" in facts["Wan 2.2"]
    assert "VAE Decode" in facts["Wan 2.2"]


def test_memory_request_is_a_taes_and_grows_with_the_batch_only(facts):
    (one, one_long, two, two_long), pixel_bytes = facts["asked"]
    frames = 16 * 3 * pixel_bytes  # of one call, float32 as the decode is here
    assert one == one_long == 700 * pixel_bytes + frames
    assert two == two_long == 2 * one


def test_the_sampler_decodes_through_a_tae_while_it_runs(facts):
    assert facts["sampler's frames"] == [21, 64, 96, 3]
    assert facts["sampler against decode"] <= 3e-5  # its latents go to the VAE's space and back in float32
    assert facts["sampler against ComfyUI's layers"] <= 3e-5
