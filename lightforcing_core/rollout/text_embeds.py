"""ComfyUI's CONDITIONING as a safetensors file: tensors `INDEX.NAME`, an entry's other values as JSON metadata."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.json import read_json
from ..files.tensors import read_tensors, write_tensors
from .timeline import check_text

FORMAT = "light_forcing_text_embeds"
_SCALARS = (type(None), bool, int, float, str)


def save_embeds(path: Path, conditioning: list[Any]) -> None:
    """Write CONDITIONING completely or not at all. Raises ValueError, OutputError."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, (cond, extras) in enumerate(conditioning):
        entry = {}
        for key, value in {"cond": cond, **extras}.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            elif isinstance(value, _SCALARS):
                entry[key] = value
            else:
                raise ValueError(f"the prompt has {key} ({type(value).__name__}); save CLIP Text Encode's own output")
        entries.append(entry)
    if not tensors:
        raise ValueError("the prompt holds no text embedding; connect the output of CLIP Text Encode")
    write_tensors(path, tensors, {"format": FORMAT, "entries": json.dumps(entries)})


def load_embeds(path: Path) -> list[Any]:
    """Read CONDITIONING back; ValueError for a damaged or foreign file."""
    try:
        tensors, metadata = read_tensors(path, copy=True)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read: {problem}; save the prompt again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no text embeddings; save the prompt with Light Forcing Save Text Embeds")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parts.setdefault(index, {})[name] = tensor
    conditioning: list[Any] = []
    try:
        for number, entry in enumerate(read_json(metadata["entries"])):
            own = parts[str(number)]
            cond = own.pop("cond")
            plain = all(isinstance(value, _SCALARS) for value in entry.values()) and not entry.get("pooled_output")
            if not plain or not cond.is_floating_point():
                raise ValueError(f"entry {number} has another value where a tensor belongs")
            check_text("the prompt", cond)
            conditioning.append([cond, {**entry, **own}])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.80}); save the prompt again") from error
    return conditioning
