"""Writes a checkpoint as FP8 in ComfyUI's own format, for its Load Diffusion Model and for our loader.

Each matrix of a layer is stored as float8_e4m3fn with one float32 scale (ComfyUI's kernels take no other) and a
`comfy_quant` key that names the format. ComfyUI 0.27 multiplies such a layer in FP8 on cards that can, with the
activation divided by a fixed `input_scale`, or by 1 where the file has none, and cut off at ±448 (see `calibrate.py`);
elsewhere, and under a LoRA that it applies on the fly, it multiplies the dequantised weights.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..checkpoint.load import CheckpointInfo, inspect_checkpoint, load_dit_state_dict
from ..families import family_of
from ..files.output import prepare_folder
from ..files.tensors import stream_tensors
from ..model.wan import wan_from_state_dict
from .calibrate import input_scales, largest_inputs, read_prompts
from .linear import FP8, LAYER_LINEARS, dequantize_rows, quantize_rows, why_no_fp8

_FORMAT = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


@dataclass(frozen=True)
class FP8File:
    """What was written: `layers` in FP8 out of how many bytes into how many.

    `error` is the weights' relative rounding error (root mean square over all layers), `worst` the layer where it is
    largest and its own; `notes` are sentences a user should know.
    """

    path: Path
    layers: int
    bytes_before: int
    bytes_after: int
    error: float
    worst: tuple[str, float]
    notes: tuple[str, ...]


def write_fp8_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    lora: str | Path | None = None,
    prompts: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> FP8File:
    """Read a checkpoint of any published layout and write it to `out` in ComfyUI's FP8 format, whole or not at all.

    `weights` names one of several sets in the file and `lora` is added first, both as for `load_dit_state_dict`;
    a LoRA such as LongLive's cannot be merged afterwards. What is not quantised is stored in 16 bits, except the
    patch embedding, which every host computes in float32. The file says that it is autoregressive where its family is
    known to be, so that ComfyUI loads it as such. One layer is in memory at a time.

    `prompts`, a file of Light Forcing Save Text Embeds, has a short video made first, from the whole model in bfloat16
    on a GPU where torch sees one, to fix each layer's `input_scale`. on_progress: on_progress(stage, done, total).

    Raises CheckpointError for a source that cannot be used, quantised ones included, and OutputError or ValueError
    for an `out` that cannot be written; all before any work, and without touching a file that is there.
    """
    source, out = Path(source), Path(out)
    _check_out(source, out, overwrite)
    info = inspect_checkpoint(source, weights=weights)
    if info.quantised is not None:
        raise CheckpointError(
            f"{source}: is quantised already ({info.quantised}); rounding it twice would add to its error, so take the "
            "bf16 or fp32 file"
        )
    texts = [] if prompts is None else _texts(prompts, info)
    state_dict, _ = load_dit_state_dict(source, weights=weights)
    names = [f"blocks.{i}.{linear}" for i in range(info.layers) for linear in LAYER_LINEARS]
    reasons = {name: why_no_fp8(*state_dict[f"{name}.weight"].shape) for name in names}
    layers = [name for name, reason in reasons.items() if reason is None]
    layout = _layout(state_dict, layers, scaled_inputs=bool(texts))
    prepare_folder(out.parent, bytes_needed=sum(tensor.nbytes for tensor in layout.values()))
    if lora is not None:
        state_dict, info = load_dit_state_dict(source, weights=weights, lora=lora)

    progress = on_progress or (lambda stage, done, total: None)
    scales = _input_scales(state_dict, texts, info, partial(progress, "calibrating")) if texts else {}
    squares: dict[str, tuple[float, float]] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in state_dict.keys() - {f"{layer}.weight" for layer in layers}:
            yield name, state_dict[name].to(layout[name].dtype)
        for done, name in enumerate(layers, start=1):
            weight = state_dict[f"{name}.weight"].float()
            stored, scale = quantize_rows(weight.reshape(1, -1))
            if not scale.isfinite():
                raise CheckpointError(f"{source}: {name}.weight holds values that are not finite; the file is damaged")
            rounded = dequantize_rows(stored, scale, torch.float32).view_as(weight)
            squares[name] = (rounded - weight).square().sum().item(), weight.square().sum().item()
            yield f"{name}.weight", stored.view_as(weight)
            yield f"{name}.weight_scale", scale.reshape(())
            yield f"{name}.comfy_quant", _FORMAT
            if scales:
                yield f"{name}.input_scale", torch.tensor(scales[name])
            progress("quantising", done, len(layers))

    stream_tensors(out, layout, tensors(), _metadata(info))
    errors = {name: _relative(*pair) for name, pair in squares.items()}
    worst = max(errors, key=errors.__getitem__)
    return FP8File(
        path=out,
        layers=len(layers),
        bytes_before=info.file_bytes,
        bytes_after=out.stat().st_size,
        error=_relative(*(sum(column) for column in zip(*squares.values(), strict=True))),
        worst=(worst, errors[worst]),
        notes=_notes(info, out, {reason for reason in reasons.values() if reason}, len(names) - len(layers)),
    )


def _texts(prompts: str | Path, info: CheckpointInfo) -> list[Tensor]:
    texts = read_prompts(prompts)
    if odd := [text.shape[-1] for text in texts if text.shape[-1] != info.text_dim]:
        raise CheckpointError(
            f"{prompts}: its embeddings are {odd[0]} wide where the model reads {info.text_dim}; encode the prompt "
            "with the model's own text encoder, umT5 for Wan"
        )
    return texts


def _input_scales(
    state_dict: Mapping[str, Tensor], texts: list[Tensor], info: CheckpointInfo, on_step: Callable[[int, int], None]
) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dit = wan_from_state_dict(state_dict, dtype=torch.bfloat16, device=device)
    texts = [text.to(device, torch.bfloat16) for text in texts]
    return input_scales(largest_inputs(dit, texts, info.family, on_step=on_step))


def _relative(error: float, whole: float) -> float:
    """A root mean square out of two sums of squares; a layer of zeros is stored without error."""
    return (error / whole) ** 0.5 if whole else 0.0


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: name the output with .safetensors, the format that is written")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it, or choose another")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out}: is the source itself; choose another name")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists already; choose another name, or replace it with --force")


def _layout(state_dict: Mapping[str, Tensor], layers: list[str], *, scaled_inputs: bool) -> dict[str, Tensor]:
    """Name → a tensor on the meta device, for everything that is written."""
    layout = {}
    for name, tensor in state_dict.items():
        wide = tensor.element_size() > 2 and not name.startswith("patch_embedding.")
        layout[name] = torch.empty(tensor.shape, dtype=torch.bfloat16 if wide else tensor.dtype, device="meta")
    for name in layers:
        layout[f"{name}.weight"] = torch.empty(state_dict[f"{name}.weight"].shape, dtype=FP8, device="meta")
        layout[f"{name}.weight_scale"] = torch.empty((), dtype=torch.float32, device="meta")
        layout[f"{name}.comfy_quant"] = _FORMAT.to("meta")
        if scaled_inputs:
            layout[f"{name}.input_scale"] = layout[f"{name}.weight_scale"]
    return layout


def _metadata(info: CheckpointInfo) -> dict[str, str]:
    """The source's metadata, and that it is autoregressive where its family is known to be."""
    metadata = {"format": "pt", **info.metadata}
    if info.family.id != "unknown" and not info.causal_metadata:
        config = json.loads(metadata.get("config", "{}"))
        config["transformer"] = {**config.get("transformer", {}), "causal_ar": True}
        metadata["config"] = json.dumps(config)
    return metadata


def _notes(info: CheckpointInfo, out: Path, reasons: set[str], left: int) -> tuple[str, ...]:
    notes = list(info.notes)
    if left:
        notes.append(f"{left} layers stay in 16 bits: {'; '.join(sorted(reasons))}")
    if family_of(out)[0] is not info.family:
        notes.append(
            f"the name {out.name} does not tell the family, which is {info.family.id}: rename the file to contain "
            f"{info.family.name_hints[0]!r}, or choose the family in the loader"
        )
    return tuple(notes)
