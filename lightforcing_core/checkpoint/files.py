"""Weight files of every kind, opened as memory-mapped tensors without running any code in them."""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.json import read_json, read_text, regular_size
from ..files.tensors import MOST_TENSORS, check_tensor, read_tensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
_WEB_PAGE = "this is a web page saved under the name of a weight file; download the file itself"
_OTHER_FILES = {
    b"gguf": "this is a GGUF file; load it with a GGUF loader node and connect its MODEL to Light Forcing Apply",
    b"version https://git-lfs": "this is a Git LFS pointer; run `git lfs pull` or download the weights themselves",
    **dict.fromkeys((b"<!doctype", b"<html", b"<?xml"), _WEB_PAGE),
}


class CheckpointError(ValueError):
    """A file cannot be used; the message names the file, its problem and the remedy."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of a ValueError's text, as a CheckpointError, unless it is one already."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def open_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Open a .safetensors or PyTorch file, one of several shards, an index.json, or a folder that holds one model.

    Returns the contents (names → tensors, in PyTorch files also nested dicts of them), the metadata and the size of all
    files in bytes. Tensors are memory-mapped if the format allows it, so that nothing is read before it is used.

    The first bytes tell the format, not the name. PyTorch files are read with `weights_only=True` only. Raises
    CheckpointError for files that are missing, empty, truncated, unsafe or of another kind.
    """
    contents: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    total = 0
    with naming(path):
        files = _files_of(Path(path))
    for file in files:
        with naming(file):
            size = _size_of(file)
            stored, notes = _read(file, size)
            if twice := contents.keys() & stored.keys():
                raise ValueError(f"{name_list(twice)} is in another shard too; download them again")
        contents.update(stored)
        metadata.update(notes)
        total += size
    return contents, metadata, total


def tensor_groups(contents: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """All sets of weights in a file by name: {"generator": …, "generator_ema": …}, or {"": …} in a flat one.

    A safetensors file cannot nest; there the name of the set may be a prefix of the keys, `generator_ema.model.…`.
    """
    groups: dict[str, dict[str, Tensor]] = {}

    def visit(value: Mapping[str, Any], name: str) -> None:
        tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
        if any("." in key for key in tensors):
            groups[name] = tensors
            return
        for key, item in value.items():
            if isinstance(item, Mapping):
                visit(item, f"{name}.{key}" if name else key)

    visit(contents, "")
    if not groups and (loose := {name: item for name, item in contents.items() if isinstance(item, Tensor)}):
        return {"": loose}
    flat = groups.get("", {})
    if any(key.startswith(("generator.", "generator_ema.")) for key in flat):
        groups = {}
        for key, tensor in flat.items():
            name, _, rest = key.partition(".")
            groups.setdefault(name, {})[rest] = tensor
    return groups


def name_list(names: Iterable[str]) -> str:
    """The first names in alphabetical order, for a message: "a, b, c and 7 more"; each at most 80 letters."""
    ordered = sorted(names)
    return ", ".join(name[:80] for name in ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _files_of(path: Path) -> list[Path]:
    """The path itself, or the shards of which it is one, the index or the folder."""
    if os.path.isdir(path):  # unlike path.is_dir(), False for a name that is too long
        return _files_of(_only_model_in(path))
    if path.name.endswith(".index.json"):
        names = _names_in_index(path)
    elif shard := _SHARD.match(path.name):
        of = f"{shard['count']}{shard['suffix']}"
        names = [f"{shard['stem']}-{number:05d}-of-{of}" for number in range(1, int(shard["count"]) + 1)]
    else:
        return [path]
    missing = [name for name in names if not os.path.isfile(path.parent / name)]
    if missing or not names:
        problem = f"{len(missing)} of its {len(names)} shards are missing ({name_list(missing)})"
        raise ValueError(f"{problem}; download them into {path.parent}")
    return [path.parent / name for name in names]


def _only_model_in(folder: Path) -> Path:
    for pattern in ("*.index.json", "*.safetensors", "*.pt", "*.pth", "*.bin"):
        found = sorted(file for file in folder.glob(pattern) if os.path.exists(file))
        stems = {shard["stem"] if (shard := _SHARD.match(file.name)) else file.name for file in found}
        if len(stems) == 1:
            return found[0]
        if found and pattern != "*.index.json":
            names = name_list(file.name for file in found)
            raise ValueError(f"has {len(found)} weight files ({names}); pass the path of one of them")
    if os.path.isdir(folder / "transformer"):
        return folder / "transformer"
    raise ValueError(f"has no weight file; expected *{', *'.join(SUFFIXES)} or an index.json")


def _names_in_index(index: Path) -> list[str]:
    _size_of(index)
    try:
        names = sorted(set(read_json(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("not an index of shards (no weight_map); pass a weight file") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"points outside its folder ({str(outside[0])[:80]}); its shards must be inside")
    return names


def _size_of(file: Path) -> int:
    try:
        return regular_size(file)
    except FileNotFoundError as error:
        found = name_list(other.name for other in file.parent.glob("*") if other.suffix in SUFFIXES)
        raise ValueError(f"no such file; {file.parent} holds {found or 'no weight file'}") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); choose another file") from error


def _read(file: Path, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    with file.open("rb") as stream:
        head = stream.read(64)
    if head[8:9] == b"{":
        try:
            return read_tensors(file)
        except ValueError as error:
            problem = f"truncated or damaged safetensors file of {size:,} bytes ({error!s:.120})"
            raise ValueError(f"{problem}; download it again") from error
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return _read_torch(file, size, zipped=head.startswith(b"PK")), {}
    if not head:
        raise ValueError("the file is empty; download it again")
    for start, problem in _OTHER_FILES.items():
        if head.lstrip().lower().startswith(start):
            raise ValueError(problem)
    raise ValueError(
        f"neither a safetensors nor a PyTorch file (first bytes {head[:12]!r}); "
        "choose a .safetensors, .pt or .pth file, or download it again if it is damaged"
    )


def _read_torch(file: Path, size: int, *, zipped: bool) -> dict[str, Any]:
    try:
        if zipped:
            with zipfile.ZipFile(file) as entries:
                if any("/code/" in name for name in entries.namelist()):  # whose debug entries are compressed
                    raise ValueError("a TorchScript program")
                if sum(entry.file_size for entry in entries.infolist()) > size:
                    raise ValueError("it is compressed, as torch.save never does it")
        # Only the zip format of torch ≥ 1.6 can be mapped, and only by path; a path with the suffix
        # .safetensors makes torch use another reader.
        if zipped and file.suffix != ".safetensors":
            stored = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
        else:
            with file.open("rb") as stream:
                stored = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything; to the user it means the same
        if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):
            problem = f"memory ran out reading its {size:,} bytes"
            raise ValueError(f"{problem}; free some, or use a .safetensors version of it") from error
        raise ValueError(_why_torch_refused(str(error) or type(error).__name__)) from error
    if not isinstance(stored, Mapping):
        raise ValueError(f"contains a {type(stored).__name__}, not a dict of weights; choose a checkpoint")
    left = MOST_TENSORS  # counted at every visit: a small file can hold one dict a thousand times

    def plain(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        """The tensors, and dicts of them, that have a text for a name."""
        nonlocal left
        left -= len(value)
        if left < 0:
            raise ValueError(f"more than {MOST_TENSORS} entries")
        kept: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(key, str) and isinstance(item, Tensor):
                check_tensor(key, item)
                kept[key] = item.detach()
            elif isinstance(key, str) and isinstance(item, Mapping) and depth:
                kept[key] = plain(item, depth - 1)
            elif isinstance(item, int | float) and str(key).endswith(".alpha"):  # some LoRAs store it as a number
                kept[key] = torch.tensor(float(max(-1e300, min(item, 1e300))))
        return kept

    try:
        return plain(stored, depth=3)
    except ValueError as error:
        raise ValueError(f"holds {error}; use a .safetensors version, or download it again") from error


def _why_torch_refused(message: str) -> str:
    if "TorchScript" in message:
        return "this is a compiled TorchScript program, not a checkpoint; choose the file with the weights"
    if re.search(r"central directory|zip file|runcated|EOF|Ran out of input", message):
        return "truncated or damaged; download it again and compare its size with the published one"
    if message.startswith("Weights only load failed"):
        named = re.search(r"GLOBAL (\S+)", message)
        detail = f" ({named[1]:.120})" if named else ""
        return (
            f"refused: it contains more than tensors{detail}, and opening it could run code; nothing was run. "
            "Use a .safetensors version of it, or a file with tensors only"
        )
    first_line = message.strip().partition("\n")[0][:120]
    return f"not a readable PyTorch checkpoint ({first_line}); download it again or use a .safetensors version"
