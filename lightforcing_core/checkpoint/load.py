"""Every published layout of an autoregressive Wan 2.1 checkpoint → one state dict, and what is known about it."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..families import FAMILIES, Family, family_of
from .files import CheckpointError, open_weights, some, tensor_groups
from .layouts import Layout, original_name, other_file, other_wan, read_layout, wan_shapes
from .lora import looks_like_lora, merge_lora
from .scaled import Quantisation, dequantise, is_scale, read_quantisation

HEAD_DIM = 128
_SIZE_NAMES = {1536: "1.3B", 5120: "14B"}
_SIZE_LAYERS = {1536: 30, 5120: 40}
# What the weights of the generator are called, in files with EMA and without.
_EMA = ("generator_ema", "model_ema", "ema")
_PLAIN = ("generator", "model", "state_dict", "module")
# Weights that only training needs, and LoRAs; never the model itself.
_NOT_THE_MODEL = re.compile(r"critic|discriminator|optimizer|scheduler|real_score|fake_score|teacher|lora")
_PLAIN_WAN = re.compile(r"wan[-_. ]?2[._]1.*t2v|^diffusion_pytorch_model")
_WAN_22 = re.compile(r"wan[-_. ]?2[._]2|(high|low)[-_]?noise")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, without its tensors.

    `weights` names the part of the file that is loaded ("generator_ema", … or "" where the file holds just one set)
    and `other_weights` the parts that could be loaded instead. `layout` says how its keys are named. `parameters`
    counts the model's own weights, not the scales of a quantised one. `dtypes` are those stored, most frequent
    first. `metadata` is the safetensors header's, with layer names in Wan's naming. `notes` are sentences a user
    should know.
    """

    path: Path
    weights: str
    other_weights: tuple[str, ...]
    layout: str
    family: Family
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_dim: int
    text_dim: int
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    file_bytes: int
    quantised: str | None
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def causal_metadata(self) -> bool:
        """Whether the file says it is autoregressive: metadata `config` is {"transformer": {"causal_ar": true}}."""
        return _says_causal(self.metadata)

    def kv_bytes_per_frame(self, height: int = 480, width: int = 832, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of keys and values of one latent frame in all layers, for one video of `height` x `width` pixels.

        Raises ValueError where a side is not a multiple of 16.
        """
        for side, pixels in (("height", height), ("width", width)):
            if pixels < 16 or pixels % 16:
                below = max(16, pixels // 16 * 16)
                raise ValueError(f"{side} {pixels} is not a multiple of 16; use {below} or {below + 16}")
        return 2 * self.layers * (height // 16) * (width // 16) * self.dim * dtype.itemsize


def load_dit_state_dict(
    path: str | Path,
    *,
    prefer_ema: bool = True,
    weights: str | None = None,
    family: Family | None = None,
    lora: str | Path | None = None,
    lora_strength: float = 1.0,
    dequantise_all: bool = False,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read a checkpoint of any published layout as Wan's original names → tensors on the CPU, memory-mapped.

    `path` is a .safetensors or PyTorch file, a shard, an index.json, or a folder with one model. Where the file holds
    several sets of weights, the EMA is taken, except for families that are published to run without it (LongLive,
    Causal Forcing chunk by chunk); `prefer_ema=False` takes the plain ones, `weights="generator_ema"` the named set.

    Quantised files: ComfyUI's own formats (`scaled_fp8`, `comfy_quant`) keep their keys, for the host to read.
    Weights with a scale per row that no host format announces (LightX2V fp8 and int8) become bfloat16 here.
    `dequantise_all=True`, for use without a host, turns ComfyUI's formats and unscaled fp8 into bfloat16 too.

    `lora` is a LoRA file that is added to the weights with `lora_strength`, see `merge_lora`.

    Raises CheckpointError, a ValueError, that names the file, what was found and the way out.
    """
    state_dict, info, quantisation = _open(Path(path), prefer_ema, weights, family)
    if quantisation is not None:
        try:
            state_dict = dequantise(state_dict, quantisation, host_formats=dequantise_all)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if lora is not None and quantisation.host_layers and not dequantise_all:
            raise CheckpointError(
                f"{path}: is quantised ({info.quantised}), and a LoRA cannot be merged into that; "
                "add it with ComfyUI's LoRA loader, or take the bf16 file"
            )
    if lora is not None:
        state_dict, note = merge_lora(state_dict, lora, lora_strength)
        info = replace(info, notes=(*info.notes, note))
    return state_dict, info


def inspect_checkpoint(
    path: str | Path, *, prefer_ema: bool = True, weights: str | None = None, family: Family | None = None
) -> CheckpointInfo:
    """What `load_dit_state_dict` would load, without reading the weights themselves; raises what it raises."""
    return _open(Path(path), prefer_ema, weights, family)[1]


def describe(info: CheckpointInfo, *, height: int = 480, width: int = 832) -> list[tuple[str, str]]:
    """(label, value) rows about a checkpoint, for a table; one "note" row for each note."""
    family = info.family
    chunk = (
        "1 latent frame (frame by frame)"
        if family.frames_per_chunk == 1
        else f"{family.frames_per_chunk} latent frames"
    )
    if family.id == "unknown":
        chunk = f"not stored in the weights; {chunk} unless you know better"
    window = (
        "all frames" if family.window is None else f"{family.window} latent frames, {family.sink_frames} of them sinks"
    )
    per_frame = info.kv_bytes_per_frame(height, width)
    others = f" (also there: {', '.join(info.other_weights)})" if info.other_weights else ""
    return [
        ("file", str(info.path)),
        ("size", f"{info.file_bytes / 1e9:.2f} GB"),
        ("family", f"{family.title} (read from the name)" if family.id != "unknown" else family.title),
        ("model", f"Wan 2.1 T2V {_SIZE_NAMES.get(info.dim, 'of its own size')}, {info.parameters:,} parameters"),
        ("dimensions", f"dim {info.dim}, ffn {info.ffn_dim}, {info.layers} layers, {info.heads} heads of {HEAD_DIM}"),
        ("stored as", f"{', '.join(info.dtypes)}; {info.quantised or 'not quantised'}"),
        ("keys", f"{info.layout}; {info.tensors} tensors"),
        ("would load", (info.weights or "the file's only set of weights") + others),
        ("chunk", chunk),
        ("window", window),
        ("KV cache", f"{per_frame / 2**20:.1f} MiB per latent frame at {height}x{width} in bfloat16"),
        *(("note", note) for note in info.notes),
    ]


def _open(
    path: Path, prefer_ema: bool, weights: str | None, family: Family | None
) -> tuple[dict[str, Tensor], CheckpointInfo, Quantisation | None]:
    file = open_weights(path)
    source = ""
    if family is None:
        family, source = family_of(path)
    group, stored, others = _choose(path, tensor_groups(file.contents), family, prefer_ema, weights)
    layout, shapes = _wan_layout(path, stored)
    metadata = _in_our_names(file.metadata, layout)
    found = {name: stored[key] for name, key in layout.stored.items()}
    try:
        quantisation = read_quantisation(found, metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    expected = _expected_shapes(path, shapes)
    packed = set(quantisation.host_layers) if quantisation else set()
    also = f"; other weights in this file: {', '.join(others)}" if others else ""
    _check_complete(path, shapes, expected, packed, also)
    strangers = [name for name in found if name not in expected and not is_scale(name)]
    _refuse_unknown_layers(path, strangers)

    dim, layers = expected["head.modulation"][-1], sum(name.endswith("self_attn.q.weight") for name in expected)
    state_dict = {name: found[name] for name in expected} | {name: found[name] for name in found if is_scale(name)}
    dtypes = Counter(str(found[name].dtype).removeprefix("torch.") for name in expected)
    notes = _notes(path, family, metadata, layers, dim)
    if source not in ("", path.name):
        notes.insert(0, f"family read from the folder's name, {source}")
    if dropped := [*strangers, *(key for key in layout.extra if original_name(key) is not None)]:
        notes.append(f"{len(dropped)} weights that are not Wan's are left out: {some(dropped)}")
    info = CheckpointInfo(
        path=path,
        weights=group,
        other_weights=others,
        layout=layout.title,
        family=family,
        dim=dim,
        ffn_dim=expected["blocks.0.ffn.0.weight"][0],
        layers=layers,
        heads=dim // HEAD_DIM,
        in_dim=expected["patch_embedding.weight"][1],
        text_dim=expected["text_embedding.0.weight"][1],
        dtypes=tuple(name for name, _ in dtypes.most_common()),
        tensors=len(expected),
        parameters=sum(torch.Size(shape).numel() for shape in expected.values()),
        file_bytes=file.bytes,
        quantised=quantisation.title if quantisation else None,
        metadata=metadata,
        notes=tuple(notes),
    )
    return state_dict, info, quantisation


def _wan_layout(path: Path, stored: Mapping[str, Tensor]) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """How the weights are named and their shapes by Wan's own names; refuses everything but Wan 2.1 T2V."""
    try:
        layout = read_layout(stored)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; save the one to run as its own file") from error
    if layout is None or not any(name.endswith("modulation") for name in layout.stored):
        raise CheckpointError(
            f"{path}: {other_file(stored)}; choose an autoregressive Wan 2.1 text-to-video checkpoint"
        )
    shapes = {name: tuple(stored[key].shape) for name, key in layout.stored.items()}
    if reason := other_wan(shapes):
        raise CheckpointError(f"{path}: {reason}")
    return layout, shapes


def _choose(
    path: Path, groups: Mapping[str, dict[str, Tensor]], family: Family, prefer_ema: bool, weights: str | None
) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """(name, tensors, the other names): the set of weights to run."""
    if not groups:
        raise CheckpointError(f"{path}: holds no weights; choose a checkpoint file")
    models = {
        name: group for name, group in groups.items() if not _NOT_THE_MODEL.search(name) and not looks_like_lora(group)
    }
    if not models:
        if any(looks_like_lora(group) for group in groups.values()):
            raise CheckpointError(
                f"{path}: this is a LoRA, not a model; load the model it was made for and pass this file as lora= "
                "(in ComfyUI: with the LoRA loader)"
            )
        raise CheckpointError(f"{path}: holds only {', '.join(groups)}, which are not the generator's weights")
    if weights is not None:
        if weights not in models:
            raise CheckpointError(f"{path}: has no weights named {weights!r}; it has {', '.join(map(repr, models))}")
        chosen = weights
    else:
        ema_first = prefer_ema and family.weights != "generator"
        order = (*_EMA, *_PLAIN) if ema_first else (*_PLAIN, *_EMA)
        ranked = [name for wanted in order for name in models if wanted in name.split(".")]
        if not ranked and len(models) > 1:
            raise CheckpointError(f"{path}: holds several sets of weights, {', '.join(models)}; name one with weights=")
        chosen = ranked[0] if ranked else next(iter(models))
    return chosen, models[chosen], tuple(name for name in models if name != chosen)


def _in_our_names(metadata: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """The file's metadata with the layers of `_quantization_metadata` named as in the state dict."""
    renamed = dict(metadata)
    if "_quantization_metadata" in renamed:
        try:
            quantisation = json.loads(renamed["_quantization_metadata"])
            quantisation["layers"] = {
                original_name(layer, layout.prefix, layout.diffusers): entry
                for layer, entry in quantisation["layers"].items()
            }
            renamed["_quantization_metadata"] = json.dumps(quantisation)
        except (ValueError, KeyError, TypeError, AttributeError):
            return renamed  # read_quantisation says what is wrong with it
    return renamed


def _expected_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """All weights that a Wan of this size has, sizes taken from the tensors themselves."""
    sized_by = ("head.modulation", "blocks.0.ffn.0.bias", "text_embedding.0.weight", "time_embedding.0.weight")
    numbers = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    layers = 1 + max(numbers, default=0)
    absent = [name for name in sized_by if not shapes.get(name)]
    if layers > len(shapes):
        absent.append(f"most of {layers} layers")
    if absent:
        raise CheckpointError(
            f"{path}: incomplete, {some(absent)} missing among its {len(shapes)} weights; "
            "download it again, with all its shards"
        )
    dim, ffn_dim = shapes["head.modulation"][-1], shapes["blocks.0.ffn.0.bias"][0]
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{path}: dim {dim} is not a multiple of Wan's head size {HEAD_DIM}; this is another model"
        )
    text_dim, freq_dim = shapes["text_embedding.0.weight"][-1], shapes["time_embedding.0.weight"][-1]
    return wan_shapes(dim, ffn_dim, layers, text_dim=text_dim, freq_dim=freq_dim)


def _check_complete(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    packed: set[str],
    also: str,
) -> None:
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{path}: incomplete, {len(missing)} of {len(expected)} weights are missing ({some(missing)}); "
            f"download it again, with all its shards{also}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape and name.removesuffix(".weight") not in packed:
            raise CheckpointError(
                f"{path}: {name} has shape {shapes[name]} where Wan 2.1 has {shape}; "
                f"the file is packed or of another model; take its bf16 or ComfyUI version{also}"
            )


def _refuse_unknown_layers(path: Path, strangers: list[str]) -> None:
    if inside := [name for name in strangers if name.startswith("blocks.")]:
        raise CheckpointError(
            f"{path}: its layers have {len(inside)} weights that Wan 2.1 T2V has not ({some(inside)}), "
            "so it is a Wan of another kind; choose an autoregressive text-to-video checkpoint"
        )


def _says_causal(metadata: Mapping[str, str]) -> bool:
    try:
        return bool(json.loads(metadata.get("config", "{}")).get("transformer", {}).get("causal_ar", False))
    except (ValueError, AttributeError):
        return False


def _notes(path: Path, family: Family, metadata: Mapping[str, str], layers: int, dim: int) -> list[str]:
    notes = []
    name = path.name.lower()
    if _WAN_22.search(name):
        notes.append(
            "the name speaks of Wan 2.2, whose text-to-video experts have Wan 2.1's shapes but are not autoregressive"
        )
    elif family is FAMILIES["unknown"] and not _says_causal(metadata):
        plain = "the name is that of plain Wan 2.1; " if _PLAIN_WAN.search(name) else ""
        notes.append(
            f"{plain}weights alone cannot tell an autoregressive fine-tune from plain Wan 2.1 T2V, whose chunks would "
            "not continue each other: make sure it is a Self Forcing, LongLive, Causal Forcing or like checkpoint"
        )
    usual = _SIZE_LAYERS.get(dim, layers)
    if layers != usual:
        notes.append(
            f"{layers} layers where Wan 2.1 {_SIZE_NAMES[dim]} has {usual}: pruned, or its last layers are missing"
        )
    return notes
