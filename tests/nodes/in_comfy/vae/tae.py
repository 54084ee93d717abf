"""A TAE in ComfyUI: our decode against ComfyUI's, file by file, and in the sampler; printed as JSON."""

import itertools
import json
from pathlib import Path

import comfyui
import torch
from comfyui import comfy
from safetensors.torch import save_file

import folder_paths  # isort: skip
import nodes as comfyui_nodes  # isort: skip

decode, streaming = comfyui.module("nodes.vae.decode"), comfyui.module("lightforcing_core.vae.streaming")
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
facts = {
    "spread": for_normalised.std().item(),
    "apart": worst(for_normalised, for_raw),
    "ComfyUI's own decode of float16 taew2_1": worst(stock, for_normalised),
    "taew2_1 float16": worst(decoded(files["taew2_1 float16"], raw), for_normalised),
    "lighttaew2_1 float16": worst(decoded(files["lighttaew2_1 float16"], raw), for_raw),
    "set to raw": worst(decoded(files["taew2_1 float16"], raw, "raw"), for_raw),
}
bright = loaded("vae", "taew2_1_bf16.safetensors", {name: tensor.bfloat16() for name, tensor in weights.items()})
facts["taew2_1 bfloat16"] = worst(decoded(bright, raw), for_normalised)
facts["no name, float16"] = worst(decoded(comfy.sd.VAE(sd=dict(half)), raw), for_normalised)
unnamed = comfy.sd.VAE(sd=dict(weights))
facts["no name, float32"] = worst(decoded(unnamed, raw), for_raw)
facts["ComfyUI's decode of float32"] = worst(decoded(unnamed, raw), unnamed.decode(raw)[0].clamp(0, 1))
facts["no name, set to normalised"] = worst(decoded(unnamed, raw, "normalised"), for_normalised)

# A cut into single frames.
cut = streaming.StreamingDecoder(plain, tae_latents="normalised")
whole = cut.decode(normal)
cut.reset()
pieces = [cut.decode(piece) for piece in normal.split([1, 2, 3], dim=2)]
facts["cut on ComfyUI's tree"] = worst(torch.cat(pieces, dim=1), whole)

# What is refused, and what is asked for.
taehv_file = loaded("vae_approx", "taehv.safetensors", half)
facts["taehv.safetensors"] = comfyui.error_of(decoded, taehv_file, raw)
facts["taehv.safetensors, set to normalised"] = worst(decoded(taehv_file, raw, "normalised"), for_normalised)
wan22 = comfy.taesd.taehv.TAEHV(latent_channels=48).state_dict()
facts["Wan 2.2"] = comfyui.error_of(decoded, comfy.sd.VAE(sd=wan22), raw)
asked = [decode.FrameDecoder(unnamed, (batch, 16, frames, 4, 6)).bytes_needed
         for batch, frames in itertools.product((1, 2), (1, 9))]  # fmt: skip
facts["asked"] = [asked, unnamed.vae_dtype.itemsize * 64 * 4 * 6]

# The sampler's own frames are those of its latents.
model = comfyui.applied(comfyui.load("tiny_wan.safetensors"), "self_forcing")
latent = {"samples": torch.zeros(1, 16, 6, 8, 12)}
made = comfyui.sampling_node().execute(model, comfyui.prompt(), latent, 3, 2, vae=files["taew2_1 float16"])
facts["sampler's frames"] = list(made[1].shape)
facts["sampler against decode"] = worst(made[1], decoded(files["taew2_1 float16"], made[0]["samples"]))
video = from_model.process_in(made[0]["samples"].float())
with torch.no_grad():
    facts["sampler against ComfyUI's layers"] = worst(made[1], plain.decode(video)[0].movedim(0, -1).clamp(0, 1))
print(json.dumps(facts))
