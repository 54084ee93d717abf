"""With nothing skipped and the same noise, a run equals ComfyUI core's own autoregressive sampler."""

import pytest


@pytest.fixture(scope="module")
def differences(run_inside):
    return run_inside("sampling/against_core")


@pytest.mark.parametrize("frames_per_chunk", [3, 1, 4])
@pytest.mark.parametrize("model", ["core's causal model", "a plain Wan model"])
def test_dense_run_equals_ar_video(differences, frames_per_chunk, model):
    assert differences["spread of the latents"] > 0.1
    assert differences[f"{frames_per_chunk} per chunk, {model}"] <= 1e-5


@pytest.mark.parametrize("frames_per_chunk", [3, 1])
@pytest.mark.parametrize("place", ["before", "after"])
def test_video_starts_with_the_image_of_ar_video_i2v(differences, frames_per_chunk, place):
    assert differences[f"{frames_per_chunk} per chunk, image {place} Apply"] <= 1e-5
