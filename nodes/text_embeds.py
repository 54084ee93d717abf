"""Text embeddings on disk, so that an encoded prompt needs no 10 GB text encoder again."""

import json
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..lightforcing_core.files.json import read_json
from ..lightforcing_core.files.tensors import read_tensors, write_tensors
from ..lightforcing_core.rollout.timeline import check_text
from .comfy import add_model_kind, model_files, model_folder, model_path, named_file, version_of
from .texts import node_schema

FOLDER = "text_embeds"
FORMAT = "light_forcing_text_embeds"
_SCALARS = (type(None), bool, int, float, str)
add_model_kind(FOLDER, ".safetensors")


class LightForcingSaveTextEmbeds(io.ComfyNode):
    """Save CONDITIONING to models/text_embeds/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSaveTextEmbeds",
            inputs=[io.Conditioning.Input("conditioning"), io.String.Input("name", default="prompt")],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list, name: str) -> io.NodeOutput:
        path = named_file(model_folder(FOLDER), name)
        save_embeds(path, conditioning)
        return io.NodeOutput(conditioning, ui=ui.PreviewText(f"saved {path.name} in {path.parent}"))


class LightForcingLoadTextEmbeds(io.ComfyNode):
    """Load CONDITIONING from models/text_embeds/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingLoadTextEmbeds",
            inputs=[io.Combo.Input("name", options=model_files(FOLDER))],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return version_of(model_path(FOLDER, name))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(load_embeds(Path(model_path(FOLDER, name))))


def save_embeds(path: Path, conditioning: list) -> None:
    """Write CONDITIONING completely or not at all. Raises ValueError, OutputError."""
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, (cond, extras) in enumerate(conditioning):
        entry = {}
        for key, value in {"cond": cond, **extras}.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            elif isinstance(value, _SCALARS):
                entry[key] = value
            else:
                raise ValueError(
                    f"the prompt has {key} ({type(value).__name__}), which cannot be stored; save the output of "
                    f"CLIP Text Encode itself"
                )
        entries.append(entry)
    if not tensors:
        raise ValueError("the prompt holds no text embedding; connect the output of CLIP Text Encode")
    write_tensors(path, tensors, {"format": FORMAT, "entries": json.dumps(entries)})


def load_embeds(path: Path) -> list:
    """Read CONDITIONING back; ValueError for a damaged or foreign file."""
    try:
        tensors, metadata = read_tensors(path, copy=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; save the prompt again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no text embeddings; save the prompt with Light Forcing Save Text Embeds")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parts.setdefault(index, {})[name] = tensor
    conditioning = []
    try:
        for number, entry in enumerate(read_json(metadata["entries"], finite=True)):
            own = parts[str(number)]
            if not all(isinstance(value, _SCALARS) for value in entry.values()) or entry.get("pooled_output"):
                raise ValueError(f"entry {number} has another value where a tensor belongs")
            conditioning.append([own.pop("cond"), {**entry, **own}])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.80}); save the prompt again") from error
    for cond, _ in conditioning:
        check_text(f"the prompt in {path}", cond)
    return conditioning
