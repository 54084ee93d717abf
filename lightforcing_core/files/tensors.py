"""Safetensors files that are complete or absent."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .json import regular_size
from .output import prepare_folder, whole_file

# Limits on files from outside; published ones have a few thousand tensors of 5 dimensions, with names of 100 letters.
MOST_TENSORS, MOST_DIMS, LONGEST_NAME = 50_000, 8, 1000

# What the format calls each dtype: https://github.com/huggingface/safetensors#format
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def read_tensors(path: Path, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors by name, and the metadata.

    copy: read the tensors into memory of their own instead of mapping the file, which gives them any alignment; the
        rounding of a matrix product can depend on it.

    Raises OSError if no file can be read, ValueError with the reason if it is damaged.
    """
    regular_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise ValueError(f"{len(names)} tensors, over {MOST_TENSORS}")
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a size beyond 64 bits
        raise ValueError(str(error)) from error
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    return {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors, metadata


def check_tensor(name: str, tensor: Tensor) -> None:
    """ValueError unless a tensor from outside is an ordinary one whose elements are all in the file."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name)} letters")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_nested or tensor.ndim > MOST_DIMS or tensor.nbytes > tensor.untyped_storage().nbytes():
        shape = list(tensor.shape[:MOST_DIMS])
        raise ValueError(f"{name}, {tensor.dtype} of shape {shape}, without all of its elements")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file completely or not at all; OutputError if the folder or the disk cannot take it."""
    return stream_tensors(path, tensors, tensors.items(), metadata)


def stream_tensors(
    path: str | Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file like `write_tensors`, with one tensor in memory at a time.

    layout: name → a tensor of the final shape and dtype, for example on the meta device.
    tensors: yields every name of `layout` once, in any order; ValueError if a tensor differs.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Widest first, so that every tensor starts at a multiple of its element size.
    for name in sorted(layout, key=lambda name: (-layout[name].element_size(), name)):
        tensor, start, end = layout[name], end, end + layout[name].nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    prepare_folder(path.parent, bytes_needed=data + end)
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        missing = set(layout)
        for name, tensor in tensors:
            if name not in missing or (tensor.dtype, tensor.shape) != (layout[name].dtype, layout[name].shape):
                raise ValueError(f"{path}: {name}, {tensor.dtype} {list(tensor.shape)}, differs from its layout")
            missing.remove(name)
            file.seek(data + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors of the layout are missing, such as {min(missing)}")
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the data
    return path
