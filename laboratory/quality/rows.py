"""Rows of measurements in a folder: one JSON object a line, appended as they are made, behind one line of settings.

A folder that is kept may hold the same lines compressed (`xz rows.jsonl`).
"""

import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightforcing.lightforcing_core.files.output import prepare_folder, whole_file

ROWS, COMPRESSED = "rows.jsonl", "rows.jsonl.xz"
DIGITS, DIGITS_IN_LISTS = 9, 4  # lists are only plotted

Row = dict[str, Any]


def read_rows(folder: Path) -> tuple[Row | None, list[Row]]:
    """The settings and the rows in `folder`; None and [] if there are none. Ignores an incomplete last line."""
    if (folder / ROWS).exists():
        text = (folder / ROWS).read_text(encoding="utf-8")
    elif (folder / COMPRESSED).exists():
        text = lzma.decompress((folder / COMPRESSED).read_bytes()).decode()
    else:
        return None, []
    settings, *rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")] or [None]
    return settings, rows


def open_rows(folder: Path, settings: Row) -> list[Row]:
    """The rows in `folder`, whose file is made ready for more.

    Raises ValueError if they were made with other settings, OutputError if the folder takes no files.
    """
    found, rows = read_rows(prepare_folder(folder))
    if found is not None and found != settings:
        raise ValueError(
            f"{folder} holds rows of another model or setting ({json.dumps(found)}, here {json.dumps(settings)}); "
            f"choose another --out"
        )
    with whole_file(folder / ROWS) as partial:
        partial.write_text(lines_of([settings, *rows]), encoding="utf-8")
    return rows


def lines_of(rows: Iterable[Row]) -> str:
    """The rows as lines of a file."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """A row with as many digits as are kept, those in lists fewer."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each, DIGITS_IN_LISTS) for each in value] if isinstance(value, list) else value
