"""Single nodes, executed without a graph: what they ask for, refuse and write; printed as JSON."""

import json
import shutil

import comfyui
import torch
from comfyui import comfy

decode, loader, patch = comfyui.modules("nodes", "vae.decode", "model.loader", "model.patch")
text_embeds, schedule = comfyui.module("nodes.text_embeds"), comfyui.module("nodes.schedule")
encode = comfyui.module("nodes.vae.encode")
facts = {"asked": {}}
requests = []
load = comfy.model_management.load_models_gpu
comfy.model_management.load_models_gpu = lambda models, memory_required=0, **options: (
    requests.append(memory_required) or load(models, memory_required=memory_required, **options)
)


def refusal(vae, latents):
    return comfyui.error_of(decode.LightForcingDecode.execute, {"samples": latents}, vae)


for dim in (8, 16):
    vae = comfyui.small_vae(dim)
    for frames in (1, 5, 9):
        result = decode.LightForcingDecode.execute({"samples": torch.randn(2, 16, frames, 4, 6)}, vae)
        facts["asked"][f"{dim}/{frames}"] = requests[-1]
        assert result[0].shape == (2 * (4 * frames - 3), 32, 48, 3)
facts["flat latent"] = refusal(vae, torch.zeros(1, 16, 4, 6))
facts["NaN"] = refusal(vae, torch.full((1, 16, 2, 4, 6), float("nan")))
tae = comfy.taesd.taesd.TAESD(latent_channels=16)
facts["another VAE"] = refusal(comfy.sd.VAE(sd=tae.state_dict()), torch.zeros(1, 16, 2, 4, 6))

# What a video starts or ends with, as latents.
vae = comfyui.small_vae()
pixels = torch.rand(8, 32, 48, 3, generator=torch.Generator().manual_seed(2))


def encoded(count, **options):
    return encode.LightForcingEncode.execute(pixels[:count], vae, **options)[0]["samples"]


facts["starts"] = {count: encoded(count).shape[2] for count in (1, 4, 5, 8)}
facts["ends"] = {count: encoded(count, place="end").shape[2] for count in (1, 3, 4, 5, 8)}
behind = vae.encode(torch.cat([pixels[:1].expand(5, -1, -1, -1), pixels]))
facts["an end is what core encodes behind a still"] = float((encoded(8, place="end") - behind[:, :, 2:]).abs().max())

# Apply reads the family from the file that another loader has loaded, and keeps the options that are set.
options = {"backend": "auto", "block": "32", "keep_frames": -1, "keep_sink": 2, "keep_near": -1}
framewise = comfyui.load("causal_forcing-framewise.safetensors")
for family in ("auto", "light_forcing_long"):
    settings = patch.settings_of(loader.LightForcingApply.execute(framewise, family, **options)[0])
    attention = settings.attention
    kept = [attention.keep_frames, attention.sink_frames, attention.near_frames]
    facts[f"family {family}"] = [settings.family.id, list(attention.block), kept]

# The schedule's presets.
patched = loader.LightForcingApply.execute(framewise, "auto", **options)[0]
family = patch.settings_of(patched).family
made = {name: schedule.schedule_from(81, {"preset": name}, family) for name in ("auto", "dense", "light_forcing_short")}
facts["presets"] = {name: [s.frames_per_chunk, s.target] for name, s in made.items()}
facts["auto without a model"] = comfyui.error_of(schedule.schedule_from, 81, {"preset": "auto"}, None)
facts["family without a model"] = schedule.schedule_from(81, {"preset": "longlive"}, None).window

# Text embeddings: back as they were, whole or not at all.
node_comfy = comfyui.module("nodes.comfy")
folder = node_comfy.model_folder("text_embeds")
stored = [[torch.randn(1, 12, 4096), {"pooled_output": None, "attention_mask": torch.ones(1, 12), "strength": 1.0}]]
path = node_comfy.named_file(folder, "new folder/prompt")
text_embeds.save_embeds(path, stored)
((cond, extras),) = text_embeds.load_embeds(path)
facts["embeddings return"] = (
    torch.equal(cond, stored[0][0])
    and torch.equal(extras["attention_mask"], stored[0][1]["attention_mask"])
    and extras["pooled_output"] is None
    and extras["strength"] == 1.0
)
facts["embeddings with hooks"] = comfyui.error_of(text_embeds.save_embeds, path, [[cond, {"hooks": object()}]])
usage = shutil.disk_usage(folder)._replace(free=1000)
shutil.disk_usage = lambda *_: usage
full = folder / "full" / "prompt.safetensors"
facts["disk full"] = comfyui.error_of(text_embeds.save_embeds, full, stored)
facts["left on the full disk"] = [file.name for file in full.parent.glob("*")]
print(json.dumps(facts))
