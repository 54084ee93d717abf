"""Commands made from settings: an option per field, a record of what was measured, its tables, raw JSON in a file.

A record has sections of named rows, in JSON types, that name no path, user or machine.
"""

import inspect
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..lightforcing_core.files.output import prepare_folder, whole_file
from .settings import Say

Record = dict[str, Any]
Put = Callable[[str, str, Any], object]  # puts a value or columns of a row into a section: put(section, row, value)
# The folders of a path that begins at a root or a drive.
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\s\\/:;'\"]+)*[\\/]+(?=[^\s\\/])")
Settings = TypeVar("Settings")
Measure = Callable[[Settings, Put, Say], object]  # puts rows; `Say` shows progress
Out = Annotated[Path | None, typer.Option(help="File for the raw JSON; by default only tables are printed.")]
ONLY_IN_JSON = ("arguments", "ms")


def carry_out(measure: Measure[Settings], settings: Settings, out: Path | None) -> Record:
    """Measure, print the tables and write the record, which is returned."""
    console = Console(width=None if Console().is_terminal else 120)  # lines of a file are long enough for tables
    record: Record = {}
    with console.status("running") as status:
        measure(settings, partial(add, record), status.update)
    for section, rows in record.items():
        if isinstance(rows, dict) and rows and section not in ONLY_IN_JSON:
            console.print(table_of(section, rows))
    if "ok" in record:
        console.print("all is well" if record["ok"] else "something is wrong")
    if out is not None:
        write(out, record)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return record


def table_of(title: str, rows: dict[str, Any]) -> Table:
    """A line per row and a column per key; a row without keys has one value."""
    columns = {name: row if isinstance(row, dict) else {"": row} for name, row in rows.items()}
    headings = list(dict.fromkeys(key for row in columns.values() for key in row))
    table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.show_header = headings != [""]
    table.add_column(no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in columns.items():
        table.add_row(name, *(_cell(row.get(heading)) for heading in headings))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict) and "median" in value:
        return f"{_cell(value['median'])} ({_cell(value['low'])}-{_cell(value['high'])})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "; ".join(map(_cell, value))
    return "" if value is None else str(value)


def with_options(
    kind: type[Settings], run: Callable[[Settings, Any], object], out: Any, default: Any
) -> Callable[..., None]:
    """A function for typer that calls `run(settings, out)`, an option per setting.

    kind: a dataclass with a default for every field, annotated with its help and, for a number, its minimum. Fields of
    nested dataclasses become options too; a tuple is written with commas, or the option is repeated.
    """

    def command(out: Any, **given: Any) -> None:
        run(_replaced(kind(), given), out)

    place = inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=out)
    signature = inspect.Signature([place, *_parameters(kind())])
    command.__signature__ = signature  # type: ignore[attr-defined]
    return command


def _parameters(settings: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _parameters(value)
            continue
        kind: Any
        kind, text, *least = get_args(hints[field.name])
        if get_origin(kind) is tuple:
            kind, value = list[str], [",".join(map(str, value))] if value else []
        elif get_origin(kind) is Literal:
            kind = str
        annotation = Annotated[kind, typer.Option(help=text, min=least[0] if least else None)]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _replaced(settings: Any, given: dict[str, Any]) -> Any:
    """`settings` with the values of the command line."""
    hints = get_type_hints(type(settings))
    changes = {}
    for field in fields(settings):
        kind: Any = hints[field.name]
        value: Any = given.get(field.name)
        if is_dataclass(kind):
            value = _replaced(getattr(settings, field.name), given)
        elif get_origin(kind) is tuple:
            value = _values(",".join(value), field.name, *get_args(kind))
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{field.name} {value!r} is not known; use {', '.join(get_args(kind))}")
        changes[field.name] = value
    return replace(settings, **changes)


def _values(text: str, name: str, kind: type, *others: Any) -> tuple[Any, ...]:
    """ "2-4,7" as (2, 3, 4, 7) in a tuple of kind, others. Raises ValueError for other text or another count."""
    values: list[Any] = []
    try:
        for part in filter(None, map(str.strip, text.split(","))):
            first, dash, last = part.partition("-")
            values += range(int(first), int(last) + 1) if kind is int and dash else [kind(part)]
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a list of numbers like 2-4,7") from None
    if ... not in others and len(values) != 1 + len(others):
        raise ValueError(f"{name} {text!r} is not a list of {1 + len(others)} numbers")
    return tuple(values)


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
