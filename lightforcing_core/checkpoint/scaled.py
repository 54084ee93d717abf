"""Weights stored small with a scale beside them: whose format they are in, and how to get plain ones back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import FILE_SCALE, SCALE_NAMES

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What a file says of its layers that was saved from a model in the loader's weight dtype fp8_rowwise: [N, 1] scales
# beside float8_e4m3fn. ComfyUI's own loaders know no such format and refuse it by this name.
BY_ROWS = "fp8_rowwise of Light Forcing Model Loader"
# Formats in ComfyUI's keys whose weight is simply value · scale; the others pack or rotate their values.
_PLAIN_SCALED = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", BY_ROWS)


@dataclass(frozen=True)
class Quantisation:
    """How a state dict is quantised.

    `title` is for people. `host_layers` are in a format that ComfyUI's loader reads from the keys themselves or from
    the file's metadata, layer → format name; `bare_layers` carry a scale that no loader of the host announces
    (LightX2V: [N, 1] beside an fp8 or int8 weight). `unscaled` says that weights were only cast to fp8.
    """

    title: str
    host_layers: Mapping[str, str]
    bare_layers: tuple[str, ...]
    unscaled: bool


def read_quantisation(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Quantisation | None:
    """How `state_dict` (original names) is quantised; None where its weights are plain."""
    host: dict[str, str] = {}
    announced = _announced(metadata)
    bare = []
    for name, value in state_dict.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            host[layer] = str(json.loads(bytes(value.tolist())).get("format", "unnamed"))
        elif leaf in ("weight_scale", "scale_weight") and f"{layer}.comfy_quant" not in state_dict:
            if layer in announced:
                host[layer] = announced[layer]
            elif FILE_SCALE in state_dict:
                host[layer] = "float8_e4m3fn"
            else:
                bare.append(layer)
    scaled = {*host, *bare}
    unscaled = any(
        value.dtype in FP8 and name.removesuffix(".weight") not in scaled for name, value in state_dict.items()
    )
    unscaled = unscaled and not scaled
    if not scaled and not unscaled:
        return None
    if host:
        keys = FILE_SCALE if FILE_SCALE in state_dict else "comfy_quant"
        title = f"{', '.join(sorted(set(host.values())))} in ComfyUI's format ({keys}), {len(host)} layers"
    elif bare:
        kinds = sorted(
            {_short(state_dict[f"{layer}.weight"].dtype) for layer in bare if f"{layer}.weight" in state_dict}
        )
        title = f"{', '.join(kinds)} with a scale per row (LightX2V), {len(bare)} layers; loads as bfloat16"
    else:
        kinds = sorted({_short(value.dtype) for value in state_dict.values() if value.dtype in FP8})
        title = f"{', '.join(kinds)} without scales"
    return Quantisation(title, host, tuple(bare), unscaled)


def dequantise(
    state_dict: Mapping[str, Tensor],
    quantisation: Quantisation,
    *,
    host_formats: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The same weights with `bare_layers` as plain `dtype` tensors, value · scale computed in float32.

    With `host_formats` also those in ComfyUI's formats and fp8 weights without a scale. Raises ValueError naming
    the layer where the values are packed in a way that only ComfyUI undoes.
    """
    plain = dict(state_dict)
    layers = [*quantisation.bare_layers, *(quantisation.host_layers if host_formats else ())]
    for layer in layers:
        kind = quantisation.host_layers.get(layer, "float8_e4m3fn")
        weight = plain.get(f"{layer}.weight")
        scale = plain.get(f"{layer}.weight_scale", plain.get(f"{layer}.scale_weight"))
        if kind not in _PLAIN_SCALED or weight is None or scale is None or weight.dtype == torch.uint8:
            raise ValueError(f"{layer} is packed as {kind}, which only ComfyUI's own loader reads")
        if scale.numel() not in (1, weight.shape[0]):
            raise ValueError(
                f"{layer}.weight {tuple(weight.shape)} has scales of shape {tuple(scale.shape)}; "
                "one scale per row or per tensor is understood"
            )
        plain[f"{layer}.weight"] = (weight.float() * scale.float().reshape(-1, 1)).to(dtype)
        for leaf in SCALE_NAMES:
            plain.pop(f"{layer}.{leaf}", None)
    if host_formats:
        plain.pop(FILE_SCALE, None)
        plain = {name: value.to(dtype) if value.dtype in FP8 else value for name, value in plain.items()}
    return plain


def is_scale(name: str) -> bool:
    """Whether a weight's name is that of a quantisation's scale or marker."""
    return name == FILE_SCALE or name.rpartition(".")[2] in SCALE_NAMES


def _announced(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {layer: str(entry.get("format", "unnamed")) for layer, entry in layers.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError("its _quantization_metadata is not readable") from error


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
