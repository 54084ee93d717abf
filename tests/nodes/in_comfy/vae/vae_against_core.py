"""Streaming decode and encode agree with ComfyUI's own Wan VAE, on our module tree and driving ComfyUI's."""

import comfyui
import torch
from comfyui import BASE, comfy

streaming, wan_vae = comfyui.modules("lightforcing_core.vae", "streaming", "wan_vae")

state_dict = comfy.utils.load_torch_file(f"{BASE}/models/vae/tiny_lightvae.safetensors")
vae = comfy.sd.VAE(sd=dict(state_dict))
core = vae.first_stage_model.to(torch.float32)
ours = wan_vae.vae_from_state_dict(state_dict)
to_raw = comfy.latent_formats.Wan21()

torch.manual_seed(0)
latents = torch.randn(1, 16, 7, 6, 8)
video = torch.rand(1, 25, 48, 64, 3)


def worst(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()


def streamed(vae, dtype=None):
    decoder = streaming.StreamingDecoder(vae, dtype=dtype)
    return torch.cat([decoder.decode(piece) for piece in latents.split([3, 3, 1], dim=2)], dim=1)


with torch.no_grad():
    raw = to_raw.process_out(latents)
    pixels = ((core.decode(raw) + 1) / 2).clamp(0, 1).movedim(1, -1)
    encoded = to_raw.process_in(core.encode(video.movedim(-1, 1) * 2 - 1))
    assert pixels.std() > 0.05
    for tree in (ours, core):
        assert worst(streamed(tree), pixels) <= 2e-5
        assert worst(streaming.StreamingEncoder(tree).encode(video), encoded) <= 2e-5
    assert worst(streamed(ours), vae.decode(raw)) <= 2e-5
    core.to(torch.bfloat16)
    assert worst(streamed(wan_vae.vae_from_state_dict(state_dict, dtype=torch.bfloat16)), streamed(core)) <= 0.03
    assert worst(streamed(core), pixels) <= 0.05
