"""Quantised weights: recognise their format, and convert those that ComfyUI cannot read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..files.json import mapping, read_json
from .files import name_list
from .layouts import ATTENTION_MARK, FILE_SCALE, SCALE_NAMES

LAYER_FORMATS = "_quantization_metadata"  # the metadata entry {"layers": {layer: {"format": name}}} of ComfyUI
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Format of the loader's weight dtype fp8_rowwise: float8_e4m3fn with [N, 1] scales. ComfyUI's own loaders do not know
# the format, and name it when they refuse it.
BY_ROWS = "fp8_rowwise of Light Forcing Model Loader"
MOST_MARKER = 10_000  # bytes of a layer's `comfy_quant`
# Formats whose weight is value · scale; the others pack or rotate their values.
_PLAIN_SCALED = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "bfloat16", BY_ROWS)


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a state dict, with a title for users, "" for plain weights.

    comfyui_layers: layer → format name, for layers that ComfyUI's loader recognises by their keys.
    other_layers: layer → the format to convert it to, for layers that ComfyUI does not recognise (LightX2V) or reads
        wrongly (`scaled_fp8` of float8_e5m2, or with a scale per row).
    """

    title: str
    comfyui_layers: Mapping[str, str]
    other_layers: Mapping[str, str]


def read_quantisation(state_dict: Mapping[str, Tensor]) -> Quantisation:
    """The quantisation of `state_dict`, with original names."""
    marks = {name: value for name, value in state_dict.items() if name.endswith(".comfy_quant")}
    comfyui = {name.removesuffix(".comfy_quant"): marked_format(name, value) for name, value in marks.items()}
    for layer, kind in comfyui.items():
        scales = {f"{layer}.weight_scale", f"{layer}.scale_weight"}
        if kind in _PLAIN_SCALED and f"{layer}.weight" in state_dict and not scales & state_dict.keys():
            raise ValueError(f"{layer} is marked as {kind} but has no scale; download the file again")
    other: dict[str, str] = {}
    for name, scale in state_dict.items():
        layer, _, leaf = name.rpartition(".")
        weight = state_dict.get(f"{layer}.weight")
        if leaf not in ("weight_scale", "scale_weight") or layer in comfyui or weight is None:
            continue
        if FILE_SCALE in state_dict and weight.dtype == torch.float8_e4m3fn and scale.numel() == 1:
            comfyui[layer] = "float8_e4m3fn"
        elif weight.dtype == torch.uint8 and {f"{layer}.weight_global_scale", f"{layer}.alpha"} & state_dict.keys():
            other[layer] = "nvfp4"
        elif weight.dtype == torch.float8_e4m3fn and not any(size % 16 for size in weight.shape):  # as FP8 units need
            other[layer] = BY_ROWS
        else:
            other[layer] = "int8_tensorwise" if weight.dtype == torch.int8 else "bfloat16"
    titles = []
    if comfyui:
        titles.append(f"{name_list(set(comfyui.values()))} in ComfyUI's format, {len(comfyui)} layers")
    if other:
        dtypes = _dtypes(state_dict[f"{layer}.weight"] for layer in other)
        titles.append(f"{dtypes} with scales (LightX2V), {len(other)} layers; read as {name_list(set(other.values()))}")
    elif not comfyui and (dtypes := _dtypes(value for value in state_dict.values() if value.dtype in FP8)):
        titles.append(f"{dtypes} without scales")
    return Quantisation("; ".join(titles), comfyui, other)


def convert(state_dict: Mapping[str, Tensor], quantisation: Quantisation, *, plain: bool) -> dict[str, Tensor]:
    """Convert layers that ComfyUI cannot read to the formats that `quantisation` names.

    plain: convert all layers, and fp8 weights without a scale, to bfloat16 (value · scale, computed in float32).

    Raises ValueError, which names the layer, if its tensors do not fit, or only ComfyUI can unpack them.
    """
    converted = dict(state_dict)
    for layer, kind in {**quantisation.other_layers, **(quantisation.comfyui_layers if plain else {})}.items():
        leaves = [leaf for leaf in ("weight", *SCALE_NAMES) if f"{layer}.{leaf}" in converted]
        parts = {leaf: converted.pop(f"{layer}.{leaf}") for leaf in leaves}
        made = _nvfp4(layer, parts) if kind == "nvfp4" and not plain else _by_rows(layer, parts, kind, plain)
        converted |= {f"{layer}.{leaf}": tensor for leaf, tensor in made.items()}
    if not plain:
        return converted
    kept = {name: value for name, value in converted.items() if not is_scale(name)}
    return {name: value.bfloat16() if value.dtype in FP8 else value for name, value in kept.items()}


def format_mark(name: str) -> Tensor:
    """The value of a layer's `comfy_quant`, which names the format of its weight."""
    return mark_of({"format": name})


def mark_of(entry: Any) -> Tensor:
    """A layer's JSON object as its `comfy_quant`; ValueError if it names no format."""
    format_in(entry)
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def is_scale(name: str) -> bool:
    """Whether `name` is that of a scale or a marker, not of a weight."""
    return name == FILE_SCALE or name.endswith(ATTENTION_MARK) or name.rpartition(".")[2] in SCALE_NAMES


def marked_format(name: str, marker: Tensor) -> str:
    """The format in a layer's `comfy_quant`: a JSON object, as the bytes of its text."""
    try:
        if marker.dtype != torch.uint8 or marker.ndim != 1 or len(marker) > MOST_MARKER:
            raise ValueError(f"{marker.dtype} of shape {list(marker.shape)}")
        return format_in(read_json(bytes(marker.tolist())))
    except ValueError as error:
        raise ValueError(f"{name} does not name a format ({error}); download the file again") from error


def format_in(entry: Any) -> str:
    """The format that a layer's JSON object names; ValueError for any other value."""
    fields = mapping(entry)
    if not isinstance(fields.get("format"), str):
        raise ValueError(f"{entry!r:.80} is no object with a format")
    rotated = fields.get("convrot") or mapping(fields.get("params")).get("convrot")
    return f"{fields['format']}{' with convrot' if rotated else ''}"


def _by_rows(layer: str, parts: Mapping[str, Tensor], kind: str, plain: bool) -> dict[str, Tensor]:
    """A layer that is value · scale, with a scale per row; in bfloat16 if `plain` or that is its `kind`."""
    weight, scale = parts.get("weight"), parts.get("weight_scale", parts.get("scale_weight"))
    if kind not in _PLAIN_SCALED or weight is None or scale is None or weight.dtype == torch.uint8:
        raise ValueError(f"{layer} is packed as {kind}; load the file in ComfyUI, which alone reads that format")
    if weight.ndim != 2 or scale.numel() not in (1, len(weight)):
        raise ValueError(f"{layer}.weight {tuple(weight.shape)} has scales {tuple(scale.shape)}; use the bf16 file")
    scales = scale.float().reshape(-1, 1).repeat(len(weight) // scale.numel(), 1)
    if plain or kind == "bfloat16":
        return {"weight": (weight.float() * scales).bfloat16()}
    return {"weight": weight, "weight_scale": scales, "comfy_quant": format_mark(kind)}


def _nvfp4(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LightX2V's NVFP4 in ComfyUI's: the same values, the first of two in a byte's upper half instead of its lower.

    Both have weight [N, K / 2] and a weight_scale for every 16 values, in tiles of 128 rows and 4 columns. The scales
    of the weight and of the inputs divide in LightX2V; older files have alpha, 1 / (both), instead of the first.
    """
    try:
        weight = parts["weight"]
        tiles = -(-weight.shape[0] // 128) * 128, -(-weight.shape[1] // 32) * 4
        if "weight_global_scale" in parts:
            whole = 1 / parts["weight_global_scale"].float()
        else:
            whole = parts["alpha"].float() * parts["input_global_scale"].float()
        made = {
            "weight": weight << 4 | weight >> 4,
            "weight_scale": parts["weight_scale"].view(torch.float8_e4m3fn).reshape(tiles),
            "weight_scale_2": whole.reshape(()),
            "comfy_quant": format_mark("nvfp4"),
        }
        if "input_absmax" in parts:
            made["input_scale"] = (parts["input_absmax"].float() / (6 * 448)).reshape(())  # the largest value and scale
        elif "input_global_scale" in parts:
            made["input_scale"] = (1 / parts["input_global_scale"].float()).reshape(())
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{layer} is no whole layer of LightX2V's NVFP4 ({error}); download the file again") from error
    return made


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
