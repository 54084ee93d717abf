"""A model in `fp8_rowwise`, saved by ComfyUI's Save Model: ours loads it again, the stock loader refuses."""

from pathlib import Path

import comfyui
import torch
from comfyui import loaded, video_of

import comfy_extras.nodes_model_merging as merging  # isort: skip (comfyui adds its path)

checkpoint = comfyui.module("lightforcing_core.checkpoint.load")
PLAIN = "tiny_wan.safetensors"
FOLDER = Path(comfyui.BASE, "models", "diffusion_models")
comfyui.infer()


def saved(model, prefix):
    """The file that Save Model writes."""
    merging.save_checkpoint(model, filename_prefix=prefix, output_dir=str(FOLDER))
    (file,) = FOLDER.glob(f"{prefix}_*.safetensors")
    return file.name


model = loaded(PLAIN, "fp8_rowwise")
latents = video_of(model)
file = saved(model, "saved_rows")
again = loaded(file)
weight = again.model.diffusion_model.blocks[1].ffn[2].weight
assert (weight._layout_cls, weight._params.scale.shape) == ("LightForcingRowwiseFP8Layout", (256, 1))
assert torch.equal(video_of(again), latents)
assert torch.equal(video_of(loaded(saved(again, "saved_twice"))), latents)
# It would take a scale per row for one per matrix.
assert "fp8_rowwise of Light Forcing Model Loader" in comfyui.error_of(comfyui.load, file)
refusal = comfyui.error_of(loaded, file, "fp8_rowwise")
assert "is quantised already (fp8_rowwise of Light Forcing Model Loader" in refusal
patched = comfyui.with_lora(loaded(PLAIN, "fp8_rowwise"))
expected = video_of(patched)
got = video_of(loaded(saved(patched, "saved_lora")))
assert (expected - latents).norm() / latents.norm() > 0.2
assert (got - expected).norm() / expected.norm() < 1e-5  # a LoRA is saved into the rows
_, info = checkpoint.load_dit_state_dict(FOLDER / file)
assert info.quantised.startswith("fp8_rowwise of Light Forcing Model Loader in ComfyUI's format")
for left in FOLDER.glob("saved_*"):
    left.unlink()
