"""What ComfyUI makes of FP8: our checkpoint in both loaders, `fp8_rowwise`, LoRAs on them; printed as JSON.

`with_units` lets ComfyUI believe in FP8 units while it loads, so that it quantises activations as on a GPU that has
them. The product that it then asks torch for runs on a CPU under torch's older name only.
"""

import json
import sys

import comfy_kitchen.tensor.fp8
import comfyui
import torch
from comfy.quant_ops import QuantizedTensor
from comfyui import comfy

loader, patch = comfyui.modules("nodes", "model.loader", "model.patch")
quantize = comfyui.module("lightforcing_core.fp8.linear")
PLAIN, FP8, OUTLIER, CUT, CALIBRATED = sys.argv[4:9]
FOLDER = f"{comfyui.BASE}/models/diffusion_models"
SHAPE = (1, 16, 6, 8, 12)
settings = comfyui.settings_of("self_forcing")
noise = comfyui.noise_of(SHAPE)
facts = {}
comfyui.infer()


def scaled_mm(x, weight, **options):
    return torch._scaled_mm(x, weight, **options)


comfy_kitchen.tensor.fp8.scaled_mm_v2 = scaled_mm


def ours(file, weight_dtype="default"):
    return loader.load_checkpoint(f"{FOLDER}/{file}", "auto", None, weight_dtype)


def with_units(load, *arguments):
    supports = comfy.model_management.supports_fp8_compute
    comfy.model_management.supports_fp8_compute = lambda device=None: True
    try:
        return load(*arguments)
    finally:
        comfy.model_management.supports_fp8_compute = supports


def sample(model):
    return comfyui.sample(patch.patched(model, settings), comfyui.chunk_sampler(SHAPE[2]), noise)


def error(latents, reference):
    return ((latents - reference).norm() / reference.norm()).item()


def layers_of(model):
    """Layer → how ComfyUI holds its weight, for every linear of the transformer layers."""
    held = {}
    for name, module in model.model.diffusion_model.blocks.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            quantised = isinstance(weight, QuantizedTensor)
            held[name] = [weight._layout_cls, str(weight._qdata.dtype)] if quantised else [None, str(weight.dtype)]
    return held


def describe(model):
    return {
        "class": type(model.model).__name__,
        "operations": type(model.model.diffusion_model.blocks[0].ffn[0]).__qualname__.split(".")[0],
        "held": sorted({tuple(how) for how in layers_of(model).values()}),
        "layers": len(layers_of(model)),
        "others": sorted(
            {
                type(tensor).__name__
                for name, tensor in model.model.diffusion_model.named_parameters()
                if not name.startswith("blocks.")
            }
        ),
    }


reference = sample(comfyui.load(PLAIN))
reference_lora = sample(comfyui.with_lora(comfyui.load(PLAIN)))
facts["LoRA changes"] = error(reference_lora, reference)

models = {
    "stock loader": (comfyui.load, FP8),
    "our loader": (ours, FP8),
    "fp8_rowwise": (ours, PLAIN, "fp8_rowwise"),
    "fp8_e4m3fn": (ours, PLAIN, "fp8_e4m3fn"),
}
latents = {}
for name, (load, *arguments) in models.items():
    model = load(*arguments)
    facts[name] = describe(model)
    latents[name] = sample(model)
    facts[name]["error"] = error(latents[name], reference)
for name in ("stock loader", "fp8_rowwise"):
    load, *arguments = models[name]
    facts[name]["error on FP8 units"] = error(sample(with_units(load, *arguments)), reference)
    facts[name]["error with LoRA"] = error(sample(comfyui.with_lora(load(*arguments))), reference_lora)
facts["both loaders alike"] = torch.equal(latents["stock loader"], latents["our loader"])

# fp8_rowwise holds exactly the rows that quantize.py computes, and ComfyUI requantises a patched one by rows again.
model = ours(PLAIN, "fp8_rowwise")
held = model.model.diffusion_model.blocks[1].ffn[2].weight
plain = comfy.utils.load_torch_file(f"{FOLDER}/{PLAIN}")["blocks.1.ffn.2.weight"]
stored, scales = quantize.quantize_rows(plain)
facts["rows"] = torch.equal(held._qdata.float(), stored.float()) and torch.equal(held._params.scale, scales)
again = held.requantize_from_float(plain * 3, scale="recalculate", stochastic_rounding=7)
facts["requantised"] = [again._layout_cls, list(again._params.scale.shape), error(again.dequantize(), plain * 3)]
facts["largest of a row"] = torch.allclose(again.dequantize().abs().amax(1), 3 * plain.abs().amax(1), rtol=1e-5)
moved = held.to(torch.bfloat16).clone().detach().contiguous()
facts["moved"] = [moved._layout_cls, str(moved.dtype), error(moved.dequantize().float(), plain)]

# One layer on FP8 units, on usual inputs and on one channel that is far off; and one whose LoRA stays outside the
# weight, as where a model is partly offloaded.
x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
outlier = x.clone()
outlier[:, 3] = 3000.0
for name, (load, *arguments) in models.items():
    if name in ("our loader", "fp8_rowwise"):
        layer = with_units(load, *arguments).model.diffusion_model.blocks[1].ffn[2]
        for case, inputs in (("layer error", x), ("layer error with an outlier", outlier)):
            facts[name][case] = error(layer(inputs[None])[0], torch.nn.functional.linear(inputs, plain, layer.bias))

whole = comfyui.with_lora(comfyui.load(PLAIN))
whole.load(torch.device("cpu"), full_load=True)
expected = whole.model.diffusion_model.blocks[0].self_attn.q(x[:, :256])
for name in ("our loader", "fp8_rowwise"):
    load, *arguments = models[name]
    partly = comfyui.with_lora(with_units(load, *arguments))
    partly.load(torch.device("cpu"), lowvram_model_memory=1)
    layer = partly.model.diffusion_model.blocks[0].self_attn.q
    facts[name]["functions"] = len(layer.weight_function)
    facts[name]["layer error with LoRA outside"] = error(layer(x[None, :, :256])[0], expected)

# A model whose feed-forward has a channel of 3000: its FP8 file without and with calibrated inputs, and by rows.
reference = sample(comfyui.load(OUTLIER))
facts["outlier"] = {}
for name, arguments in {"cut": [CUT], "calibrated": [CALIBRATED], "rowwise": [OUTLIER, "fp8_rowwise"]}.items():
    model = with_units(ours, *arguments)
    facts["outlier"][name] = error(sample(model), reference)
facts["input_scale"] = [
    hasattr(with_units(comfyui.load, file).model.diffusion_model.blocks[1].ffn[2], "input_scale")
    for file in (CUT, CALIBRATED)
]

facts["FP8 file as rowwise"] = comfyui.error_of(ours, FP8, "fp8_rowwise")
print(json.dumps(facts))
