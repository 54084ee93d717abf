"""Every node's schema: its numbers are bounded, and its texts are those of locales/en/nodeDefs.json."""

import json
from pathlib import Path

import comfyui


def inputs_of(fields, prefix=""):
    """(key, name, type, options) of every input. The frontend names an input of a preset `preset.name`, and turns
    dots into underscores when it looks texts up."""
    for group in ("required", "optional"):
        for name, spec in fields.get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            yield f"{prefix}{name}", name, spec[0], options
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                for option in options["options"]:
                    yield from inputs_of(option["inputs"], f"{prefix}{name}_")


def outputs_of(info):
    """Names and tooltips by position; the frontend names an output that is called like its type by the type."""
    rows = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    for index, (kind, name, tooltip) in enumerate(rows):
        yield str(index), {"tooltip": tooltip} if name == kind else {"name": name, "tooltip": tooltip}


texts = {}
for node in comfyui.module("nodes").NODES:
    info = node.GET_NODE_INFO_V1()
    texts[node.GET_SCHEMA().node_id] = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {key: {"name": name, "tooltip": o["tooltip"]} for key, name, _, o in inputs_of(info["input"])},
        "outputs": dict(outputs_of(info)),
    }
    assert info["category"] == "Light Forcing"
    for key, _, kind, options in inputs_of(info["input"]):
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], (info["name"], key)
            assert "step" in options, (info["name"], key)
        assert "default" in options or kind not in ("STRING", "BOOLEAN"), (info["name"], key)
found = json.loads(Path(comfyui.PACK, "locales", "en", "nodeDefs.json").read_text(encoding="utf-8"))
assert found.keys() == texts.keys()
for name, expected in texts.items():
    assert found[name] == expected, name
