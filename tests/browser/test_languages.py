"""The canvas in Chinese: titles, widgets and help pages are in the reader's language."""

import json
from pathlib import Path

import pytest

from .conftest import Canvas
from .test_panel import NOTES, SEND
from .tiny import tiny_text_to_video

ROOT = Path(__file__).resolve().parents[2]
SELECT = "(kind) => app.canvas.selectNode(app.rootGraph.nodes.find((one) => one.type === kind))"
TEXTS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture
def canvas(server, browser):
    """The frontend in Chinese."""
    server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Locale": "zh"})
    opened = Canvas(browser.new_page(viewport={"width": 1600, "height": 1000}), server.url)
    yield opened
    server.post("/settings", {"Comfy.Locale": "en"})
    opened.page.close()


def test_a_cancelled_run_is_named_in_chinese(canvas):
    document = tiny_text_to_video(9)
    canvas.open_graph(document)
    sampler = next(node["id"] for node in document["nodes"] if node["type"] == "LightForcingSampler")
    canvas.evaluate(SEND, ["execution_interrupted", {"prompt_id": "one", "node_id": str(sampler)}])
    canvas.wait_for(f"{NOTES} === '已取消'")


def labels_of(canvas, kind):
    """{name: label} of a node's widgets."""
    return canvas.evaluate(
        """(kind) => Object.fromEntries(
            app.rootGraph.nodes.find((node) => node.type === kind).widgets.map((one) => [one.name, one.label]))""",
        kind,
    )


def test_titles_widgets_and_help_are_chinese(canvas):
    canvas.open_graph(tiny_text_to_video(9))  # with every model, so that no error panel covers the canvas
    for kind, name in (("LightForcingSampler", "seed"), ("LightForcingSchedule", "length")):
        assert labels_of(canvas, kind)[name] == TEXTS[kind]["inputs"][name]["name"]
    canvas.evaluate(
        """() => {
            const node = app.rootGraph.nodes.find((one) => one.type === "LightForcingSchedule");
            node.widgets.find((one) => one.name === "preset").value = "custom";
        }"""
    )
    labels = labels_of(canvas, "LightForcingSchedule")
    for field in ("target", "window", "sink_rope", "sparsity"):
        assert labels[f"preset.{field}"] == TEXTS["LightForcingSchedule"]["inputs"][f"preset_{field}"]["name"]
    canvas.evaluate(SELECT, "LightForcingSampler")
    canvas.page.locator(".selection-toolbox button:has([class*='info'])").first.click()
    page = canvas.page.locator(".node-help-content")
    page.locator("h1").wait_for(timeout=30000)
    text = page.inner_text()
    assert text.startswith(TEXTS["LightForcingSampler"]["display_name"])
    assert "kv_cache（KV 缓存）" in text
