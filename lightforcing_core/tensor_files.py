"""Safetensors files that are whole or absent."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .output_files import OutputError, prepare_folder, whole_file


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file whole or not at all; a former file stays until the new one is complete.

    Raises OutputError when the folder cannot take the file or the disk is full.
    """
    path = Path(path)
    prepare_folder(path.parent, bytes_needed=sum(tensor.nbytes for tensor in tensors.values()))
    with whole_file(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata))
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the data
        except (OSError, SafetensorError) as error:
            left = "the former file there is unharmed" if path.exists() else "nothing was left there"
            raise OutputError(f"cannot write {path}: {error}; {left}; free some space") from error
    return path
