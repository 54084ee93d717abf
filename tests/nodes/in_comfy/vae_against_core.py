"""Largest differences between ComfyUI's own Wan VAE and ours, on the same tiny weights; printed as JSON."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

checkout, pack, models = sys.argv[1:4]
sys.path.insert(0, checkout)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.latent_formats  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack_core",
    Path(pack, "lightforcing_core", "__init__.py"),
    submodule_search_locations=[f"{pack}/lightforcing_core"],
)
sys.modules["pack_core"] = importlib.util.module_from_spec(spec)
streaming, wan_vae = (importlib.import_module(f"pack_core.{name}") for name in ("streaming", "wan_vae"))

state_dict = comfy.utils.load_torch_file(f"{models}/models/vae/tiny_lightvae.safetensors")
host = comfy.sd.VAE(sd=dict(state_dict))
core = host.first_stage_model.to(torch.float32)
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
    report = {
        "decode, our tree": worst(streamed(ours), pixels),
        "decode, core's tree": worst(streamed(core), pixels),
        "encode, our tree": worst(streaming.StreamingEncoder(ours).encode(video), encoded),
        "encode, core's tree": worst(streaming.StreamingEncoder(core).encode(video), encoded),
        "decode, the VAE object": worst(streamed(ours), host.decode(raw)),
    }
    core.to(torch.bfloat16)
    report["decode in bfloat16, both trees"] = worst(
        streamed(wan_vae.vae_from_state_dict(state_dict, dtype=torch.bfloat16)), streamed(core)
    )
    report["decode in bfloat16, against float32"] = worst(streamed(core), pixels)
    report["spread of the pixels"] = pixels.std().item()
print(json.dumps(report))
