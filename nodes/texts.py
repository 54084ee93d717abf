"""The texts of the nodes: names, descriptions and tooltips, all of them from `locales/en/nodeDefs.json`."""

import json
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from comfy_api.latest import io

TEXTS: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")
)


def with_texts(define: Callable[[type], io.Schema]) -> Callable[[type], io.Schema]:
    """Decorate `define_schema` to add display name, description and tooltips."""

    @wraps(define)
    def described(cls: type) -> io.Schema:
        schema = define(cls)
        texts = TEXTS[schema.node_id]
        schema.display_name, schema.description = texts["display_name"], texts["description"]
        for key, field in inputs_of(schema.inputs):
            field.tooltip = texts["inputs"][key]["tooltip"]
        for index, output in enumerate(schema.outputs):
            output.tooltip = texts["outputs"][str(index)]["tooltip"]
        return schema

    return described


def inputs_of(inputs: list[io.Input], prefix: str = "") -> Iterator[tuple[str, io.Input]]:
    """(key, input) of all inputs; an input of a preset has the key `preset_name`."""
    for field in inputs:
        yield f"{prefix}{field.id}", field
        if isinstance(field, io.DynamicCombo.Input):
            for option in field.options:
                yield from inputs_of(option.inputs, f"{prefix}{field.id}_")
