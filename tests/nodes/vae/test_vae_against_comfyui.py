"""Streaming decode and encode agree with ComfyUI's own Wan VAE, on our module tree and driving ComfyUI's."""

import pytest


@pytest.fixture(scope="module")
def differences(run_inside):
    return run_inside("vae/vae_against_core")


@pytest.mark.parametrize(
    "what",
    ["decode, our tree", "decode, core's tree", "encode, our tree", "encode, core's tree", "decode, the VAE object"],
)
def test_float32_agrees_with_the_host_to_rounding(differences, what):
    assert differences["spread of the pixels"] > 0.05
    assert differences[what] <= 2e-5


def test_bfloat16_agrees_between_the_trees_and_stays_near_float32(differences):
    assert differences["decode in bfloat16, both trees"] <= 0.03
    assert differences["decode in bfloat16, against float32"] <= 0.05
