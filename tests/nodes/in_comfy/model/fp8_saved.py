"""A model in `fp8_rowwise`, saved by ComfyUI's Save Model: ours loads it again, the stock loader refuses."""

from pathlib import Path

import comfyui
import torch

import comfy_extras.nodes_model_merging as merging  # isort: skip (comfyui adds its path)

loader, patch = comfyui.modules("nodes", "model.loader", "model.patch")
checkpoint = comfyui.module("lightforcing_core.checkpoint.load")
PLAIN = "tiny_wan.safetensors"
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
assert (weight._layout_cls, weight._params.scale.shape) == ("LightForcingRowwiseFP8Layout", (256, 1))
assert torch.equal(sample(again), latents)
assert torch.equal(sample(ours(saved(again, "saved_twice"))), latents)
# It would take a scale per row for one per matrix.
assert "fp8_rowwise of Light Forcing Model Loader" in comfyui.error_of(comfyui.load, file)
refusal = comfyui.error_of(ours, file, "fp8_rowwise")
assert "is quantised already (fp8_rowwise of Light Forcing Model Loader" in refusal
patched = comfyui.with_lora(ours(PLAIN, "fp8_rowwise"))
expected = sample(patched)
got = sample(ours(saved(patched, "saved_lora")))
assert (expected - latents).norm() / latents.norm() > 0.2
assert (got - expected).norm() / expected.norm() < 1e-5  # a LoRA is saved into the rows
_, info = checkpoint.load_dit_state_dict(FOLDER / file)
assert info.quantised.startswith("fp8_rowwise of Light Forcing Model Loader in ComfyUI's format")
for left in FOLDER.glob("saved_*"):
    left.unlink()
