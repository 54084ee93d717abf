"""Quantised files: ComfyUI's formats are unchanged, weights that ComfyUI cannot read become plain bfloat16."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, load_dit_state_dict

from ...support.checkpoint_samples import LINEARS, assert_same, in_diffusers_names, prefixed, tiny_wan

LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in LINEARS]


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


def comfy_quant(layer_format):
    return torch.tensor(list(json.dumps({"format": layer_format}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("dtype", "top"), [(torch.float8_e4m3fn, 448.0), (torch.int8, 127.0)])
def test_row_scaled_weights_become_bfloat16(tmp_path, dtype, top):
    weights = tiny_wan(dtype=torch.bfloat16)
    stored, product = quantised(weights, "weight_scale", "row", dtype, top)
    save_file(stored, tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, as_bfloat16(product, weights))
    assert "LightX2V" in info.quantised
    assert "20 layers" in info.quantised


def test_legacy_scaled_fp8_keys_are_unchanged(tmp_path):
    stored, _ = quantised(tiny_wan(), "scale_weight", "tensor")
    stored |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "blocks.0.ffn.0.scale_input": torch.ones(())}
    save_file(prefixed(stored, "model.diffusion_model."), tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, stored)
    assert "ComfyUI" in info.quantised
    assert info.size.parameters == sum(value.numel() for value in tiny_wan().values())


def test_comfy_quant_keys_are_unchanged_and_become_plain_on_request(tmp_path):
    weights = tiny_wan(dtype=torch.bfloat16)
    stored, product = quantised(weights, "weight_scale", "tensor")
    stored |= {f"{layer}.comfy_quant": comfy_quant("float8_e4m3fn") for layer in LAYERS}
    save_file(stored, tmp_path / "x.safetensors")
    assert_same(load_dit_state_dict(tmp_path / "x.safetensors")[0], stored)
    plain, _ = load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)
    assert_same(plain, as_bfloat16(product, weights))


@pytest.mark.parametrize("naming", ["prefixed", "diffusers"])
def test_quantisation_in_the_metadata_is_renamed_with_the_layers(tmp_path, naming):
    stored, _ = quantised(tiny_wan(), "weight_scale", "tensor")
    marks = {f"{layer}.weight_scale_2": torch.ones(1) for layer in LAYERS}  # one tensor per layer gives its stored name
    rename = in_diffusers_names if naming == "diffusers" else lambda w: prefixed(w, "model.diffusion_model.")
    their_layers = [name.removesuffix(".weight_scale_2") for name in rename(marks)]
    header = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in their_layers}}
    save_file(rename(stored), tmp_path / "x.safetensors", metadata={"_quantization_metadata": json.dumps(header)})
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, stored)
    assert set(json.loads(info.metadata["_quantization_metadata"])["layers"]) == set(LAYERS)


def test_weights_cast_to_fp8_become_plain_on_request_only(tmp_path):
    weights = {name: value.to(torch.float8_e4m3fn) for name, value in tiny_wan().items()}
    save_file(weights, tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, weights)
    assert info.quantised == "float8_e4m3fn without scales"
    plain, _ = load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)
    assert_same(plain, {name: value.bfloat16() for name, value in weights.items()})


def test_packed_comfyui_formats_are_unchanged_and_cannot_become_plain(tmp_path):
    stored = tiny_wan()
    for layer in LAYERS:
        rows, columns = stored[f"{layer}.weight"].shape
        stored[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        stored[f"{layer}.weight_scale"] = torch.zeros(rows, columns // 16).to(torch.float8_e4m3fn)
        stored[f"{layer}.weight_scale_2"] = torch.ones(())
        stored[f"{layer}.comfy_quant"] = comfy_quant("nvfp4")
    save_file(stored, tmp_path / "x.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "x.safetensors")
    assert_same(loaded, stored)
    assert "nvfp4" in info.quantised
    with pytest.raises(CheckpointError, match=r"packed as nvfp4; load the file in ComfyUI"):
        load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)


@pytest.mark.parametrize(
    ("changes", "metadata", "expected"),
    [
        (
            {"weight": torch.zeros(192, 64, dtype=torch.uint8), "weight_scale": torch.zeros(192, 8)},
            {},
            r"blocks\.0\.ffn\.0\.weight has shape \(192, 64\)",
        ),
        ({"weight_scale": torch.ones(2, 1)}, {}, r"scales of shape \(2, 1\); use a file with one scale per row"),
        ({}, {"_quantization_metadata": "broken"}, "_quantization_metadata is not readable"),
    ],
)
def test_packed_weights_block_scales_and_broken_metadata_are_refused(tmp_path, changes, metadata, expected):
    stored, _ = quantised(tiny_wan(), "weight_scale", "row")
    stored |= {f"blocks.0.ffn.0.{leaf}": tensor for leaf, tensor in changes.items()}
    save_file(stored, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=expected):
        load_dit_state_dict(tmp_path / "x.safetensors")
