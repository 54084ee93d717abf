"""Files in LightX2V's formats, and others that ComfyUI does not read by itself, in our loader.

Each is compared, weights and latents, with the same numbers in a form that ComfyUI or our loader makes itself.
"""

import json
import sys
from pathlib import Path

import comfy_kitchen
import comfyui
import torch
from comfyui import comfy
from comfyui import loaded as ours
from safetensors.torch import save_file

import comfy_extras.nodes_model_merging as merging  # isort: skip (comfyui adds its path)

loader = comfyui.module("nodes.model.loader")
linear, scaled, checkpoint = comfyui.modules("lightforcing_core", "model.fp8", "checkpoint.scaled", "checkpoint.load")
PLAIN = "tiny_wan.safetensors"
ROWWISE, INT8, NVFP4 = "LightForcingRowwiseFP8Layout", "TensorWiseINT8Layout", "TensorCoreNVFP4Layout"
FOLDER = f"{comfyui.BASE}/models/diffusion_models"
weights = comfy.utils.load_torch_file(f"{FOLDER}/{PLAIN}")
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in linear.LAYER_LINEARS]
comfyui.infer()


def saved(name, *makers, **others):
    """A file whose layers are, in turn, what the makers make of their weights."""
    stored = weights | others
    for i, layer in enumerate(LAYERS):
        made = makers[i % len(makers)](weights[f"{layer}.weight"])
        stored |= {f"{layer}.{leaf}": tensor.contiguous() for leaf, tensor in made.items()}
    save_file(stored, f"{FOLDER}/{name}.safetensors")
    return f"{name}.safetensors"


def held_by(model):
    """The layers' weights as stored, and as plain numbers."""
    held = [model.model.diffusion_model.get_submodule(layer).weight for layer in LAYERS]
    return held, [weight.dequantize() if hasattr(weight, "_layout_cls") else weight.data for weight in held]


def compare(model, expected, layouts, most):
    """Both hold the same numbers in these layouts and sample alike; no layer is further than `most` from the file."""
    (held, plain), (_, wanted) = held_by(model), held_by(expected)
    errors = [(new - weights[f"{layer}.weight"]).norm() / new.norm() for layer, new in zip(LAYERS, plain, strict=True)]
    assert {getattr(weight, "_layout_cls", "plain") for weight in held} == layouts
    assert all(map(torch.equal, plain, wanted))
    assert (comfyui.video_of(model) - comfyui.video_of(expected)).abs().max() < 1e-5
    assert max(errors) < most, (layouts, max(errors))


def by_rows(weight):
    return dict(zip(("weight", "weight_scale"), linear.quantize_rows(weight), strict=True))


def int8(weight):
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def nvfp4(weight):
    scale = weight.abs().max() / 2688
    parts = *comfy_kitchen.quantize_nvfp4(weight, scale), scale, torch.tensor(1 / 64), scaled.format_mark("nvfp4")
    return dict(zip(("weight", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant"), parts, strict=True))


def lightx2v_nvfp4(weight):
    values, scales, scale, *_ = nvfp4(weight).values()
    inputs = torch.tensor([64.0])
    weight = values % 16 * 16 + values // 16
    return {"weight": weight, "weight_scale": scales, "alpha": scale / inputs, "input_global_scale": inputs}


def marked(maker, kind):
    return lambda weight: maker(weight) | {"comfy_quant": scaled.format_mark(kind)}


choice = {"blocks.0.self_attn.comfy_attention.config": torch.tensor(list(b"{}"), dtype=torch.uint8)}
comfy_int8 = marked(int8, "int8_tensorwise")
compare(ours(saved("fp8_lightx2v", by_rows)), ours(PLAIN, "fp8_rowwise"), {ROWWISE}, 0.03)
compare(ours(saved("int8_lightx2v", int8)), comfyui.load(saved("int8_comfy", comfy_int8)), {INT8}, 0.01)
compare(ours(saved("nvfp4_lightx2v", lightx2v_nvfp4)), comfyui.load(saved("nvfp4_comfy", nvfp4)), {NVFP4}, 0.12)
compare(ours(saved("attention_mark", lambda weight: {}, **choice)), ours(PLAIN), {"plain"}, 1e-6)
fp8, torch_device = ours("fp8_lightx2v.safetensors"), comfy.model_management.get_torch_device
sys.modules["comfy_kitchen"] = None  # as if it were not installed
plain = ours("fp8_lightx2v.safetensors")
sys.modules["comfy_kitchen"] = comfy_kitchen
assert {type(weight) for weight in held_by(plain)[0]} == {torch.nn.Parameter}
assert all((a - b).abs().max() < 0.01 * b.abs().max() for a, b in zip(held_by(plain)[1], held_by(fp8)[1], strict=True))
comfy.model_management.get_torch_device = lambda: torch.device("mps")
assert comfyui.module("nodes.comfy").why_no_rows() == "MPS has no float8"
comfy.model_management.get_torch_device = torch_device
mixed = ours(saved("mixed", by_rows, int8, nvfp4))
compare(mixed, mixed, {ROWWISE, INT8, NVFP4}, 0.12)
refusal = comfyui.error_of(ours, saved("unknown", marked(by_rows, "float3_of_tomorrow")))
assert "'float3_of_tomorrow', which this ComfyUI does not know; update ComfyUI" in refusal


# A model in `fp8_rowwise`, saved by ComfyUI's Save Model: ours loads it again, the stock loader refuses.
def written(model, prefix):
    """The file that Save Model writes."""
    merging.save_checkpoint(model, filename_prefix=prefix, output_dir=FOLDER)
    (file,) = Path(FOLDER).glob(f"{prefix}_*.safetensors")
    return file.name


model = ours(PLAIN, "fp8_rowwise")
latents = comfyui.video_of(model)
file = written(model, "saved_rows")
again = ours(file)
weight = again.model.diffusion_model.blocks[1].ffn[2].weight
assert (weight._layout_cls, weight._params.scale.shape) == ("LightForcingRowwiseFP8Layout", (256, 1))
assert torch.equal(comfyui.video_of(again), latents)
assert torch.equal(comfyui.video_of(ours(written(again, "saved_twice"))), latents)
# It would take a scale per row for one per matrix.
assert "fp8_rowwise of Light Forcing Model Loader" in comfyui.error_of(comfyui.load, file)
refusal = comfyui.error_of(ours, file, "fp8_rowwise")
assert "is quantised already (fp8_rowwise of Light Forcing Model Loader" in refusal
patched = comfyui.with_lora(ours(PLAIN, "fp8_rowwise"))
expected = comfyui.video_of(patched)
got = comfyui.video_of(ours(written(patched, "saved_lora")))
assert (expected - latents).norm() / latents.norm() > 0.2
assert (got - expected).norm() / expected.norm() < 1e-5  # a LoRA is saved into the rows
_, info = checkpoint.load_dit_state_dict(f"{FOLDER}/{file}")
assert info.quantised.startswith("fp8_rowwise of Light Forcing Model Loader in ComfyUI's format")
for left in Path(FOLDER).glob("saved_*"):
    left.unlink()

# Other errors of ComfyUI's loader name the file; running out of memory is still seen as such.
rotation = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "many"}
mark = torch.tensor(list(json.dumps(rotation).encode()), dtype=torch.uint8)
broken = saved("broken", lambda weight: int8(weight) | {"comfy_quant": mark.clone()})
refusal = comfyui.error_of(ours, broken)
assert (broken in refusal, "ComfyUI cannot load it (ValueError" in refusal) == (True, True)
for error, expected in ((KeyError("weight"), "cannot load it (KeyError: 'weight')"), (MemoryError("full"), "full")):
    loader.load_model = comfyui.failing(loader.load_model, 1, error)
    assert expected in comfyui.error_of(ours, PLAIN)
