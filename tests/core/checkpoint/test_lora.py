"""LoRA files of every naming add exactly strength · alpha/rank · up · down to the right weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, load_dit_state_dict

from ...support.checkpoint_samples import LAYERS, in_diffusers_names, prefixed, tiny_wan

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


def underscored(layer):
    return layer.replace(".", "_")


def renamed(stored, old, new):
    return {key.replace(old, new): value for key, value in stored.items()}


NAMINGS = {
    "longlive": (lambda made: {"generator_lora": peft(made), "critic_lora": peft(made)}, 1.0),
    "peft": (peft, 1.0),
    "peft with adapter": (lambda made: peft(made, ".default"), 1.0),
    "fsdp-wrapped peft": (lambda made: renamed(peft(made), ".blocks", "._fsdp_wrapped_module.blocks"), 1.0),
    "comfyui": (down_up, 1.0),
    "comfyui with alpha": (lambda made: down_up(made, alpha=2), 2 / RANK),
    "bare names": (lambda made: down_up(made, prefix="", alpha=RANK), 1.0),
    "diffusers": (lambda made: down_up(made, prefix="transformer.", rename=diffusers_layer), 1.0),
    "kohya": (lambda made: down_up(made, "lora_unet_", 1, underscored), 1 / RANK),
    "wan fun": (lambda made: down_up(made, "lora_unet__", 1, underscored), 1 / RANK),
    "half dotted": (
        lambda made: down_up(made, "lora_unet_", None, lambda layer: layer.replace("blocks.", "blocks_")),
        1.0,
    ),
    "diffusers up and down": (lambda made: renamed(down_up(made, ""), ".lora_", "_lora."), 1.0),
    "transformers": (lambda made: renamed(down_up(made, "unet."), ".lora_", ".lora_linear_layer."), 1.0),
    "alpha as a number": (
        lambda made: {key: x if x.ndim else float(x) for key, x in down_up(made, alpha=8).items()},
        2.0,
    ),
}


def assert_added(loaded, weights, made, scale_of=lambda layer: 1.0):
    """Every layer's weight and its pair's product times its scale make the loaded weight."""
    for layer, (down, up) in made.items():
        expected = weights[f"{layer}.weight"].double() + scale_of(layer) * up.double() @ down.double()
        torch.testing.assert_close(loaded[f"{layer}.weight"].double(), expected, atol=1e-5, rtol=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights, path = tiny_wan(), tmp_path_factory.mktemp("model") / "longlive_base.pt"
    torch.save({"generator": prefixed(weights, "model.")}, path)
    return path, weights


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_the_same_product(tmp_path, model, naming, strength):
    path, weights = model
    made = pairs(weights)
    store, scale = NAMINGS[naming]
    torch.save(store(made), tmp_path / "lora.pt")
    loaded, info = load_dit_state_dict(path, lora=tmp_path / "lora.pt", lora_strength=strength)
    assert loaded.keys() == weights.keys()
    assert_added(loaded, weights, made, lambda layer: strength * scale)
    others = [name for name in weights if name.removesuffix(".weight") not in made]
    assert all(torch.equal(loaded[name], weights[name]) for name in others)
    assert f"added to 20 weights, strength {strength:g}" in info.notes[-1]


SETTINGS = {"r": RANK, "lora_alpha": 8}
OTHERS = {"alpha_pattern": {"blocks.1.ffn.0": 2}, "rank_pattern": {"blocks.1.ffn.2": 9}}
OWN = "base_model.model.blocks.0.ffn.0.alpha"


@pytest.mark.parametrize(
    ("settings", "scale", "of_one_layer"),
    [
        (SETTINGS, 2.0, 2.0),
        (SETTINGS | OTHERS, 2.0, 0.5),
        (SETTINGS | {"use_rslora": True}, 4.0, 4.0),
        (SETTINGS | {"r": RANK + 1}, 1.0, 1.0),  # of another LoRA in the same folder
        ({"peft_type": "LOHA", "r": RANK, "alpha": 8}, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["adapter_config.json", "beside the file", "metadata"])
def test_alpha_that_is_stored_apart_counts(tmp_path, model, settings, scale, of_one_layer, place):
    path, weights = model
    made = pairs(weights)
    folder = tmp_path / "adapter"
    folder.mkdir()
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": one for key, one in settings.items()})}
    stored = peft(made) | {OWN: torch.tensor(5.0)}  # counts before all others
    save_file(stored, folder / "adapter_model.safetensors", metadata=metadata if place == "metadata" else None)
    if place != "metadata":
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    lora = folder if place == "adapter_config.json" else folder / "adapter_model.safetensors"
    loaded, info = load_dit_state_dict(path, lora=lora)
    own = {"blocks.0.ffn.0": 5 / RANK, "blocks.1.ffn.0": of_one_layer}
    assert_added(loaded, weights, made, lambda layer: own.get(layer, scale))
    assert ("alpha from" in info.notes[-1]) == (scale != 1.0)


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
    changes = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    expected = dict(weights)
    expected["patch_embedding.weight"] = weights["patch_embedding.weight"] + 2 * torch.einsum(
        "orabc,rithw->oithw", up, down
    )
    for name, key in (
        ("blocks.0.norm3.weight", "blocks.0.norm3.w_norm"),
        ("blocks.0.norm3.bias", "blocks.0.norm3.b_norm"),
        ("blocks.0.self_attn.norm_q.weight", "blocks.0.self_attn.norm_q.diff"),
        ("blocks.0.ffn.0.bias", "blocks.0.ffn.0.diff_b"),
        ("blocks.0.modulation", "blocks.0.modulation.diff_m"),
        ("blocks.1.modulation", "blocks.1.diff_m"),
        ("head.modulation", "head.modulation.diff"),
    ):
        changes[key] = torch.randn_like(weights[name])
        expected[name] = weights[name] + 2 * changes[key]
    save_file(prefixed(changes, "diffusion_model."), tmp_path / "lora.safetensors")
    only = {key: value for key, value in changes.items() if "lora" not in key}
    save_file(only, tmp_path / "differences.safetensors")
    for file in ("lora", "differences"):
        loaded, _ = load_dit_state_dict(path, lora=tmp_path / f"{file}.safetensors", lora_strength=2.0)
        for name, value in expected.items():
            if file == "lora" or name != "patch_embedding.weight":
                torch.testing.assert_close(loaded[name], value, atol=1e-5, rtol=1e-6)


def test_layers_that_do_not_fit_are_left_out_by_name(tmp_path, model):
    path, weights = model
    made = pairs(weights)
    down, up = made["blocks.0.ffn.0"]
    made["blocks.0.ffn.0"] = (down.repeat(1, 2), up)
    stored = peft(made) | {
        "base_model.model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(4, 128),
        "base_model.model.blocks.7.ffn.0.lora_B.weight": torch.zeros(192, 4),
        "base_model.model.vace_blocks.0.ffn.2.diff_b": torch.zeros(128),
        "base_model.model.blocks.1.ffn.0.lora_B.bias": torch.zeros(192),
        "base_model.model.blocks.1.ffn.2.lora_magnitude_vector.weight": torch.ones(128),
        "base_model.model.head.head.lokr_w1": torch.ones(2, 2),
    }
    torch.save(stored, tmp_path / "lora.pt")
    loaded, info = load_dit_state_dict(path, lora=tmp_path / "lora.pt")
    assert any("LoRA lora.pt added to 18 weights" in note for note in info.notes)
    for left_out in (
        "4 keys match nothing in this model (base_model.model.blocks.0.cross_attn.k_img.lora_A.weight, ",
        "1 do not have the model's size (blocks.0.ffn.0)",
        "1 are DoRA, which cannot be merged here (blocks.1.ffn.2)",
        "1 are LoKr, which cannot be merged here (head.head)",
    ):
        assert sum(f"LoRA lora.pt, left out: {left_out}" in note for note in info.notes) == 1
    left = ("blocks.0.ffn.0", "blocks.1.ffn.2", "head.head")
    assert all(torch.equal(loaded[f"{layer}.weight"], weights[f"{layer}.weight"]) for layer in left)
    assert not torch.equal(loaded["blocks.1.ffn.0.weight"], weights["blocks.1.ffn.0.weight"])


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


def changed(change):
    """A PEFT file with every pair (down, up) changed."""
    return lambda made: peft({layer: change(*pair) for layer, pair in made.items()})


ALPHA = "blocks.0.ffn.0.alpha"


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (lambda made: peft(made, ".default") | peft(made, ".other"), "several adapters (default, other)"),
        (lambda made: {key: x for key, x in peft(made).items() if "lora_A" in key}, "only one matrix of its pair"),
        (changed(lambda down, up: (down.repeat(1, 2), up.repeat(2, 1))), "20 do not have the model's size"),
        (changed(lambda down, up: (down, up[:, :2])), "the matrices of blocks.0.self_attn.q are no pair (up (128, 2)"),
        (changed(lambda down, up: (down[:0], up[:, :0])), "are no pair (up (128, 0), down (0, 128))"),
        (changed(lambda down, up: (torch.tensor(1.0), up)), "are no pair"),
        (
            lambda made: {f"{LAYERS[0]}.lora_A": torch.tensor(1.0), f"{LAYERS[0]}.dora_scale": torch.ones(1)},
            "1 are DoRA, which cannot be merged here",
        ),
        (lambda made: {"blocks.0.norm3.diff": torch.tensor(1.0)}, "do not have the model's size"),
        (changed(lambda down, up: (down.index_fill(1, torch.tensor(5), torch.nan), up)), "q.weight NaN or infinite"),
        (lambda made: {"blocks.1.norm3.diff_b": torch.full((128,), torch.inf)}, "norm3.bias NaN or infinite"),
        (lambda made: peft(made) | {ALPHA: 2**2000}, "ffn.0.weight NaN or infinite"),
        (lambda made: peft(made) | {ALPHA: torch.ones(2)}, "the matrices of blocks.0.ffn.0 are no pair"),
        (
            lambda made: peft({layer.replace("blocks.", "blocks.9"): pair for layer, pair in made.items()}),
            "no layer of this LoRA fits: 40 keys match nothing",
        ),
        (lambda made: {"blocks.0.ffn.0.hada_w1_a": torch.ones(1, 1)}, "1 are LoHa, which cannot be merged here"),
        (lambda made: {"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, "not a LoRA"),
        (lambda made: {"a": peft(made), "b": peft(made)}, "contains several LoRAs (a, b)"),
    ],
)
def test_a_lora_that_cannot_be_merged_is_an_error(tmp_path, model, broken, expected):
    path, weights = model
    torch.save(broken(pairs(weights)), tmp_path / "lora.pt")
    with pytest.raises(CheckpointError) as caught:
        load_dit_state_dict(path, lora=tmp_path / "lora.pt")
    assert expected in str(caught.value)
    assert str(tmp_path / "lora.pt") in str(caught.value)


@pytest.mark.parametrize(
    "settings", ["[1]", "{", '{"lora_alpha": [], "r": 4}', '{"lora_alpha": 1, "r": 4, "rank_pattern": [1]}']
)
def test_settings_that_cannot_be_read_are_named(tmp_path, model, settings):
    path, weights = model
    save_file(peft(pairs(weights)), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: adapter_config\.json is not readable"):
        load_dit_state_dict(path, lora=tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("alpha", "settings"), [(8, "{"), (8, '{"lora_alpha": null, "r": 4}'), (None, '{"lora_alpha": 8, "r": 4}')]
)
def test_settings_of_another_file_in_the_folder_are_ignored(tmp_path, model, alpha, settings):
    path, weights = model
    made = pairs(weights)
    for name in ("lora", "other"):
        save_file(down_up(made, alpha=alpha), tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    loaded, info = load_dit_state_dict(path, lora=tmp_path / "lora.safetensors")
    assert_added(loaded, weights, made, lambda layer: (alpha or RANK) / RANK)
    assert ("adapter_config.json ignored" in info.notes[-1]) == (alpha is None)


def test_a_sum_beyond_float16_is_refused(tmp_path):
    weights = tiny_wan(dtype=torch.float16)
    save_file(weights, tmp_path / "self_forcing.safetensors")
    made = {layer: (down * 1e3, up * 1e3) for layer, (down, up) in pairs(weights, LAYERS[:1]).items()}
    save_file(down_up(made), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"q\.weight NaN or infinite"):
        load_dit_state_dict(tmp_path / "self_forcing.safetensors", lora=tmp_path / "lora.safetensors")


def test_other_kinds_go_to_the_adapter_if_they_are_bounded(tmp_path, model):
    path, weights = model
    seen = []

    def adapter(weight, parts, strength):
        seen.append(set(parts))
        return weight + strength

    stored = {
        "blocks.0.ffn.0.lokr_w1": torch.ones(12, 8),
        "blocks.0.ffn.0.lokr_w2_a": torch.ones(16, 2),
        "blocks.0.ffn.0.lokr_w2_b": torch.ones(2, 16),
        "blocks.0.ffn.2.lokr_w1": torch.ones(128, 192),
        "blocks.0.ffn.2.lokr_w2": torch.ones(128, 192),
        "blocks.1.ffn.2.oft_blocks": torch.ones(1, 1, 10**6),
        "blocks.1.cross_attn.q.hada_w1_a": torch.ones(10**6, 1),
        "blocks.1.cross_attn.q.hada_w1_b": torch.ones(1, 10**6),
        "blocks.9.ffn.0.lokr_w1": torch.ones(1, 1),
    }
    torch.save(stored, tmp_path / "lora.pt")
    loaded, info = load_dit_state_dict(path, lora=tmp_path / "lora.pt", lora_strength=0.5, lora_adapter=adapter)
    assert seen == [{"lokr_w1", "lokr_w2_a", "lokr_w2_b"}]
    changed = {name for name, weight in weights.items() if not torch.equal(loaded[name], weight)}
    assert changed == {"blocks.0.ffn.0.weight"}
    assert torch.equal(loaded["blocks.0.ffn.0.weight"], weights["blocks.0.ffn.0.weight"] + 0.5)
    assert sum("left out" in note for note in info.notes) == 4
