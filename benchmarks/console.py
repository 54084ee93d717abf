"""Commands made from settings: an option per field, a table, raw JSON in a file."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

Settings = TypeVar("Settings")
# The record, its table or tables, and lines to print below.
Measured = tuple[dict[str, Any], Table | Group, list[str]]
Measure = Callable[[Settings, Callable[[str], object]], Measured]
Out = Annotated[Path | None, typer.Option(help="File for the raw JSON; by default only the table is printed.")]


def measurement(app: typer.Typer, kind: type[Settings]) -> Callable[[Measure[Settings]], Measure[Settings]]:
    """Register `measure(settings, say)` as a command with its name; `say` shows progress."""

    def register(measure: Measure[Settings]) -> Measure[Settings]:
        command = partial(carry_out, measure)
        app.command(measure.__name__, help=measure.__doc__)(with_options(kind, command, Out, None))
        return measure

    return register


def carry_out(measure: Measure[Settings], settings: Settings, out: Path | None) -> dict[str, Any]:
    """Measure, print the tables and write the record, which is returned."""
    console = new_console()
    with console.status("running") as status:
        result, table, lines = measure(settings, status.update)
    show(console, result, table, lines)
    if out is not None:
        from .record import write

        write(out, result)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return result


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


def new_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def table_of(title: str, rows: list[dict[str, Any]] | dict[str, Any]) -> Table:
    """A line per row and a column per key that holds no list; of a dict, a line per fact."""
    if isinstance(rows, dict):
        pairs = [(key, value if isinstance(value, dict) else {"": value}) for key, value in rows.items()]
        rows = [{title: f"{key} {name}".strip(), "": one} for key, inner in pairs for name, one in inner.items()]
    headings = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list))
    table = new_table("" if title in headings else title, *headings)
    for row in rows:
        table.add_row(*(_cell(row.get(heading)) for heading in headings))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(map(_cell, value.values()))
    return "" if value is None else str(value)


def ratio_text(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f}x ({low:.2f}-{high:.2f})"


def new_console() -> Console:
    """A console; for a file or a pipe, with lines long enough for the tables."""
    return Console(width=None if Console().is_terminal else 120)


def show(console: Console, result: dict[str, Any], table: Table | Group, lines: list[str]) -> None:
    console.print(table)
    facts = result.get("facts", result)
    gpu = f", {facts['gpu']['name']}" if facts.get("gpu") else ""
    place = facts and [
        f"{facts['machine']}{gpu}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}"
    ]
    warm_up = [f"warm-up: {result['warm_up']}"] if "warm_up" in result else []
    for line in [*place, *warm_up, *lines]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
