"""LoRA files of every common naming, merged into a Wan state dict."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..files.json import read_json, read_text
from ..refusal import is_finite
from .files import SUFFIXES, CheckpointError, name_list, open_weights, tensor_groups
from .layouts import original_name, without_wrappers

# A layer's float32 weight, the LoRA's parts for it by name, and the strength → the new weight, None if unknown.
Adapter: TypeAlias = Callable[[Tensor, Mapping[str, Tensor], float], Tensor | None]
Tensors: TypeAlias = dict[str, Tensor]

# Layer, part, PEFT's adapter name. Kohya and diffusers say down/up, PEFT says A/B.
_KEY = re.compile(
    r"^(?P<layer>.+?)\.(?P<part>lora_(?:A|B|down|up|magnitude_vector)|alpha|diff|diff_[bm]|[wb]_norm"
    r"|(?:hada|lokr|oft)_\w+|dora_scale|rescale)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$"
)
_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up", "w_norm": "diff", "b_norm": "diff_b", "diff_m": "diff"}
_OTHER_KINDS = {"lora_m": "DoRA", "dora_s": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "rescale": "BOFT"}


class _Unfit(ValueError):
    """Why a layer is left out."""


def looks_like_lora(names: Mapping[str, object]) -> bool:
    return any((match := _match(name)) and match["part"] not in ("alpha", "rescale") for name in names)


def merge_lora(
    state_dict: Mapping[str, Tensor], path: str | Path, strength: float = 1.0, adapter: Adapter | None = None
) -> tuple[Tensors, list[str]]:
    """Add a LoRA to a Wan state dict with original names: W' = W + strength · (alpha / rank) · up · down.

    Computed in float32 and cast back to each weight's dtype. alpha is stored with the pair, in diffusers' metadata or
    in PEFT's adapter_config.json; otherwise the scale is 1. Supported: LongLive's `generator_lora` container, the names
    of PEFT, ComfyUI, diffusers and Kohya, and differences of whole weights, biases and modulations. adapter: merges
    other kinds, such as LoKr.

    Returns the new dict, which shares all unchanged tensors, and notes for the user; they name the layers that do not
    fit and are left out. Raises CheckpointError if none fits, or if the file is damaged.
    """
    path = Path(path)
    layers, left, note = _read(path, state_dict)
    merged, count = dict(state_dict), 0
    for layer, parts in layers.items():
        try:
            for name, weight in _changed(layer, parts, state_dict, strength, adapter).items():
                merged[name] = weight.to(state_dict[name].dtype)  # which may overflow
                if not is_finite(merged[name].float()):
                    raise ValueError(f"makes {name} NaN or infinite")
                count += 1
        except _Unfit as reason:
            left[str(reason)].append(layer)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; the LoRA or the model is damaged, download it again") from error
    reasons = [f"{len(names)} {reason} ({name_list(names)})" for reason, names in left.items()]
    if not count:
        raise CheckpointError(f"{path}: no layer of this LoRA fits: {'; '.join(reasons)}; choose a LoRA for this model")
    note = f"LoRA {path.name} added to {count} weights, strength {strength:g}{note}"
    return merged, [note, *(f"LoRA {path.name}, left out: {reason}" for reason in reasons)]


def _match(key: str) -> re.Match[str] | None:
    return _KEY.match(re.sub(r"[._]lora(?:_linear_layer)?\.(down|up)\.", r".lora_\1.", without_wrappers(key)))


def _read(path: Path, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensors], dict[str, list[str]], str]:
    """The LoRA by layer of the model and part, the keys to leave out by reason, and a note on alpha."""
    contents, metadata, _ = open_weights(path)
    stored = tensor_groups(contents)
    groups = {name: group for name, group in stored.items() if looks_like_lora(group)}
    if not groups:
        raise CheckpointError(f"{path}: not a LoRA (no lora_A/lora_B, lora_down/lora_up or diff); choose a LoRA")
    groups = {name: group for name, group in groups.items() if "critic" not in name} or groups
    if len(groups) > 1 and "generator_lora" not in groups:
        raise CheckpointError(f"{path}: contains several LoRAs ({name_list(groups)}); save one of them as its own file")
    known = {name: name for name in {name.rpartition(".")[0] for name in state_dict} | set(state_dict)}
    known |= {f"lora_unet_{layer.replace('.', '_')}": layer for layer in known}  # Kohya's names
    layers: dict[str, Tensors] = defaultdict(dict)
    left, adapters, names = defaultdict(list), set(), {}
    for key, tensor in (groups.get("generator_lora") or next(iter(groups.values()))).items():
        match = _match(key)
        layer = match and _layer_of(match["layer"], known)
        if not match or not layer:
            left["keys match nothing in this model"].append(key)
            continue
        if match["part"] == "diff_m" and layer not in state_dict:
            layer += ".modulation"
        layers[layer][_PARTS.get(match["part"], match["part"])] = tensor
        names[layer] = match["layer"]
        adapters.add(match["adapter"])
    if len(several := adapters - {None}) > 1:
        raise CheckpointError(f"{path}: contains several adapters ({name_list(several)}); save one as its own file")
    return layers, left, _add_alphas(path, metadata, layers, names)


def _layer_of(name: str, known: Mapping[str, str]) -> str | None:
    """The layer in `known` that `name` ends with, in Kohya's, Wan's or diffusers' naming; None if there is none."""
    if name.startswith("lora_unet_"):  # Wan Fun has two underscores, and some files keep dots
        return known.get(name.replace("lora_unet__", "lora_unet_").replace(".", "_"))
    parts = name.split(".")[-6:]  # the longest layer has five; a file may have names of hundreds
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        for candidate in (name, original_name(name, diffusers=True)):
            if candidate in known:
                return candidate
    return None


def _add_alphas(path: Path, metadata: Mapping[str, str], layers: Mapping[str, Tensors], names: dict[str, str]) -> str:
    """Add alpha from diffusers' metadata or PEFT's file to pairs without one; returns a note if there are any.

    names: layer → its name in the LoRA.
    """
    if all("alpha" in parts for parts in layers.values() if "lora_down" in parts):
        return ""
    text, source, note = metadata.get("lora_adapter_metadata"), "the metadata", ""
    try:
        if text is None:
            source = "adapter_config.json"
            folder = path if path.is_dir() else path.parent
            others = [file for file in folder.glob("*") if file.suffix in SUFFIXES and file != path]
            if others and path != folder and path.stem != "adapter_model":
                return f", {source} ignored, as it can be of another file" if (folder / source).exists() else ""
            text = read_text(folder / source)
        settings = {key.removeprefix("transformer."): value for key, value in read_json(text).items()}
        usual = float(settings["lora_alpha"])
        own = {f".{name}": float(alpha) for name, alpha in (settings.get("alpha_pattern") or {}).items()}
        ranks = {int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())}
    except (FileNotFoundError, KeyError):  # none, or of another kind
        return ""
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {source} is not readable ({error!s:.120}); download it again") from error
    for layer, parts in layers.items():
        rank = parts["lora_down"].shape[:1] if "lora_down" in parts else torch.Size()
        if "alpha" not in parts and ranks.intersection(rank):
            alpha = next((alpha for end, alpha in own.items() if f".{names[layer]}".endswith(end)), usual)
            parts["alpha"] = torch.tensor(alpha * rank[0] ** 0.5 if settings.get("use_rslora") else alpha)
            note = f", alpha from {source}"
    return note


def _changed(
    layer: str, parts: Tensors, weights: Mapping[str, Tensor], strength: float, adapter: Adapter | None
) -> Tensors:
    """Name → new float32 value of each of the layer's weights. Sizes are compared before anything is copied."""
    own = layer if layer in weights else f"{layer}.weight"
    changed: Tensors = {}

    def old(name: str, *shape: int) -> Tensor:
        weight = weights.get(name)
        if weight is None or (shape[:1], prod(shape)) != (weight.shape[:1], weight.numel()):
            raise _Unfit("do not have the model's size")
        return changed.get(name, weight.float())

    if kinds := {kind for start, kind in _OTHER_KINDS.items() if any(part.startswith(start) for part in parts)}:
        if adapter is not None and own in weights and _is_bounded(parts, weights[own]):
            made = adapter(weights[own].float(), parts, strength)
            if made is not None:
                return {own: made}
        raise _Unfit(f"are {' with '.join(sorted(kinds))}, which cannot be merged here")
    if "lora_down" in parts or "lora_up" in parts:
        if not {"lora_down", "lora_up"} <= parts.keys():
            raise ValueError(f"{layer} has only one matrix of its pair")
        down, up, alpha = parts["lora_down"], parts["lora_up"], parts.get("alpha")
        rank = down.shape[0] if min(down.ndim, up.ndim) > 1 else 0
        if not 0 < rank == prod(up.shape[1:]) or (alpha is not None and alpha.numel() != 1):
            raise ValueError(f"the matrices of {layer} are no pair (up {tuple(up.shape)}, down {tuple(down.shape)})")
        weight = old(own, up.shape[0], *down.shape[1:])
        scale = 1.0 if alpha is None else alpha.float().item() / rank
        product = scale * (up.float().flatten(1) @ down.float().flatten(1))
        changed[own] = weight + strength * product.reshape(weight.shape)
    for part, name in (("diff", own), ("diff_b", f"{layer}.bias")):
        if part in parts:
            weight = old(name, *parts[part].shape)
            changed[name] = weight + strength * parts[part].float().reshape(weight.shape)
    return changed


def _is_bounded(parts: Tensors, weight: Tensor) -> bool:
    """Whether no product of these parts is larger than the weight, or its larger side squared."""
    size = (weight.shape[0], prod(weight.shape[1:]))
    rows = prod(prod(part.shape[:1]) for name, part in parts.items() if re.match(r"lokr_\w+(?<!_b)$", name))
    columns = prod(prod(part.shape[1:]) for name, part in parts.items() if re.match(r"lokr_\w+(?<!_a)$", name))
    return (rows, columns) in (size, (1, 1)) and all(max(part.shape, default=1) <= max(size) for part in parts.values())
