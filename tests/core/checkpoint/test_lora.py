"""LoRA files of every naming add exactly strength · alpha/rank · up · down to the right weights."""

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, load_dit_state_dict

from ...support.checkpoint_samples import LINEARS, in_diffusers_names, prefixed, tiny_wan

LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in LINEARS]
RANK = 4


def pairs(weights, layers=LAYERS, seed=5):
    """layer → (down [rank, in], up [out, rank])"""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in layers:
        out_features, in_features = weights[f"{layer}.weight"].shape
        down = torch.randn(RANK, in_features, generator=generator)
        made[layer] = (down, torch.randn(out_features, RANK, generator=generator))
    return made


def peft(made, adapter=""):
    stored = {}
    for layer, (down, up) in made.items():
        stored[f"base_model.model.{layer}.lora_A{adapter}.weight"] = down
        stored[f"base_model.model.{layer}.lora_B{adapter}.weight"] = up
    return stored


def down_up(made, prefix="diffusion_model.", alpha=None, rename=lambda layer: layer):
    stored = {}
    for layer, (down, up) in made.items():
        name = prefix + rename(layer)
        stored[f"{name}.lora_down.weight"], stored[f"{name}.lora_up.weight"] = down, up
        if alpha is not None:
            stored[f"{name}.alpha"] = torch.tensor(float(alpha))
    return stored


def diffusers_layer(layer):
    return next(iter(in_diffusers_names({f"{layer}.weight": torch.zeros(1)}))).removesuffix(".weight")


NAMINGS = {
    "longlive": (lambda made: {"generator_lora": peft(made), "critic_lora": peft(made)}, 1.0),
    "peft": (peft, 1.0),
    "peft with adapter": (lambda made: peft(made, ".default"), 1.0),
    "fsdp-wrapped peft": (
        lambda made: {
            key.replace(".blocks", "._fsdp_wrapped_module.blocks"): value for key, value in peft(made).items()
        },
        1.0,
    ),
    "comfyui": (down_up, 1.0),
    "comfyui with alpha": (lambda made: down_up(made, alpha=2), 2 / RANK),
    "bare names": (lambda made: down_up(made, prefix="", alpha=RANK), 1.0),
    "diffusers": (lambda made: down_up(made, prefix="transformer.", rename=diffusers_layer), 1.0),
    "kohya": (lambda made: down_up(made, "lora_unet_", 1, lambda layer: layer.replace(".", "_")), 1 / RANK),
}


@pytest.fixture
def model(tmp_path):
    weights = tiny_wan()
    torch.save({"generator": prefixed(weights, "model.")}, tmp_path / "longlive_base.pt")
    return tmp_path / "longlive_base.pt", weights


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_the_same_product(tmp_path, model, naming, strength):
    path, weights = model
    made = pairs(weights)
    store, scale = NAMINGS[naming]
    torch.save(store(made), tmp_path / "lora.pt")
    loaded, info = load_dit_state_dict(path, lora=tmp_path / "lora.pt", lora_strength=strength)
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer not in made:
            assert torch.equal(loaded[name], weight), name
            continue
        down, up = made[layer]
        expected = weight.double() + strength * scale * up.double() @ down.double()
        torch.testing.assert_close(loaded[name].double(), expected, atol=1e-5, rtol=1e-6)
    assert f"20 layers, rank {RANK}, strength {strength:g}" in info.notes[-1]


def test_the_sum_is_rounded_once_in_a_bfloat16_model(tmp_path):
    weights = tiny_wan(dtype=torch.bfloat16)
    save_file(weights, tmp_path / "self_forcing.safetensors")
    made = {layer: (down.bfloat16(), up.bfloat16()) for layer, (down, up) in pairs(weights).items()}
    save_file(down_up(made), tmp_path / "lora.safetensors")
    loaded, _ = load_dit_state_dict(tmp_path / "self_forcing.safetensors", lora=tmp_path / "lora.safetensors")
    for layer, (down, up) in made.items():
        expected = (weights[f"{layer}.weight"].float() + up.float() @ down.float()).bfloat16()
        assert loaded[f"{layer}.weight"].dtype == torch.bfloat16
        assert torch.equal(loaded[f"{layer}.weight"], expected)


def test_whole_differences_and_convolutions_are_added_too(tmp_path, model):
    path, weights = model
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(128, RANK, 1, 1, 1)
    changes = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.blocks.0.norm3.diff": torch.randn(128),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.randn(192),
        "diffusion_model.blocks.1.modulation.diff": torch.randn(1, 6, 128),
    }
    save_file(changes, tmp_path / "lora.safetensors")
    loaded, _ = load_dit_state_dict(path, lora=tmp_path / "lora.safetensors", lora_strength=2.0)
    expected = dict(weights)
    expected["patch_embedding.weight"] = weights["patch_embedding.weight"] + 2 * torch.einsum(
        "orabc,rithw->oithw", up, down
    )
    for name, key in (
        ("blocks.0.norm3.weight", "blocks.0.norm3.diff"),
        ("blocks.0.ffn.0.bias", "blocks.0.ffn.0.diff_b"),
        ("blocks.1.modulation", "blocks.1.modulation.diff"),
    ):
        expected[name] = weights[name] + 2 * changes[f"diffusion_model.{key}"]
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, atol=1e-5, rtol=1e-6)


def test_a_lora_is_merged_into_row_scaled_fp8_and_refused_for_comfyuis_formats(tmp_path):
    weights = tiny_wan()
    layer = "blocks.0.self_attn.q"
    small = weights[f"{layer}.weight"].to(torch.float8_e4m3fn)
    made = pairs(weights, [layer])
    torch.save(peft(made), tmp_path / "lora.pt")
    stored = weights | {f"{layer}.weight": small, f"{layer}.weight_scale": torch.full((128, 1), 0.5)}
    save_file(stored, tmp_path / "rows.safetensors")
    loaded, _ = load_dit_state_dict(tmp_path / "rows.safetensors", lora=tmp_path / "lora.pt")
    down, up = made[layer]
    assert torch.equal(loaded[f"{layer}.weight"], ((small.float() * 0.5).bfloat16().float() + up @ down).bfloat16())

    stored = stored | {f"{layer}.weight_scale": torch.tensor(0.5), "scaled_fp8": torch.zeros(1).to(torch.float8_e4m3fn)}
    save_file(stored, tmp_path / "comfyui.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be merged into it; add the LoRA with ComfyUI's"):
        load_dit_state_dict(tmp_path / "comfyui.safetensors", lora=tmp_path / "lora.pt")
    plain, _ = load_dit_state_dict(tmp_path / "comfyui.safetensors", lora=tmp_path / "lora.pt", dequantise_all=True)
    assert torch.equal(plain[f"{layer}.weight"], loaded[f"{layer}.weight"])


EXTRA = {"base_model.model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(4, 128)}


def changed(change):
    """A PEFT file with every pair (down, up) changed."""
    return lambda made: peft({layer: change(*pair) for layer, pair in made.items()})


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (lambda made: peft(made, ".default") | peft(made, ".other"), "several adapters (default, other)"),
        (lambda made: {key: x for key, x in peft(made).items() if "lora_A" in key}, "only one matrix of its pair"),
        (changed(lambda down, up: (down.repeat(1, 2), up.repeat(2, 1))), "for a model of another size"),
        (changed(lambda down, up: (down, up[:, :2])), "the ranks of blocks.0.self_attn.q differ"),
        (lambda made: peft(made) | EXTRA, f"1 of its 41 weights match no layer of this model ({next(iter(EXTRA))}"),
        (
            lambda made: peft({layer.replace("blocks.", "blocks.9"): pair for layer, pair in made.items()}),
            "40 of its 40 weights match no",
        ),
        (lambda made: peft(made) | {"blocks.0.ffn.0.dora_scale": torch.ones(1)}, "DoRA is not supported"),
        (lambda made: {"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, "not a LoRA"),
        (lambda made: {"a": peft(made), "b": peft(made)}, "contains several LoRAs (a, b)"),
    ],
)
def test_a_lora_that_does_not_fit_is_an_error(tmp_path, model, broken, expected):
    path, weights = model
    torch.save(broken(pairs(weights)), tmp_path / "lora.pt")
    with pytest.raises(CheckpointError) as caught:
        load_dit_state_dict(path, lora=tmp_path / "lora.pt")
    assert expected in str(caught.value)
    assert str(tmp_path / "lora.pt") in str(caught.value)
