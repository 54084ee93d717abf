"""The schemas of the nodes, with names, descriptions and tooltips from `locales/en/nodeDefs.json`.

Their `validate_inputs` raise ValueError, which ComfyUI shows once: it would repeat a returned reason for every input.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_api.latest import io

TEXTS: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")
)


def node_schema(node_id: str, **fields: Any) -> io.Schema:
    """The schema of a node of this pack: `fields`, its texts and its category."""
    texts = TEXTS[node_id]
    schema = io.Schema(node_id, texts["display_name"], "Light Forcing", description=texts["description"], **fields)
    for key, field in inputs_of(schema.inputs):
        field.tooltip = texts["inputs"].get(key, {}).get("tooltip")  # a policy from elsewhere may have no text
    for index, output in enumerate(schema.outputs):
        output.tooltip = texts["outputs"][str(index)]["tooltip"]
    return schema


def inputs_of(inputs: list[io.Input], prefix: str = "") -> Iterator[tuple[str, io.Input]]:
    """(key, input) of all inputs; an input of a preset has the key `preset_name`."""
    for field in inputs:
        yield f"{prefix}{field.id}", field
        if isinstance(field, io.DynamicCombo.Input):
            for option in field.options:
                yield from inputs_of(option.inputs, f"{prefix}{field.id}_")
