"""A page of the real frontend in headless Chromium, on a server with tiny weights.

Needs what `tests/nodes` needs, Playwright, and a Chromium (`CHROMIUM`, or one on the PATH); else these tests skip.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..nodes.conftest import comfyui, models, server, start_server  # noqa: F401
from ..support.comfy_server import ComfyServer

HERE = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
EMPTY = {"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}}
# Errors of ComfyUI's frontend itself, and of files that it cannot fetch without a network.
NOT_OURS = (
    "/userdata",
    "user.css",
    "favicon.ico",
    "huggingface.co",
    "civitai.com",
    "api.comfy.org",
    "missingModelDownload",
    "onNodeOutputsUpdated",  # of nodes without an output, when a tab is opened again
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a ComfyUI or a browser these tests skip, one line per file."""
    missing = [name for name in ("COMFYUI_PATH", "COMFYUI_PYTHON") if not os.environ.get(name)]
    missing += ["playwright"] * (importlib.util.find_spec("playwright") is None) + ["chromium"] * (CHROMIUM is None)
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"no browser tests without {', '.join(missing)}")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # not there where these tests skip

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(params=["litegraph", "vue"])
def canvas(request: pytest.FixtureRequest, server: ComfyServer, browser: Any) -> Iterator["Canvas"]:  # noqa: F811
    """The frontend with an empty graph, once with nodes drawn by litegraph and once by Vue."""
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param == "vue"}
    server.post("/settings", settings)
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    opened = Canvas(page, server.url)
    yield opened
    page.close()
    assert not opened.errors


class Canvas:
    """One open page. `errors` holds what went wrong in it since it was ready."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.goto(url)
        page.wait_for_function("window.app?.isGraphReady && !!window.app.extensionManager")
        page.wait_for_function("!document.querySelector('.p-blockui-mask')")
        self.evaluate("() => new Promise((done) => setTimeout(done, 1500))")
        self.evaluate("(document) => app.loadGraphData(document)", EMPTY)  # instead of ComfyUI's first graph
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_console(self, message: Any) -> None:
        said = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in said for part in NOT_OURS):
            self.errors.append(said)

    def evaluate(self, script: str, *arguments: Any) -> Any:
        return self.page.evaluate(script, *arguments)

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """Wait until a JavaScript expression is true; its value."""
        return self.page.wait_for_function(script, timeout=1000 * seconds).json_value()

    def open_graph(self, document: dict[str, Any]) -> None:
        """Load a UI-form workflow."""
        self.evaluate("(document) => app.loadGraphData(document)", document)
        self.wait_for(f"app.rootGraph.nodes.length >= {len(document['nodes'])}")

    def nodes(self) -> list[dict[str, Any]]:
        """Type, and whether the frontend knows it, of every node, those in subgraphs too."""
        return self.evaluate(
            """() => {
                const inner = (node) => (node.subgraph ? all(node.subgraph) : []);
                const all = (graph) => graph.nodes.flatMap((node) => [node, ...inner(node)]);
                const known = (node) => node.type in LiteGraph.registered_node_types;
                return all(app.rootGraph).map((node) => ({ type: node.type, known: known(node) }));
            }"""
        )
