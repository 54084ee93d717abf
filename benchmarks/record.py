"""The record of every measurement: sections of named rows, in JSON types, that name no path, user or machine."""

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lightforcing_core.files.output import prepare_folder, whole_file

Record = dict[str, Any]
Put = Callable[[str, str, Any], object]  # puts a value or columns of a row into a section: put(section, row, value)
# The folders of a path that begins at a root or a drive.
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\s\\/:;'\"]+)*[\\/]+(?=[^\s\\/])")


def add(record: Record, section: str, row: str, value: Any) -> None:
    """Put a value into a section ("" is the record itself), or columns into its row of that name."""
    rows, value = record.setdefault(section, {}) if section else record, _anonymous(value)
    if isinstance(value, dict):
        rows.setdefault(row, {}).update(value)
    else:
        rows[row] = value


def _anonymous(value: Any) -> Any:
    """The value with files instead of paths, and without the names of the user and of the machine."""
    if isinstance(value, dict):
        return {str(key): _anonymous(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_anonymous(one) for one in value]
    if not isinstance(value, str):
        return value
    text = _FOLDERS.sub("", value.replace(str(Path.home()), ""))
    for name in filter(None, (Path.home().name, platform.node())):
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text)
    return text


def write(path: Path, record: Record) -> None:
    """Write a record as indented JSON; the file is complete or absent. OutputError if it cannot be written."""
    prepare_folder(path.parent)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
