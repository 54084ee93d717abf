"""Weights in LightX2V's formats, and in others that ComfyUI does not read by itself, run with their own numbers."""

import pytest


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("model/published_formats", "tiny_wan.safetensors")


@pytest.mark.parametrize(
    ("file", "layouts", "error"),
    [
        ("fp8", ["LightForcingRowwiseFP8Layout"], 0.03),
        ("int8", ["TensorWiseINT8Layout"], 0.01),
        ("nvfp4", ["TensorCoreNVFP4Layout"], 0.12),
        ("mixed", ["LightForcingRowwiseFP8Layout", "TensorCoreNVFP4Layout", "TensorWiseINT8Layout"], 0.12),
        ("e5m2", ["plain"], 0.06),
        ("attention mark", ["plain"], 1e-6),
    ],
)
def test_held_as_published_and_samples_as_the_same_numbers_do(facts, file, layouts, error):
    assert facts[file]["layouts"] == layouts
    assert facts[file]["same weights"]
    assert facts[file]["difference"] < 1e-5
    assert facts[file]["error"] < error


def test_a_format_that_this_comfyui_does_not_know_is_named(facts):
    assert "'float3_of_tomorrow', which this ComfyUI does not know; update ComfyUI" in facts["unknown"]
