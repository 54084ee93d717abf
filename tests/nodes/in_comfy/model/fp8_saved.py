"""A model in `fp8_rowwise`, saved by ComfyUI's own node and loaded again; printed as JSON."""

import json
import sys
from pathlib import Path

import comfyui
import torch
from comfyui import comfy

import comfy_extras.nodes_model_merging as merging  # isort: skip (comfyui adds its path)

loader, patch, chunk_sampler = comfyui.modules("nodes", "model.loader", "model.patch", "sampling.chunk_sampler")
schedules, families = comfyui.module("lightforcing_core.rollout.schedule"), comfyui.module("lightforcing_core.families")
attention, checkpoint = (
    comfyui.module("lightforcing_core.attention.options"),
    comfyui.module("lightforcing_core.checkpoint.load"),
)
PLAIN = sys.argv[4]
FOLDER = Path(comfyui.BASE, "models", "diffusion_models")
SHAPE = (1, 16, 6, 8, 12)
settings = patch.Settings(families.FAMILIES["self_forcing"], attention.AttentionOptions())
noise = comfyui.noise_of(SHAPE)
torch.inference_mode().__enter__()  # as ComfyUI runs every node
torch.set_num_threads(1)


def ours(file, weight_dtype="default"):
    return loader.load_checkpoint(str(FOLDER / file), "auto", None, weight_dtype)


def sample(model):
    sampler = chunk_sampler.ChunkSampler(chunk_sampler.Request(schedules.Schedule(SHAPE[2], 3, target=0.5, base=0.6)))
    return comfyui.sample(patch.patched(model, settings), sampler, noise)


def saved(model, prefix):
    """The file that Save Model writes."""
    merging.save_checkpoint(model, filename_prefix=prefix, output_dir=str(FOLDER))
    (file,) = FOLDER.glob(f"{prefix}_*.safetensors")
    return file.name


def error_of(action, *arguments):
    try:
        action(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


model = ours(PLAIN, "fp8_rowwise")
latents = sample(model)
file = saved(model, "saved_rows")
again = ours(file)
weight = again.model.diffusion_model.blocks[1].ffn[2].weight
facts = {
    "held": [weight._layout_cls, list(weight._params.scale.shape)],
    "same latents": torch.equal(sample(again), latents),
    "saved once more": torch.equal(sample(ours(saved(again, "saved_twice"))), latents),
    "stock loader": error_of(comfyui.load, file),
    "asked for rows": error_of(ours, file, "fp8_rowwise"),
}
lora = comfy.utils.load_torch_file(f"{comfyui.BASE}/models/loras/tiny_lora.safetensors")
patched = comfy.sd.load_lora_for_models(ours(PLAIN, "fp8_rowwise"), None, lora, 1.0, 0.0)[0]
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
