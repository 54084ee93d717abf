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
