"""Every node's schema: its numbers are bounded, and its texts are those of locales/en/nodeDefs.json."""

import json
from pathlib import Path

import comfyui
from comfyui import io

inputs_of, found = comfyui.module("nodes.texts").inputs_of, {}
for node in comfyui.module("nodes").NODES:
    info, schema = node.GET_NODE_INFO_V1(), node.GET_SCHEMA()
    # The frontend names an output that is called like its type by the type.
    rows = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    outputs = [{"tooltip": tip} if name == kind else {"name": name, "tooltip": tip} for kind, name, tip in rows]
    found[schema.node_id] = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {key: {"name": field.id, "tooltip": field.tooltip} for key, field in inputs_of(schema.inputs)},
        "outputs": {str(index): output for index, output in enumerate(outputs)},
    }
    assert info["category"] == "Light Forcing"
    for key, field in inputs_of(schema.inputs):
        if isinstance(field, io.Int.Input | io.Float.Input):
            assert field.min <= field.default <= field.max, (schema.node_id, key)
            assert field.step, (schema.node_id, key)
        assert not isinstance(field, io.String.Input | io.Boolean.Input) or field.default is not None, key
texts = json.loads(Path(comfyui.PACK, "locales", "en", "nodeDefs.json").read_text(encoding="utf-8"))
assert texts.keys() == found.keys()
for name, expected in texts.items():
    assert found[name] == expected, name
