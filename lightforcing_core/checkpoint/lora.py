"""LoRA files of every common naming, merged into a Wan state dict."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .files import CheckpointError, name_list, open_weights, tensor_groups
from .layouts import original_name, without_wrappers

# Layer, part, PEFT's adapter name. Kohya and diffusers say down/up, PEFT says A/B.
_KEY = re.compile(
    r"^(?P<layer>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha|diff_b|diff|dora_scale|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$"
)
_PARTS = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}


def looks_like_lora(names: Mapping[str, object]) -> bool:
    """Whether any of these weights belongs to a low-rank pair."""
    return any((match := _KEY.match(name)) and match["part"] in _PARTS for name in names)


def merge_lora(
    state_dict: Mapping[str, Tensor], path: str | Path, strength: float = 1.0
) -> tuple[dict[str, Tensor], str]:
    """Add a LoRA to a Wan state dict with original names: W' = W + strength · (alpha / rank) · up · down.

    Computed in float32 and cast back to each weight's dtype; without a stored alpha the scale is 1 (LongLive: rank
    256, alpha 256). Supported: LongLive's `generator_lora` container, PEFT (`base_model.model.…lora_A/lora_B`, with or
    without an adapter name), `diffusion_model.…lora_down/lora_up`, diffusers and Kohya names, and full differences
    (`.diff`, `.diff_b`). Returns the new dict, which shares all unchanged tensors, and a note for the user. Raises
    CheckpointError if a layer or shape does not match the model.
    """
    path = Path(path)
    layers = _by_layer(path, _read(path), state_dict)
    merged = dict(state_dict)
    for layer, parts in layers.items():
        for name, delta in _deltas(path, layer, parts).items():
            weight = merged.get(name)
            if weight is None or weight.numel() != delta.numel() or weight.shape[0] != delta.shape[0]:
                own = "no such weight" if weight is None else f"{tuple(weight.shape)}"
                raise CheckpointError(
                    f"{path}: changes {name} by {tuple(delta.shape)}, but the model has {own}; "
                    "the LoRA is for a model of another size"
                )
            merged[name] = (weight.float() + strength * delta.reshape(weight.shape)).to(weight.dtype)
    ranks = sorted({str(parts["down"].shape[0]) for parts in layers.values() if "down" in parts})
    rank = f", rank {', '.join(ranks)}" if ranks else ""
    return merged, f"LoRA {path.name} added: {len(layers)} layers{rank}, strength {strength:g}"


def _read(path: Path) -> dict[str, Tensor]:
    stored = tensor_groups(open_weights(path)[0])
    groups = {name: group for name, group in stored.items() if looks_like_lora(group)}
    if not groups:
        raise CheckpointError(
            f"{path}: not a LoRA (no lora_A/lora_B or lora_down/lora_up weights); a model is loaded as the model itself"
        )
    groups = {name: group for name, group in groups.items() if "critic" not in name} or groups
    if len(groups) > 1 and "generator_lora" not in groups:
        raise CheckpointError(f"{path}: contains several LoRAs ({name_list(groups)}); save one of them as its own file")
    return groups.get("generator_lora") or next(iter(groups.values()))


def _by_layer(
    path: Path, stored: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The LoRA's tensors by layer of the model: layer → part ("down", "up", "alpha", …) → tensor."""
    known = {name.rpartition(".")[0] for name in state_dict} | set(state_dict)
    underscored = {f"lora_unet_{layer.replace('.', '_')}": layer for layer in known}  # Kohya's names
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    adapters = set()
    unknown = []
    for key, tensor in stored.items():
        match = _KEY.match(without_wrappers(key))
        layer = underscored.get(match["layer"]) or _layer_of(match["layer"], known) if match else None
        if match is None or layer is None:
            unknown.append(key)
            continue
        adapters.add(match["adapter"])
        layers[layer][_PARTS.get(match["part"], match["part"])] = tensor
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} of its {len(stored)} weights match no layer of this model "
            f"({name_list(unknown)}); the LoRA is for another model"
        )
    if len(names := adapters - {None}) > 1:
        raise CheckpointError(f"{path}: contains several adapters ({name_list(names)}); save one as its own file")
    return dict(layers)


def _layer_of(name: str, known: set[str]) -> str | None:
    """The layer in `known` that `name` ends with, in Wan's or diffusers' naming; None if there is none."""
    while name:
        for candidate in (name, original_name(name, diffusers=True)):
            if candidate in known:
                return candidate
        name = name.partition(".")[2]
    return None


def _deltas(path: Path, layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight name → the change at strength 1, float32 [rows, columns]."""
    if unknown := parts.keys() & {"dora_scale", "lora_magnitude_vector"}:
        raise CheckpointError(
            f"{path}: {layer} has {name_list(unknown)}; DoRA is not supported, merge it into the model first"
        )
    deltas = {}
    if "down" in parts or "up" in parts:
        if not {"down", "up"} <= parts.keys():
            raise CheckpointError(f"{path}: {layer} has only one matrix of its pair; download the file again")
        down, up = parts["down"].float().flatten(1), parts["up"].float().flatten(1)
        if up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{path}: the ranks of {layer} differ: up {tuple(up.shape)}, down {tuple(down.shape)}; "
                "download the file again"
            )
        scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        deltas[f"{layer}.weight"] = scale * (up @ down)
    if "diff" in parts:
        name = layer if layer.endswith("modulation") else f"{layer}.weight"
        deltas[name] = deltas.get(name, 0) + parts["diff"].float()
    if "diff_b" in parts:
        deltas[f"{layer}.bias"] = parts["diff_b"].float()
    return deltas
