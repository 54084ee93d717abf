"""Files in LightX2V's formats, and others that ComfyUI does not read by itself, in our loader; printed as JSON.

Each is compared, weights and latents, with the same numbers in a form that ComfyUI or our loader makes itself.
"""

import json
import sys

import comfy_kitchen
import comfyui
import torch
from comfyui import comfy
from safetensors.torch import save_file

loader, patch = comfyui.modules("nodes", "model.loader", "model.patch")
linear, scaled = comfyui.modules("lightforcing_core", "fp8.linear", "checkpoint.scaled")
PLAIN = sys.argv[4]
FOLDER = f"{comfyui.BASE}/models/diffusion_models"
SHAPE = (1, 16, 6, 8, 12)
settings = comfyui.settings_of("self_forcing")
noise = comfyui.noise_of(SHAPE)
weights = comfy.utils.load_torch_file(f"{FOLDER}/{PLAIN}")
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in linear.LAYER_LINEARS]
facts = {}
comfyui.infer()


def ours(file, weight_dtype="default"):
    return loader.load_checkpoint(f"{FOLDER}/{file}", "auto", None, weight_dtype)


def saved(name, quantise, **others):
    """A file whose layers are what `quantise` makes of their weights."""
    stored = weights | others
    for layer in LAYERS:
        stored |= {f"{layer}.{leaf}": tensor for leaf, tensor in quantise(weights[f"{layer}.weight"]).items()}
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, f"{FOLDER}/{name}.safetensors")
    return f"{name}.safetensors"


def compare(name, model, expected):
    sample = [
        comfyui.sample(patch.patched(one, settings), comfyui.chunk_sampler(SHAPE[2]), noise)
        for one in (model, expected)
    ]
    held = [one.model.diffusion_model.get_submodule(LAYERS[-1]).weight for one in (model, expected)]
    plain = [weight.dequantize() if hasattr(weight, "_layout_cls") else weight.data for weight in held]
    facts[name] = {
        "layout": getattr(held[0], "_layout_cls", "plain"),
        "same weights": torch.equal(*plain),
        "difference": float((sample[0] - sample[1]).abs().max()),
        "error": float((plain[0].float() - weights[f"{LAYERS[-1]}.weight"]).norm() / plain[0].float().norm()),
    }


def by_rows(weight):
    return dict(zip(("weight", "weight_scale"), linear.quantize_rows(weight), strict=True))


def int8(weight):
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def nvfp4(weight):
    scale = weight.abs().max() / 2688
    values, scales = comfy_kitchen.quantize_nvfp4(weight, scale)
    mark = scaled.format_mark("nvfp4")
    return {
        "weight": values,
        "weight_scale": scales,
        "weight_scale_2": scale,
        "input_scale": torch.tensor(1 / 64),
        "comfy_quant": mark,
    }


def lightx2v_nvfp4(weight):
    made = nvfp4(weight)
    return {
        "weight": made["weight"] % 16 * 16 + made["weight"] // 16,
        "weight_scale": made["weight_scale"],
        "alpha": made["weight_scale_2"].reshape(1) / 64,
        "input_global_scale": torch.tensor([64.0]),
    }


def e5m2(weight):
    scale = weight.abs().max() / 57344
    return {"weight": (weight / scale).to(torch.float8_e5m2), "scale_weight": scale}


def e5m2_product(weight):
    made = e5m2(weight)
    return {"weight": (made["weight"].float() * made["scale_weight"]).bfloat16()}


def marked(quantise, kind):
    return lambda weight: quantise(weight) | {"comfy_quant": scaled.format_mark(kind)}


compare("fp8", ours(saved("fp8_lightx2v", by_rows)), ours(PLAIN, "fp8_rowwise"))
compare("int8", ours(saved("int8_lightx2v", int8)), comfyui.load(saved("int8_comfy", marked(int8, "int8_tensorwise"))))
compare("nvfp4", ours(saved("nvfp4_lightx2v", lightx2v_nvfp4)), comfyui.load(saved("nvfp4_comfy", nvfp4)))
legacy = {"scaled_fp8": torch.zeros(2).to(torch.float8_e5m2)}
compare("e5m2", ours(saved("e5m2_scaled", e5m2, **legacy)), ours(saved("e5m2_plain", e5m2_product)))
choice = {"blocks.0.self_attn.comfy_attention.config": torch.tensor(list(b"{}"), dtype=torch.uint8)}
compare("attention mark", ours(saved("attention_mark", lambda weight: {}, **choice)), ours(PLAIN))
facts["unknown"] = comfyui.error_of(ours, saved("unknown", marked(by_rows, "float3_of_tomorrow")))
print(json.dumps(facts))
