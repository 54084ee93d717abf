"""A model in `fp8_rowwise`, saved by ComfyUI's own node and loaded again; printed as JSON."""

import json
import sys
from pathlib import Path

import comfyui
import torch

import comfy_extras.nodes_model_merging as merging  # isort: skip (comfyui adds its path)

loader, patch = comfyui.modules("nodes", "model.loader", "model.patch")
checkpoint = comfyui.module("lightforcing_core.checkpoint.load")
PLAIN = sys.argv[4]
FOLDER = Path(comfyui.BASE, "models", "diffusion_models")
SHAPE = (1, 16, 6, 8, 12)
settings = comfyui.settings_of("self_forcing")
noise = comfyui.noise_of(SHAPE)
comfyui.infer()


def ours(file, weight_dtype="default"):
    return loader.load_checkpoint(str(FOLDER / file), "auto", None, weight_dtype)


def sample(model):
    return comfyui.sample(patch.patched(model, settings), comfyui.chunk_sampler(SHAPE[2]), noise)


def saved(model, prefix):
    """The file that Save Model writes."""
    merging.save_checkpoint(model, filename_prefix=prefix, output_dir=str(FOLDER))
    (file,) = FOLDER.glob(f"{prefix}_*.safetensors")
    return file.name


model = ours(PLAIN, "fp8_rowwise")
latents = sample(model)
file = saved(model, "saved_rows")
again = ours(file)
weight = again.model.diffusion_model.blocks[1].ffn[2].weight
facts = {
    "held": [weight._layout_cls, list(weight._params.scale.shape)],
    "same latents": torch.equal(sample(again), latents),
    "saved once more": torch.equal(sample(ours(saved(again, "saved_twice"))), latents),
    "stock loader": comfyui.error_of(comfyui.load, file),
    "asked for rows": comfyui.error_of(ours, file, "fp8_rowwise"),
}
patched = comfyui.with_lora(ours(PLAIN, "fp8_rowwise"))
expected = sample(patched)
got = sample(ours(saved(patched, "saved_lora")))
facts["LoRA changes"] = float((expected - latents).norm() / latents.norm())
facts["LoRA saved with it"] = float((got - expected).norm() / expected.norm())
plain, _ = checkpoint.load_dit_state_dict(FOLDER / PLAIN)
read, info = checkpoint.load_dit_state_dict(FOLDER / file)
facts["info"] = info.quantised
for left in FOLDER.glob("saved_*"):
    left.unlink()
print(json.dumps(facts))
