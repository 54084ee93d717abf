"""TAE files in ComfyUI: each decoded from the latents it was made for, also those that ComfyUI scales wrongly."""

import itertools
from pathlib import Path

import comfyui
import torch
from comfyui import comfy
from safetensors.torch import save_file

import folder_paths  # isort: skip
import nodes as comfyui_nodes  # isort: skip

decode, streaming = comfyui.module("nodes.vae.decode"), comfyui.module("lightforcing_core.vae.streaming")
ROUNDING = 1e-5  # the same float32 layers over one frame or several at once
from_model = comfy.latent_formats.Wan21()

# Random weights under ComfyUI's own names, small enough for colours inside 0…1.
torch.set_num_threads(1)  # waiting threads cost more here than they win
torch.manual_seed(0)
shapes = {name: t.shape for name, t in comfy.taesd.taehv.TAEHV(latent_channels=16).state_dict().items()}
weights = {name: 0.8 * torch.randn(shape) * shape[1:].numel() ** -0.5 for name, shape in shapes.items()}
weights = {name: 0.05 * t if name.endswith("bias") else t for name, t in weights.items()}
weights["decoder.22.weight"] *= 2
weights["decoder.22.bias"] = torch.full((3,), 0.5)
weights = {name: tensor.half().float() for name, tensor in weights.items()}  # so that every dtype holds the same
folders = {name: Path(folder_paths.get_folder_paths(name)[0]) for name in ("vae", "vae_approx")}
half = {name: tensor.half() for name, tensor in weights.items()}


def loaded(folder, name, state_dict):
    """Through ComfyUI's Load VAE, which keeps the path."""
    folders[folder].mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folders[folder] / name)
    folder_paths.filename_list_cache.clear()
    assert name in comfyui_nodes.VAELoader.vae_list(comfyui_nodes.VAELoader)
    return comfyui_nodes.VAELoader().load_vae(name)[0]


def worst(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()


def decoded(vae, samples, *more):
    return decode.LightForcingDecode.execute({"samples": samples}, vae, *more)[0]


normal = torch.randn(1, 16, 6, 4, 6)
raw = from_model.process_out(normal)  # what a LATENT of the graph holds
plain = comfy.taesd.taehv.TAEHV(latent_channels=16)
plain.load_state_dict(weights)
with torch.no_grad():
    for_normalised, for_raw = (plain.decode(z)[0].movedim(0, -1).clamp(0, 1) for z in (normal, raw))

files = {
    "taew2_1 float16": loaded("vae", "taew2_1.safetensors", half),
    "lighttaew2_1 float16": loaded("vae_approx", "lighttaew2_1.safetensors", half),
}
stock = files["taew2_1 float16"].decode(raw)[0]
assert for_normalised.std() > 0.03
assert worst(for_normalised, for_raw) > 0.05
assert worst(stock, for_normalised) > 0.05  # ComfyUI's own decode of float16 taew2_1
bright = loaded("vae", "taew2_1_bf16.safetensors", {name: tensor.bfloat16() for name, tensor in weights.items()})
taehv_file, unnamed = loaded("vae_approx", "taehv.safetensors", half), comfy.sd.VAE(sd=dict(weights))
for vae, tae_latents, expected in (
    (files["taew2_1 float16"], "auto", for_normalised),
    (files["lighttaew2_1 float16"], "auto", for_raw),
    (comfy.sd.VAE(sd=dict(half)), "auto", for_normalised),
    (unnamed, "auto", for_raw),
    (files["taew2_1 float16"], "raw", for_raw),
    (unnamed, "normalised", for_normalised),
    (taehv_file, "normalised", for_normalised),
):
    found = worst(decoded(vae, raw, tae_latents), expected)
    assert found <= ROUNDING, (getattr(vae, "patcher", None), tae_latents, found)
assert worst(decoded(bright, raw), for_normalised) <= 0.03  # by its name, and its weights are rounded
assert worst(decoded(unnamed, raw), unnamed.decode(raw)[0].clamp(0, 1)) <= ROUNDING  # where ComfyUI is right

# A cut into single frames.
cut = streaming.StreamingDecoder(plain, tae_latents="normalised")
whole = cut.decode(normal)
cut.reset()
pieces = [cut.decode(piece) for piece in normal.split([1, 2, 3], dim=2)]
assert torch.equal(torch.cat(pieces, dim=1), whole)

# What is refused, and what is asked for.
refusal = comfyui.error_of(decoded, taehv_file, raw)
assert "taehv.safetensors is the TAE of HunyuanVideo; use taew2_1" in refusal
wan22 = comfy.taesd.taehv.TAEHV(latent_channels=48).state_dict()
assert "VAE Decode" in comfyui.error_of(decoded, comfy.sd.VAE(sd=wan22), raw)
one, one_long, two, two_long = (
    decode.FrameDecoder(unnamed, (batch, 16, frames, 4, 6)).bytes_needed
    for batch, frames in itertools.product((1, 2), (1, 9))
)
pixel_bytes = unnamed.vae_dtype.itemsize * 64 * 4 * 6
frames = 12 * 3 * pixel_bytes  # of one call, float32 as the decode is here
assert one == one_long == 900 * pixel_bytes + frames
assert two == two_long == 2 * one

# The sampler's own frames are those of its latents.
model = comfyui.applied(comfyui.load("tiny_wan.safetensors"), "self_forcing")
latent = {"samples": torch.zeros(1, 16, 6, 8, 12)}
made = comfyui.sampling_node().execute(model, comfyui.prompt(), latent, 3, 2, vae=files["taew2_1 float16"])
assert made[1].shape == (21, 64, 96, 3)
# Its latents go to the VAE's space and back in float32.
assert worst(made[1], decoded(files["taew2_1 float16"], made[0]["samples"])) <= 3e-5
video = from_model.process_in(made[0]["samples"].float())
with torch.no_grad():
    assert worst(made[1], plain.decode(video)[0].movedim(0, -1).clamp(0, 1)) <= 3e-5
