"""The Wan VAE's module tree: published names and counts, widths read from files, and what is refused."""

import pytest
import torch

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import (
    LATENT_MEAN,
    LATENT_STD,
    WanVAE,
    denormalise_latents,
    normalise_latents,
    random_vae_state_dict,
    vae_from_state_dict,
)


def meta_state_dict(dim):
    with torch.device("meta"):
        return WanVAE(dim).state_dict()


@pytest.mark.parametrize(
    ("dim", "encoder", "decoder", "total"),
    [(96, 53_595_872, 73_295_331, 126_892_531), (24, 3_416_336, 4_617_339, 8_035_003)],
)
def test_tensor_and_parameter_counts_are_the_published_ones(dim, encoder, decoder, total):
    state_dict = meta_state_dict(dim)

    def count(prefix):
        return sum(t.numel() for name, t in state_dict.items() if name.startswith(prefix))

    assert len(state_dict) == 194
    assert (count("encoder."), count("decoder."), count("")) == (encoder, decoder, total)


@pytest.mark.parametrize("dim", [2, 5])
def test_width_is_read_from_the_tensors_and_weights_are_kept(dim):
    state_dict = random_vae_state_dict(dim=dim)
    vae = vae_from_state_dict(state_dict)
    assert vae.dim == dim
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, state_dict[name])


def test_dtype_and_device_are_taken_from_the_file_or_from_the_caller():
    state_dict = random_vae_state_dict(dim=2, dtype=torch.bfloat16)
    assert {p.dtype for p in vae_from_state_dict(state_dict).parameters()} == {torch.bfloat16}
    vae = vae_from_state_dict(state_dict, dtype=torch.float16, device="cpu")
    assert {(p.dtype, p.device.type) for p in vae.parameters()} == {(torch.float16, "cpu")}


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (vae_from_state_dict, random_vae_state_dict(dim=2)),
        (wan_from_state_dict, random_state_dict(dim=128, ffn_dim=8, layers=1, text_dim=8)),
    ],
)
def test_memory_that_runs_out_is_reported_as_such(build, weights, monkeypatch):
    def full(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        build(weights)


def test_latent_statistics_are_wan_2_1s():
    # An all-ones latent, channel 7: 1 · 2.0743 + 1.5508.
    raw = denormalise_latents(torch.ones(1, 16, 1, 1, 1, dtype=torch.float64))
    assert raw[0, 7].item() == pytest.approx(3.6251, abs=1e-9)
    assert raw[0, 15].item() == pytest.approx(1.6239, abs=1e-9)
    assert (len(LATENT_MEAN), len(LATENT_STD)) == (16, 16)
    # Position-weighted sums, so that a swapped pair shows too.
    assert sum(i * value for i, value in enumerate(LATENT_STD)) == pytest.approx(251.8508, abs=1e-9)
    assert sum(i * value for i, value in enumerate(LATENT_MEAN)) == pytest.approx(0.5206, abs=1e-9)
    torch.testing.assert_close(normalise_latents(raw), torch.ones_like(raw))


def without(state_dict, *names):
    return {name: t for name, t in state_dict.items() if name not in names}


REFUSED = {
    "nothing": (lambda sd: {}, "no tensors at all.*lightvaew2_1"),
    "tiny autoencoder": (lambda sd: {"decoder.1.weight": torch.zeros(256, 16, 3, 3)}, r"tiny autoencoder \(TAE\)"),
    "diffusers": (lambda sd: {"decoder.mid_block.attentions.0.norm.gamma": torch.zeros(4)}, "diffusers"),
    "diffusion model": (lambda sd: {"patch_embedding.weight": torch.zeros(4, 16, 1, 2, 2)}, "diffusion model"),
    "wan 2.2": (lambda sd: sd | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, "Wan 2.2 VAE with 48 latent channels"),
    "other vae": (lambda sd: sd | {"conv2.weight": torch.zeros(4, 4, 1, 1, 1)}, "another model's VAE with 4 latent"),
    "nested": (lambda sd: {"state_dict": sd}, "no conv2.weight among its 1 entries.*state_dict"),
    "incomplete": (
        lambda sd: without(sd, "encoder.conv1.weight", "encoder.conv1.bias"),
        r'dim 2: Missing key.*"encoder.conv1.weight", "encoder.conv1.bias".*; use',
    ),
    "surplus": (lambda sd: sd | {"decoder.extra": torch.zeros(1)}, "Unexpected key.*decoder.extra"),
    "other shape": (
        lambda sd: sd | {"decoder.head.2.weight": torch.zeros(12, 2, 3, 3, 3)},
        r"decoder.head.2.weight.*\[12, 2, 3, 3, 3\].*\[3, 2, 3, 3, 3\]",
    ),
    "fp8": (
        lambda sd: {name: t.to(torch.float8_e4m3fn) for name, t in sd.items()},
        "float8_e4m3fn.*pass dtype=torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_wan_vae_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        vae_from_state_dict(make(random_vae_state_dict(dim=2)))
