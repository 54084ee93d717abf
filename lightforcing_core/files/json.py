"""JSON and text that others wrote: read within limits on their size, depth and numbers."""

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST_TEXT = 100_000_000  # bytes of a text file
MOST_DEPTH = 100  # lists and objects inside each other
MOST_ITEMS = 1_000_000  # values, each of which takes up to a hundred bytes of memory
MOST_DIGITS = 300  # of an integer, which a float can hold


def read_json(text: str | bytes) -> Any:
    """Parse JSON, NaN and infinity too. ValueError if it is malformed or beyond the limits above."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    if sum(map(text.count, "[{,")) > MOST_ITEMS:
        raise ValueError(f"more than {MOST_ITEMS} values")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {MOST_DEPTH} levels") from None
    level: Iterable[Any] = [value]
    for _ in range(MOST_DEPTH):
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else listing(one))]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MOST_DEPTH} levels")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, over {MOST_DIGITS}")
    return int(digits)


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """A JSON value if it is an array, else an empty one."""
    return value if isinstance(value, list) else []


def read_object(text: str | bytes) -> Mapping[str, Any]:
    """A JSON object; an empty one if the text is none, or beyond the limits of `read_json`."""
    try:
        return mapping(read_json(text))
    except ValueError:
        return {}


def regular_size(path: Path) -> int:
    """The bytes of a regular file that can be read; OSError for another: a pipe or device may block for ever."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a null byte, or half of a character
        raise OSError(errno.EINVAL, f"not a file name ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise OSError(errno.EINVAL, f"{kind}, not a file")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return status.st_size


def read_text(path: Path) -> str:
    """A text file in UTF-8. OSError if it is no regular file of at most MOST_TEXT bytes, ValueError if not UTF-8."""
    if regular_size(path) > MOST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {MOST_TEXT // 1_000_000} MB")
    return path.read_text(encoding="utf-8-sig")
