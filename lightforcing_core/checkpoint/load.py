"""Load autoregressive Wan 2.1 checkpoints of every published layout as one state dict."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..families import FAMILIES, Family, doubt_of, family_of
from ..files.json import mapping, read_json, read_object
from ..model.wan import HEAD_DIM, Wan
from .files import CheckpointError, name_list, naming, open_weights, tensor_groups
from .layouts import Layout, Shape, original_name, other_file, other_wan, read_layout
from .lora import Adapter, looks_like_lora, merge_lora
from .scaled import LAYER_FORMATS, Quantisation, convert, is_scale, mark_of, read_quantisation

MOST_LAYERS = 1000
_PUBLISHED = {1536: ("1.3B", 30), 5120: ("14B", 40)}  # dim → name and layers
# Names of the generator's weights, with EMA and without.
_EMA = ("generator_ema", "model_ema", "ema")
_PLAIN = ("generator", "model", "state_dict", "module")
# Weights for training, and LoRAs.
_NOT_THE_MODEL = re.compile(r"critic|discriminator|optimizer|scheduler|real_score|fake_score|teacher|lora")
_PLAIN_WAN = re.compile(r"wan[-_. ]?2[._]1.*t2v|^diffusion_pytorch_model")
_WAN_22 = re.compile(r"wan[-_. ]?2[._]2|(high|low)[-_]?noise")


@dataclass(frozen=True)
class WanSize:
    """The sizes of a Wan transformer. parameters: without the scales of quantised weights."""

    dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    parameters: int


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts about a checkpoint, without its tensors.

    weights: the set of weights that is loaded, "generator_ema" for example; "" if the file has only one.
    other_weights: sets that could be loaded instead.
    layout, quantised, notes: texts for the user; quantised is None without a quantisation.
    dtypes: stored dtypes, the most frequent first.
    file_bytes: the size of all shards.
    metadata: of the safetensors header, without the formats of layers.
    """

    path: Path
    weights: str
    other_weights: tuple[str, ...]
    layout: str
    family: Family
    size: WanSize
    dtypes: tuple[str, ...]
    file_bytes: int
    quantised: str | None
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def causal_metadata(self) -> bool:
        """Whether the metadata `config` is {"transformer": {"causal_ar": true}}, ComfyUI's mark of AR models."""
        return bool(mapping(read_object(self.metadata.get("config", "")).get("transformer")).get("causal_ar"))


def load_dit_state_dict(
    path: str | Path,
    *,
    prefer_ema: bool = True,
    weights: str | None = None,
    family: Family | None = None,
    lora: str | Path | None = None,
    lora_strength: float = 1.0,
    lora_adapter: Adapter | None = None,
    dequantise_all: bool = False,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Load a checkpoint of any published layout as one state dict.

    path: see `open_weights`.
    prefer_ema: if the file has several sets of weights, load the EMA unless the family is published to run without it
        (LongLive, MemFlow, One-Forcing, Causal Forcing chunk by chunk); False loads the plain weights.
    weights: the set to load, "generator_ema" for example, or "ema" for any; None chooses by `prefer_ema`.
    family: None reads it from the path.
    lora, lora_strength, lora_adapter: a LoRA to merge into the weights, see `merge_lora`.
    dequantise_all: for use without ComfyUI, convert quantised weights to bfloat16.

    Returns Wan's original names → memory-mapped tensors on the CPU. ComfyUI's quantised formats keep their keys, which
    ComfyUI reads; layers whose format the metadata names, and other weights with scales (LightX2V fp8, int8 and NVFP4),
    get such keys without loss, or become bfloat16 if no format fits or a LoRA is merged. Raises CheckpointError.
    """
    state_dict, info, quantisation = _read(Path(path), prefer_ema, weights, family)
    if lora is not None and quantisation.comfyui_layers and not dequantise_all:
        raise CheckpointError(
            f"{path}: is quantised ({info.quantised}), so a LoRA cannot be merged into it; "
            "add the LoRA with ComfyUI's LoRA loader, or use the bf16 file"
        )
    with naming(path):
        state_dict = convert(state_dict, quantisation, plain=dequantise_all or lora is not None)
    if lora is not None:
        state_dict, notes = merge_lora(state_dict, lora, lora_strength, lora_adapter)
        info = replace(info, notes=(*info.notes, *notes))
    return state_dict, info


def inspect_checkpoint(path: str | Path, *, weights: str | None = None) -> CheckpointInfo:
    """Describe what `load_dit_state_dict` would load, without reading weights; raises the same errors."""
    return _read(Path(path), True, weights, None)[1]


def describe(info: CheckpointInfo) -> list[tuple[str, str]]:
    """Rows (label, value) of a table about a checkpoint, with one "note" row per note."""
    family = info.family
    chunk = f"{family.frames_per_chunk} latent frame{'s' if family.frames_per_chunk > 1 else ''}"
    if family.id == "unknown":
        chunk = f"not stored in the file; {chunk} by default"
    window = f"{family.window} latent frames, {family.sink_frames} of them sinks" if family.window else "all frames"
    others = f" (other sets: {', '.join(info.other_weights)})" if info.other_weights else ""
    size = info.size
    name, _ = _PUBLISHED.get(size.dim, ("of another size", 0))
    heads = f"{size.dim // HEAD_DIM} heads of {HEAD_DIM}"
    return [
        ("file", str(info.path)),
        ("size", f"{info.file_bytes / 1e9:.2f} GB"),
        ("family", f"{family.title} (read from the name)" if family.id != "unknown" else family.title),
        ("model", f"Wan 2.1 T2V {name}, {size.parameters:,} parameters"),
        ("dimensions", f"dim {size.dim}, ffn {size.ffn_dim}, {size.layers} layers, {heads}"),
        ("stored as", f"{', '.join(info.dtypes)}; {info.quantised or 'not quantised'}"),
        ("keys", info.layout),
        ("loads", (info.weights or "the only set of weights") + others),
        ("chunk", chunk),
        ("window", window),
        *(("note", note) for note in info.notes),
    ]


def _read(
    path: Path, prefer_ema: bool, weights: str | None, family: Family | None
) -> tuple[dict[str, Tensor], CheckpointInfo, Quantisation]:
    contents, metadata, file_bytes = open_weights(path)
    source = ""
    if family is None:
        family, source = family_of(path)
    with naming(path):
        group, stored, others = _choose_weights(tensor_groups(contents), family, prefer_ema, weights)
        layout = read_layout(stored)
        if layout is None or not any(name.endswith("modulation") for name in layout.stored):
            raise ValueError(f"{other_file(stored)}; choose an autoregressive Wan 2.1 text-to-video checkpoint")
        found = {name: stored[key] for name, key in layout.stored.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if reason := other_wan(shapes):
            raise ValueError(reason)
        found = _stated_marks(metadata.pop(LAYER_FORMATS, "{}"), layout) | found  # a layer's own mark counts first
        quantisation = read_quantisation(found)
        for name in (f"{layer}.weight" for layer, kind in quantisation.other_layers.items() if kind == "nvfp4"):
            shapes[name] = (*shapes[name][:-1], *(2 * size for size in shapes[name][-1:]))  # two values in a byte
        expected = _expected_shapes(shapes, metadata)
        _check_complete(shapes, expected, quantisation.comfyui_layers, others)

    dtypes = Counter(str(found[name].dtype).removeprefix("torch.") for name in expected)
    info = CheckpointInfo(
        path=path,
        weights=group,
        other_weights=others,
        layout=layout.title,
        family=family,
        size=WanSize(
            dim=expected["head.modulation"][-1],
            ffn_dim=expected["blocks.0.ffn.0.weight"][0],
            layers=sum(name.endswith("self_attn.q.weight") for name in expected),
            text_dim=expected["text_embedding.0.weight"][1],
            parameters=sum(map(prod, expected.values())),
        ),
        dtypes=tuple(name for name, _ in dtypes.most_common()),
        file_bytes=file_bytes,
        quantised=quantisation.title or None,
        metadata=metadata,
    )
    unknown = [name for name in found if name not in expected and not is_scale(name)]
    skipped = [*unknown, *(key for key in layout.extra if original_name(key) is not None)]
    notes = (
        doubt_of(path, family) if source else None,
        f"family read from the folder name {source}" if source not in ("", path.name) else None,
        *_notes(info),
        f"{len(skipped)} weights that do not belong to Wan are skipped: {name_list(skipped)}" if skipped else None,
    )
    state_dict = {name: found[name] for name in (*expected, *filter(is_scale, found))}
    return state_dict, replace(info, notes=tuple(filter(None, notes))), quantisation


def _choose_weights(
    groups: Mapping[str, dict[str, Tensor]], family: Family, prefer_ema: bool, weights: str | None
) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The set of weights to load: (name, tensors, names of the other sets)."""
    loras = {name for name, group in groups.items() if looks_like_lora(group)}
    models = {name: group for name, group in groups.items() if not _NOT_THE_MODEL.search(name) and name not in loras}
    if not models and loras:
        raise ValueError(
            "this is a LoRA, not a model; load the model that it is for and pass this file as lora= "
            "(in ComfyUI: with the LoRA loader)"
        )
    if not models:
        raise ValueError(
            f"contains no weights of a model{f', only {name_list(groups)}' if groups else ''}; choose another file"
        )
    if weights is not None:
        found = [weights] if weights in models else [name for name in models if weights == "ema" and "ema" in name]
        if not found:
            held = name_list(repr(name) if name else "one set without a name" for name in models)
            raise ValueError(f"has no weights named {weights!r}, but {held}; choose that, or auto")
    else:
        order = (*_EMA, *_PLAIN) if prefer_ema and family.weights != "generator" else (*_PLAIN, *_EMA)
        found = [name for wanted in order for name in models if wanted in name.split(".")]
        if not found and len(models) > 1:
            raise ValueError(f"has several sets of weights, {name_list(models)}; choose one with weights=")
    chosen = next(iter(found or models))
    return chosen, models[chosen], tuple(name for name in models if name != chosen)


def _stated_marks(formats: str, layout: Layout) -> dict[str, Tensor]:
    """The mark of each layer in the metadata's formats, {"layers": {layer: {"format": name}}}, under Wan's names."""
    try:
        layers = read_json(formats).get("layers", {})
        marks = {
            original_name(layer, layout.prefix, layout.diffusers): mark_of(entry) for layer, entry in layers.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its {LAYER_FORMATS} is not readable ({error!s:.80}); download the file again") from error
    return {f"{layer}.comfy_quant": mark for layer, mark in marks.items() if f"{layer}.weight" in layout.stored}


def _expected_shapes(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, Shape]:
    """Names and shapes of all weights of a Wan with the width and layers of `shapes`.

    As in ComfyUI, only the metadata can state other widths of text and time than Wan 2.1's.
    """
    sized_by = ("head.modulation", "blocks.0.ffn.0.bias")
    numbers = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    layers = 1 + max(numbers, default=0)
    missing = [name for name in sized_by if not prod(shapes.get(name) or (0,))]
    if layers > min(len(shapes), MOST_LAYERS):
        missing.append(f"most of {layers} layers")
    if missing:
        raise ValueError(f"incomplete, it has {len(shapes)} weights but not {name_list(missing)}; download it again")
    dim, ffn_dim = (shapes[name][-1] for name in sized_by)
    if dim % HEAD_DIM:
        raise ValueError(
            f"dim {dim} is not a multiple of Wan's head dim {HEAD_DIM}, so this is another model; "
            "choose an autoregressive Wan 2.1 text-to-video checkpoint"
        )
    with torch.device("meta"):
        wan = Wan(dim=dim, ffn_dim=ffn_dim, num_layers=layers)
    expected = {name: tuple(tensor.shape) for name, tensor in wan.state_dict().items()}
    stated = mapping(read_object(metadata.get("config", "")).get("transformer"))
    for name, width in (("text_embedding.0.weight", "text_dim"), ("time_embedding.0.weight", "freq_dim")):
        if type(stated.get(width)) is int:
            expected[name] = (dim, stated[width])
    return expected


def _check_complete(
    shapes: Mapping[str, Shape], expected: Mapping[str, Shape], packed: Mapping[str, str], others: tuple[str, ...]
) -> None:
    """Raise ValueError unless the layers have exactly the expected weights and shapes.

    packed: layers with other shapes. others: sets of weights to name in the message.
    """
    more = [name for name in shapes.keys() - expected.keys() if not is_scale(name)]
    if scales := [name for name in more if f"{name.rpartition('.')[0]}.weight" in expected]:
        raise ValueError(f"is quantised in an unknown format ({name_list(scales)}); use the bf16 or ComfyUI version")
    alternatives = f"; other sets of weights in this file: {name_list(others)}" if others else ""
    if missing := [name for name in expected if name not in shapes]:
        raise ValueError(
            f"incomplete, {len(missing)} of {len(expected)} weights are missing ({name_list(missing)}); "
            f"download it again, with all its shards{alternatives}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape and name.removesuffix(".weight") not in packed:
            raise ValueError(
                f"{name} has shape {shapes[name]} and not Wan 2.1's {shape}, so the file is packed or of "
                f"another model; use the bf16 or ComfyUI version{alternatives}"
            )
    if more := [name for name in more if name.startswith("blocks.")]:
        raise ValueError(
            f"its layers have {len(more)} weights that Wan 2.1 T2V does not have ({name_list(more)}), "
            "so it is another kind of Wan; choose an autoregressive text-to-video checkpoint"
        )


def _notes(info: CheckpointInfo) -> list[str]:
    notes = []
    name, size = info.path.name.lower(), info.size
    if _WAN_22.search(name):
        notes.append("the name suggests Wan 2.2, whose experts have the shapes of Wan 2.1 but are not autoregressive")
    elif info.family is FAMILIES["unknown"] and not info.causal_metadata:
        plain = "this is the name of plain Wan 2.1; " if _PLAIN_WAN.search(name) else ""
        notes.append(
            f"{plain}an autoregressive fine-tune has the same keys and shapes as plain Wan 2.1 T2V, whose chunks do "
            "not continue each other: make sure that this is a checkpoint like Self Forcing, LongLive or Causal Forcing"
        )
    title, usual = _PUBLISHED.get(size.dim, ("", size.layers))
    if size.layers != usual:
        notes.append(f"{size.layers} layers; Wan 2.1 {title} has {usual}, so it is pruned or lacks its last layers")
    return notes
