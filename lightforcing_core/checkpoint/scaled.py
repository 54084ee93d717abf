"""Quantised weights: recognise their format and convert them to plain ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.json import mapping, read_json, read_object
from .files import name_list
from .layouts import FILE_SCALE, SCALE_NAMES

LAYER_FORMATS = "_quantization_metadata"  # the metadata entry {"layers": {layer: {"format": name}}} of ComfyUI
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Format name in files saved from a model in the loader's weight dtype fp8_rowwise: float8_e4m3fn with [N, 1] scales.
# ComfyUI's own loaders do not know the format, and name it when they refuse it.
BY_ROWS = "fp8_rowwise of Light Forcing Model Loader"
MOST_MARKER = 10_000  # bytes of a layer's `comfy_quant`
# ComfyUI formats whose weight is value · scale; the others pack or rotate their values.
_PLAIN_SCALED = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", BY_ROWS)


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a state dict.

    title: a description for users.
    comfyui_layers: layer → format name, for layers that ComfyUI's loader recognises by their keys or the metadata.
    other_layers: layers with a scale that ComfyUI does not recognise (LightX2V: fp8 or int8 with [N, 1] scales).
    """

    title: str
    comfyui_layers: Mapping[str, str]
    other_layers: tuple[str, ...]


def read_quantisation(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Quantisation | None:
    """The quantisation of `state_dict` (original names, in the metadata too); None if its weights are plain."""
    comfyui: dict[str, str] = {}
    in_metadata = mapping(read_object(metadata.get(LAYER_FORMATS, "")).get("layers"))
    other = []
    for name, value in state_dict.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            comfyui[layer] = _marked_format(name, value)
        elif leaf in ("weight_scale", "scale_weight") and f"{layer}.comfy_quant" not in state_dict:
            if layer in in_metadata:
                comfyui[layer] = str(in_metadata[layer].get("format", "unnamed"))
            elif FILE_SCALE in state_dict:
                comfyui[layer] = "float8_e4m3fn"
            else:
                other.append(layer)
    if comfyui:
        keys = FILE_SCALE if FILE_SCALE in state_dict else "comfy_quant"
        title = f"{name_list(set(comfyui.values()))} in ComfyUI's format ({keys}), {len(comfyui)} layers"
    elif other:
        dtypes = _dtypes(state_dict[f"{layer}.weight"] for layer in other if f"{layer}.weight" in state_dict)
        title = f"{dtypes} with a scale per row (LightX2V), {len(other)} layers; loads as bfloat16"
    elif dtypes := _dtypes(value for value in state_dict.values() if value.dtype in FP8):
        title = f"{dtypes} without scales"
    else:
        return None
    return Quantisation(title, comfyui, tuple(other))


def _marked_format(name: str, marker: Tensor) -> str:
    """The format in a layer's `comfy_quant`: a JSON object, as the bytes of its text."""
    try:
        if marker.dtype != torch.uint8 or marker.ndim != 1 or len(marker) > MOST_MARKER:
            raise ValueError(f"{marker.dtype} of shape {list(marker.shape)}")
        return str(mapping(read_json(bytes(marker.tolist()))).get("format", "unnamed"))
    except ValueError as error:
        raise ValueError(f"{name} does not name a format ({error}); download the file again") from error


def dequantise(
    state_dict: Mapping[str, Tensor], quantisation: Quantisation, *, comfyui_formats: bool
) -> dict[str, Tensor]:
    """Convert layers that ComfyUI cannot read to plain bfloat16 tensors, value · scale computed in float32.

    comfyui_formats: convert layers in ComfyUI's formats and fp8 weights without a scale too.

    Raises ValueError, which names the layer, if the values are packed in a way that only ComfyUI can undo.
    """
    plain = dict(state_dict)
    layers = [*quantisation.other_layers, *(quantisation.comfyui_layers if comfyui_formats else ())]
    for layer in layers:
        kind = quantisation.comfyui_layers.get(layer, "float8_e4m3fn")
        weight = plain.get(f"{layer}.weight")
        scale = plain.get(f"{layer}.weight_scale", plain.get(f"{layer}.scale_weight"))
        if kind not in _PLAIN_SCALED or weight is None or scale is None or weight.dtype == torch.uint8:
            raise ValueError(f"{layer} is packed as {kind}; load the file in ComfyUI, which alone reads that format")
        if weight.ndim != 2 or scale.numel() not in (1, len(weight)):
            raise ValueError(
                f"{layer}.weight {tuple(weight.shape)} has scales of shape {tuple(scale.shape)}; "
                "use a file with one scale per row or per tensor"
            )
        plain[f"{layer}.weight"] = (weight.float() * scale.float().reshape(-1, 1)).bfloat16()
        for leaf in SCALE_NAMES:
            plain.pop(f"{layer}.{leaf}", None)
    if comfyui_formats:
        plain.pop(FILE_SCALE, None)
        plain = {name: value.bfloat16() if value.dtype in FP8 else value for name, value in plain.items()}
    return plain


def is_scale(name: str) -> bool:
    """Whether `name` is that of a scale or marker of quantised weights."""
    return name == FILE_SCALE or name.rpartition(".")[2] in SCALE_NAMES


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
