"""The Wan VAE's module tree: published names and counts, widths read from files, and what is refused."""

import pytest
import torch

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, random_vae_state_dict, vae_from_state_dict


@pytest.mark.parametrize(
    ("dim", "encoder", "decoder", "total"),
    [(96, 53_595_872, 73_295_331, 126_892_531), (24, 3_416_336, 4_617_339, 8_035_003)],
)
def test_tensor_and_parameter_counts_are_the_published_ones(dim, encoder, decoder, total):
    with torch.device("meta"):
        vae = WanVAE(dim)
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder, vae)]
    assert (len(vae.state_dict()), *counts) == (194, encoder, decoder, total)


@pytest.mark.parametrize(("dim", "dtype"), [(2, torch.bfloat16), (5, torch.float32)])
def test_width_dtype_and_weights_are_the_files_unless_the_caller_asks_for_another_dtype(dim, dtype):
    state_dict = random_vae_state_dict(dim=dim, dtype=dtype)
    vae = vae_from_state_dict(state_dict)
    assert (vae.dim, vae.training, any(p.requires_grad for p in vae.parameters())) == (dim, False, False)
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in vae.state_dict().items())
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


def without(state_dict, *names):
    return {name: t for name, t in state_dict.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: {}, "no tensors at all.*lightvaew2_1"),
        (lambda sd: {"decoder.1.weight": torch.zeros(256, 16, 3, 3)}, r"tiny autoencoder \(TAE\)"),
        (lambda sd: {"decoder.mid_block.attentions.0.norm.gamma": torch.zeros(4)}, "diffusers"),
        (lambda sd: {"patch_embedding.weight": torch.zeros(4, 16, 1, 2, 2)}, "diffusion model"),
        (lambda sd: sd | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}, "Wan 2.2 VAE with 48 latent channels"),
        (lambda sd: sd | {"conv2.weight": torch.zeros(4, 4, 1, 1, 1)}, "another model's VAE with 4 latent"),
        (lambda sd: {"state_dict": sd}, "no conv2.weight among its 1 entries.*state_dict"),
        (lambda sd: without(sd, "encoder.conv1.bias"), r'dim 2: Missing key.*"encoder.conv1.bias".*; use'),
        (lambda sd: sd | {"decoder.extra": torch.zeros(1)}, "Unexpected key.*decoder.extra"),
        (lambda sd: sd | {"decoder.head.2.bias": torch.zeros(12)}, r"decoder.head.2.bias.*\[12\].*\[3\]"),
        (lambda sd: {name: t.to(torch.float8_e4m3fn) for name, t in sd.items()}, "float8.*pass dtype=torch.bfloat16"),
    ],
)
def test_what_is_not_a_whole_wan_vae_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        vae_from_state_dict(change(random_vae_state_dict(dim=2)))
