"""The schemas that a user sees: every input explained and bounded, and a help page for each node."""

import urllib.request
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "nodes" / "web" / "docs"


@pytest.fixture(scope="module")
def info(server):
    return {name: node for name, node in server.get("/object_info").items() if name.startswith("LightForcing")}


def inputs_of(fields):
    """(name, type, options) of every input, those of each preset included."""
    for group in ("required", "optional"):
        for name, spec in fields.get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            yield name, kind, options
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for option in options["options"]:
                    yield from inputs_of(option["inputs"])


def test_every_input_and_output_says_its_consequence(info):
    for name, node in info.items():
        assert node["category"] == "Light Forcing"
        assert node["display_name"].startswith("Light Forcing")
        assert node["description"].endswith(".")
        for field, _, options in inputs_of(node["input"]):
            assert len(options.get("tooltip", "")) > 20, f"{name}.{field}"
        assert all(node["output_tooltips"]), name


def test_every_number_is_bounded_and_every_widget_has_a_default(info):
    for name, node in info.items():
        for field, kind, options in inputs_of(node["input"]):
            if kind in ("INT", "FLOAT"):
                assert {"default", "min", "max", "step"} <= set(options), f"{name}.{field}"
                assert options["min"] <= options["default"] <= options["max"], f"{name}.{field}"
            elif kind in ("STRING", "BOOLEAN"):
                assert "default" in options, f"{name}.{field}"


def test_help_pages_are_served(info, server):
    for place in (place for name in info for place in (f"{name}.md", f"{name}/zh.md")):
        url = f"{server.url}/extensions/Renamed_pack-2/docs/{place}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read().decode() == (DOCS / place).read_text(encoding="utf-8")
