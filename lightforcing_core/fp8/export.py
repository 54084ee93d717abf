"""Write a checkpoint as FP8 in ComfyUI's format, for ComfyUI's loader and ours.

Each matrix of a layer is stored as float8_e4m3fn with one float32 scale, the only kind that ComfyUI's kernels support,
and a `comfy_quant` key that names the format. For the products that ComfyUI makes of it, see `calibrate.py`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..checkpoint.load import CheckpointInfo, inspect_checkpoint, load_dit_state_dict
from ..checkpoint.scaled import format_mark
from ..families import family_of
from ..files.json import mapping, read_object
from ..files.output import prepare_folder
from ..files.tensors import stream_tensors
from ..model.fp8 import FP8, LAYER_LINEARS, dequantize_rows, quantize_rows, why_no_fp8
from .calibrate import input_scales, read_prompts

_FORMAT = format_mark("float8_e4m3fn")


def write_fp8_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    lora: str | Path | None = None,
    prompts: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[str, ...]:
    """Convert a checkpoint to ComfyUI's FP8 format, one layer in memory at a time.

    source, weights: as of `load_dit_state_dict`, but not quantised. out: the .safetensors file to write.
    lora: merged before quantisation; a LoRA such as LongLive's cannot be merged later.
    prompts: a file of Light Forcing Save Text Embeds. A short video of each prompt determines each layer's
        `input_scale`, with the whole model in bfloat16, on a GPU if there is one.
    on_progress: called as on_progress(stage, done, total).

    Other weights are stored in 16 bits, except the patch embedding, which ComfyUI computes in float32. If the family is
    known, the file is marked as autoregressive, so that ComfyUI loads it as such. Returns sentences for the user.

    Raises CheckpointError for an unusable source, and OutputError or ValueError for an `out` that cannot be written;
    both before any work and without changing an existing file.
    """
    source, out = Path(source), Path(out)
    _check_out(source, out, overwrite)
    info = inspect_checkpoint(source, weights=weights)
    if info.quantised is not None:
        raise CheckpointError(f"{source}: is quantised already ({info.quantised}); use the bf16 or fp32 file")
    texts = [] if prompts is None else read_prompts(prompts, info.size.text_dim)
    state_dict, _ = load_dit_state_dict(source, weights=weights, dequantise_all=True)  # drops ComfyUI's marks
    names = [f"blocks.{i}.{linear}" for i in range(info.size.layers) for linear in LAYER_LINEARS]
    reasons = {name: why_no_fp8(*state_dict[f"{name}.weight"].shape) for name in names}
    layers = [name for name, reason in reasons.items() if reason is None]
    layout = _layout(state_dict, layers, scaled_inputs=bool(texts))
    prepare_folder(out.parent, bytes_needed=sum(tensor.nbytes for tensor in layout.values()))
    if lora is not None:
        state_dict, info = load_dit_state_dict(source, weights=weights, lora=lora)

    progress = on_progress or (lambda stage, done, total: None)
    scales = input_scales(state_dict, texts, info.family, partial(progress, "calibrating")) if texts else {}
    squares: dict[str, tuple[float, float]] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in state_dict.keys() - {f"{layer}.weight" for layer in layers}:
            yield name, state_dict[name].to(layout[name].dtype)
        for done, name in enumerate(layers, start=1):
            weight = state_dict[f"{name}.weight"].float()
            stored, scale = quantize_rows(weight.reshape(1, -1))
            if not scale.isfinite():
                raise CheckpointError(f"{source}: {name}.weight has values that are not finite; download it again")
            rounded = dequantize_rows(stored, scale, torch.float32).view_as(weight)
            squares[name] = (rounded - weight).square().sum().item(), weight.square().sum().item()
            yield f"{name}.weight", stored.view_as(weight)
            yield f"{name}.weight_scale", scale.reshape(())
            yield f"{name}.comfy_quant", _FORMAT
            if scales:
                yield f"{name}.input_scale", torch.tensor(scales[name])
            progress("quantising", done, len(layers))

    stream_tensors(out, layout, tensors(), _metadata(info))
    errors = {name: _relative_error(*pair) for name, pair in squares.items()}
    worst = max(errors, key=errors.__getitem__)
    whole = _relative_error(*(sum(column) for column in zip(*squares.values(), strict=True)))
    return (
        f"wrote {out} ({info.file_bytes / 1e9:.2f} → {out.stat().st_size / 1e9:.2f} GB)",
        f"{len(layers)} layers in FP8; rounding changed their weights by {whole:.2%} (root mean square), at most by "
        f"{errors[worst]:.2%} ({worst})",
        *(f"note: {note}" for note in _notes(info, out, list(filter(None, reasons.values())))),
    )


def _relative_error(error: float, total: float) -> float:
    """The relative error from the sums of squares of errors and weights; 0 for a layer of zeros, which is exact."""
    return (error / total) ** 0.5 if total else 0.0


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the output is a safetensors file; use the suffix .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; create it, or choose another one")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out}: is the source itself; choose another name")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists already; choose another name, or replace it with --force")


def _layout(state_dict: Mapping[str, Tensor], layers: list[str], *, scaled_inputs: bool) -> dict[str, Tensor]:
    """Name → a tensor on the meta device with the shape and dtype to be written."""
    layout = {}
    for name, tensor in state_dict.items():
        wide = tensor.element_size() > 2 and not name.startswith("patch_embedding.")
        layout[name] = tensor.to("meta", torch.bfloat16 if wide else tensor.dtype)
    for name in layers:
        layout[f"{name}.weight"] = layout[f"{name}.weight"].to(FP8)
        layout[f"{name}.weight_scale"] = torch.empty((), dtype=torch.float32, device="meta")
        layout[f"{name}.comfy_quant"] = _FORMAT.to("meta")
        if scaled_inputs:
            layout[f"{name}.input_scale"] = layout[f"{name}.weight_scale"]
    return layout


def _metadata(info: CheckpointInfo) -> dict[str, str]:
    """The source's metadata, with ComfyUI's mark of a known autoregressive family."""
    metadata = {"format": "pt", **info.metadata}
    if info.family.id != "unknown" and not info.causal_metadata:
        config = read_object(metadata.get("config", ""))
        transformer = {**mapping(config.get("transformer")), "causal_ar": True}
        metadata["config"] = json.dumps({**config, "transformer": transformer})
    return metadata


def _notes(info: CheckpointInfo, out: Path, reasons: list[str]) -> list[str]:
    """Notes on the file; reasons: why each layer that is left in 16 bits is."""
    notes = list(info.notes)
    if reasons:
        notes.append(f"{len(reasons)} layers stay in 16 bits: {'; '.join(sorted(set(reasons)))}")
    if family_of(out)[0] is not info.family:
        notes.append(
            f"the name {out.name} does not show the family, {info.family.id}: rename the file to contain "
            f"{info.family.name_hints[0]!r}, or choose the family in the loader"
        )
    return notes
