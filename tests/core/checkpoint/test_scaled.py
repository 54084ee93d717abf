"""Quantised files: ComfyUI's formats are unchanged; others get its keys without loss, or become plain bfloat16."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, load_dit_state_dict

from ...support.checkpoint_samples import LAYERS, assert_same, in_diffusers_names, prefixed, tiny_wan

BY_ROWS = "fp8_rowwise of Light Forcing Model Loader"
NAMINGS = {"prefixed": lambda w: prefixed(w, "model.diffusion_model."), "diffusers": in_diffusers_names}


def quantised(weights, scale_name, scale_shape, dtype=torch.float8_e4m3fn, top=448.0):
    """Every layer's matrix as (fp8 or int8, float32 scale), and the float32 product of the two."""
    stored, product = dict(weights), dict(weights)
    for layer in LAYERS:
        weight = weights[f"{layer}.weight"].float()
        rows = weight.abs().amax(dim=1, keepdim=True) if scale_shape == "row" else weight.abs().max()
        scale = rows.clamp(min=1e-5) / top
        small = (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype)
        stored[f"{layer}.weight"], stored[f"{layer}.{scale_name}"] = small, scale
        product[f"{layer}.weight"] = small.float() * scale
    return stored, product


def as_bfloat16(product, weights):
    return {
        name: value.bfloat16() if name.removesuffix(".weight") in LAYERS else weights[name]
        for name, value in product.items()
    }


def comfy_quant(layer_format, **more):
    return torch.tensor(list(json.dumps({"format": layer_format, **more}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("scale_shape", ["row", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "top", "kind"), [(torch.float8_e4m3fn, 448.0, BY_ROWS), (torch.int8, 127.0, "int8_tensorwise")]
)
def test_scaled_weights_keep_their_numbers_and_become_bfloat16_on_request(tmp_path, dtype, top, kind, scale_shape):
    weights = tiny_wan(dtype=torch.bfloat16)
    stored, product = quantised(weights, "weight_scale", scale_shape, dtype, top)
    save_file(stored, tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    for layer in LAYERS:
        scale, rows = stored[f"{layer}.weight_scale"], len(stored[f"{layer}.weight"])
        stored |= {f"{layer}.weight_scale": scale.broadcast_to(rows, 1), f"{layer}.comfy_quant": comfy_quant(kind)}
    assert_same(loaded, stored)
    assert info.quantised.endswith(f"20 layers; read as {kind}")
    assert "LightX2V" in info.quantised
    plain, _ = load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)
    assert_same(plain, as_bfloat16(product, weights))


@pytest.mark.parametrize(
    ("dtype", "columns", "scale_name", "extra"),
    [
        (torch.float8_e5m2, 128, "weight_scale", {}),
        (torch.float8_e5m2, 128, "scale_weight", {"scaled_fp8": torch.zeros(2).to(torch.float8_e5m2)}),
        (torch.float8_e4m3fn, 200, "weight_scale", {}),  # FP8 units need multiples of 16
    ],
)
def test_scaled_weights_that_no_format_holds_become_bfloat16(tmp_path, dtype, columns, scale_name, extra):
    """ComfyUI reads float8_e5m2 in a scaled_fp8 file as float8_e4m3fn."""
    weights = tiny_wan(dtype=torch.bfloat16, ffn_dim=columns)
    stored, product = quantised(weights, scale_name, "tensor", dtype, 57344.0 if dtype is torch.float8_e5m2 else 448.0)
    save_file(stored | extra, tmp_path / "x.safetensors")
    plain, info = load_dit_state_dict(tmp_path / "x.safetensors")
    expected = as_bfloat16(product, weights)
    for layer in LAYERS if columns == 128 else ["blocks.0.ffn.0", "blocks.1.ffn.2"]:
        assert torch.equal(plain[f"{layer}.weight"], expected[f"{layer}.weight"])
        assert f"{layer}.comfy_quant" not in plain
    assert "bfloat16" in info.quantised


def test_scaled_fp8_files_with_a_scale_per_row_are_held_by_rows(tmp_path):
    stored, _ = quantised(tiny_wan(), "scale_weight", "row")
    save_file(stored | {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    loaded, _ = load_dit_state_dict(tmp_path / "x.safetensors")
    assert torch.equal(loaded["blocks.0.ffn.0.weight_scale"], stored["blocks.0.ffn.0.scale_weight"])
    assert torch.equal(loaded["blocks.0.ffn.0.comfy_quant"], comfy_quant(BY_ROWS))


def nvfp4_of_lightx2v(older):
    """A layer [128, 192] with scales of 1/8 for the weight and 1/512 for the inputs."""
    values = torch.randint(256, (128, 96), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    values[0, 0] = 0x93  # 1.5 and -0.5, the first in the lower half
    parts = {"weight": values, "weight_scale": torch.rand(128, 12).to(torch.float8_e4m3fn)}
    if older:
        return parts | {"alpha": torch.tensor([1 / 4096]), "input_global_scale": torch.tensor([512.0])}
    return parts | {"weight_global_scale": torch.tensor(8.0), "input_absmax": torch.tensor([5.25])}


@pytest.mark.parametrize("older", [False, True])
def test_nvfp4_of_lightx2v_becomes_that_of_comfyui_without_loss(tmp_path, older):
    weights, layer = tiny_wan(dtype=torch.bfloat16), "blocks.1.ffn.2."
    parts = nvfp4_of_lightx2v(older)
    save_file(prefixed(weights | prefixed(parts, layer), "model."), tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    made = {
        "weight": parts["weight"] % 16 * 16 + parts["weight"] // 16,
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": torch.tensor(1 / 8),
        "input_scale": torch.tensor(1 / 512),
        "comfy_quant": comfy_quant("nvfp4"),
    }
    assert made["weight"][0, 0] == 0x39
    assert_same(loaded, weights | prefixed(made, layer))
    assert info.quantised == "uint8 with scales (LightX2V), 1 layers; read as nvfp4"


def comfyui_file(kind):
    """Stored tensors in a format of ComfyUI, and their numbers, or why they cannot become plain."""
    weights = tiny_wan(dtype=torch.bfloat16)
    if kind == "nvfp4":
        for layer in LAYERS:
            rows, columns = weights[f"{layer}.weight"].shape
            weights[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            weights[f"{layer}.weight_scale"] = torch.zeros(rows, columns // 16).to(torch.float8_e4m3fn)
            weights |= {f"{layer}.weight_scale_2": torch.ones(()), f"{layer}.comfy_quant": comfy_quant("nvfp4")}
        return weights, "packed as nvfp4; load the file in ComfyUI"
    if kind == "convrot":
        stored, _ = quantised(weights, "weight_scale", "row", torch.int8, 127.0)
        stored |= {f"{layer}.comfy_quant": comfy_quant("int8_tensorwise", convrot=True) for layer in LAYERS}
        return stored, "packed as int8_tensorwise with convrot"
    if kind == "cast":
        stored = {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}
        return stored, {name: value.bfloat16() for name, value in stored.items()}
    stored, product = quantised(weights, "scale_weight" if kind == "scaled_fp8" else "weight_scale", "tensor")
    if kind == "scaled_fp8":
        stored |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "blocks.0.ffn.0.scale_input": torch.ones(())}
    else:
        stored |= {f"{layer}.comfy_quant": comfy_quant("float8_e4m3fn") for layer in LAYERS}
    return stored, as_bfloat16(product, weights)


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        *(("scaled_fp8", "ComfyUI"), ("comfy_quant", "ComfyUI"), ("cast", "without scales")),
        *(("nvfp4", "nvfp4"), ("convrot", "int8_tensorwise")),
    ],
)
def test_comfyuis_keys_are_unchanged_and_become_plain_on_request_unless_packed(tmp_path, kind, called):
    stored, plain = comfyui_file(kind)
    save_file(prefixed(stored, "model.diffusion_model."), tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, stored)
    assert called in info.quantised
    assert info.size.parameters == sum(value.numel() for value in tiny_wan().values())
    if isinstance(plain, str):
        with pytest.raises(CheckpointError, match=plain):
            load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)
    else:
        assert_same(load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)[0], plain)


@pytest.mark.parametrize("naming", NAMINGS)
def test_quantisation_in_the_metadata_becomes_a_mark_of_each_layer_without_one(tmp_path, naming):
    stored, _ = quantised(tiny_wan(), "weight_scale", "tensor")
    stored[f"{LAYERS[0]}.comfy_quant"] = comfy_quant("float8_e4m3fn", full_precision_matrix_mult=True)
    marks = {f"{layer}.weight_scale_2": torch.ones(1) for layer in LAYERS}  # one tensor per layer gives its stored name
    their_layers = [name.removesuffix(".weight_scale_2") for name in NAMINGS[naming](marks)]
    header = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in their_layers}}
    save_file(
        NAMINGS[naming](stored), tmp_path / "x.safetensors", metadata={"_quantization_metadata": json.dumps(header)}
    )
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, {f"{layer}.comfy_quant": comfy_quant("float8_e4m3fn") for layer in LAYERS} | stored)
    assert info.metadata == {}


def rows_with(**changes):
    """A file of scales per row with some tensors of one layer changed."""
    return quantised(tiny_wan(), "weight_scale", "row")[0] | prefixed(changes, "blocks.0.ffn.0.")


def part_of_nvfp4(leaf):
    parts = nvfp4_of_lightx2v(older=True)
    return tiny_wan() | prefixed(parts | {leaf: torch.zeros(2, 5, dtype=parts[leaf].dtype)}, "blocks.1.ffn.2.")


def of_unknown_kind(name, layer_dtype):
    layer = f"{name.rpartition('.')[0]}.weight"
    weights = tiny_wan() | {name: torch.ones(4)}
    kept = {layer: weights.pop(layer)}
    return weights | {key: weight.to(layer_dtype) for key, weight in kept.items() if layer_dtype}


UNKNOWN = r"quantised in an unknown format \({}\)"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (
            rows_with(weight=torch.zeros(192, 64, dtype=torch.uint8), weight_scale=torch.zeros(192, 8)),
            r"blocks\.0\.ffn\.0\.weight has shape \(192, 64\)",
        ),
        (rows_with(weight_scale=torch.ones(2, 1)), r"scales \(2, 1\); use the bf16 file"),
        *(
            (part_of_nvfp4(leaf), r"blocks\.1\.ffn\.2")
            for leaf in ("alpha", "input_global_scale", "weight_scale", "weight")
        ),
        *(
            (of_unknown_kind(name, dtype), UNKNOWN.format(name))
            for name, dtype in (
                ("blocks.1.ffn.2.weight_scale_inv", torch.float8_e4m3fn),
                ("head.head.weight_absmax", torch.int8),
                ("blocks.0.self_attn.q.qweight", None),
            )
        ),
    ],
)
def test_scales_that_do_not_fit_or_are_unknown_are_refused(tmp_path, stored, expected):
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=expected):
        load_dit_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("naming", NAMINGS)
def test_comfyuis_choice_of_attention_is_passed_on(tmp_path, naming):
    weights = tiny_wan(layers=1)
    marked = weights | {"blocks.0.self_attn.comfy_attention.config": torch.tensor(list(b"{}"), dtype=torch.uint8)}
    save_file(NAMINGS[naming](marked), tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, marked)
    assert info.quantised is None
    assert_same(load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)[0], weights)
