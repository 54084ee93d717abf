"""LoRAs of kinds that ComfyUI's own code merges for the loader's `lora_name`."""

from pathlib import Path

import comfyui
import torch
from safetensors.torch import load_file, save_file

MODEL = Path(comfyui.BASE, "models", "diffusion_models", "tiny_wan.safetensors")
LORA = Path(comfyui.BASE, "models", "loras", "of_another_kind.safetensors")
LAYER = "blocks.1.self_attn.q"
weights, generator = load_file(MODEL), torch.Generator().manual_seed(7)


def new(*shape):
    return torch.randn(shape, generator=generator) * 0.1


def loaded(parts, layer=LAYER):
    """Our loader's weights with a LoRA of one layer."""
    save_file({f"diffusion_model.{layer}.{part}": tensor for part, tensor in parts.items()}, LORA)
    return comfyui.loaded(MODEL.name, lora=LORA.name).model.diffusion_model.state_dict()


def error(parts, change):
    """The largest error of any weight, if only the layer's changes by so much."""
    got = loaded(parts)
    expected = weights | {f"{LAYER}.weight": weights[f"{LAYER}.weight"] + change}
    return max(float((got[name].cpu() - value).abs().max()) for name, value in expected.items())


whole, up, down = new(8, 4), new(32, 3), new(3, 64)
lokr = {"lokr_w1": whole, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(6.0)}
assert error(lokr, 2 * torch.kron(whole, up @ down)) < 1e-5
pairs = [(new(256, 2), new(2, 256)) for _ in range(2)]
names = [f"hada_w{number}_{matrix}" for number in (1, 2) for matrix in "ab"]
loha = dict(zip(names, (matrix for pair in pairs for matrix in pair), strict=True))
(a, b), (c, d) = pairs
assert error(loha, (a @ b) * (c @ d)) < 1e-5
up, down = new(256, 4), new(4, 256)
dora = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": torch.full((256, 1), 2.0)}
old = weights[f"{LAYER}.weight"]
rows = (old + up @ down) * 2.0 / old.norm(dim=1, keepdim=True)  # of every row, as ComfyUI computes it
assert error(dora, rows - old) < 1e-5
for unfit in ({"lokr_w1": whole, "lokr_w2": new(1, 1)}, {"lokr_w1_a": new(256, 1), "lokr_w2": new(1, 256)}):
    refusal = comfyui.error_of(loaded, unfit)
    assert "1 are LoKr, which cannot be merged here (blocks.1.self_attn.q)" in refusal
LORA.unlink()
