"""The canvas in Chinese: titles, widgets and help pages are in the reader's language, English ones where none is."""

import json
from pathlib import Path

import pytest

from .conftest import Canvas
from .tiny import tiny_text_to_video

ROOT = Path(__file__).resolve().parents[2]
TEXTS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture
def speaking(server, browser):
    """Open the frontend in a language, and set English again afterwards."""
    opened = []

    def in_language(language):
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Locale": language})
        opened.append(Canvas(browser.new_page(viewport={"width": 1600, "height": 1000}), server.url))
        return opened[-1]

    yield in_language
    server.post("/settings", {"Comfy.Locale": "en"})
    for canvas in opened:
        canvas.page.close()


def labels_of(canvas, kind):
    """{name: label} of a node's widgets."""
    return canvas.evaluate(
        """(kind) => Object.fromEntries(
            app.rootGraph.nodes.find((node) => node.type === kind).widgets.map((one) => [one.name, one.label]))""",
        kind,
    )


def open_help(canvas, kind):
    """Select the node and press the selection's info button; the text of the page that comes."""
    canvas.evaluate("(kind) => app.canvas.selectNode(app.rootGraph.nodes.find((one) => one.type === kind))", kind)
    canvas.page.locator(".selection-toolbox button:has([class*='info'])").first.click()
    page = canvas.page.locator(".node-help-content")
    page.locator("h1").wait_for(timeout=30000)
    return page.inner_text()


def test_titles_widgets_and_help_are_chinese(speaking):
    canvas = speaking("zh")
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
    text = open_help(canvas, "LightForcingSampler")
    assert text.startswith(TEXTS["LightForcingSampler"]["display_name"])
    assert "kv_cache（KV 缓存）" in text


def test_other_languages_fall_back_to_english(speaking):
    canvas = speaking("fr")
    canvas.open_graph(tiny_text_to_video(9))
    assert labels_of(canvas, "LightForcingSampler")["steps"] == "steps"
    assert open_help(canvas, "LightForcingSampler").startswith("Light Forcing Sampler")
