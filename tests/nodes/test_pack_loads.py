"""The pack loads in a real ComfyUI, quietly and under any folder name, and is served in each language."""

import json

import httpx
import pytest

from ..support.comfy_server import Failed
from ..support.graphs import graph, loader
from .conftest import ROOT

DOCS = ROOT / "nodes" / "web" / "docs"


def test_server_loads_the_pack_without_a_warning(server):
    about_us = [
        line for line in server.start_log.splitlines() if "Renamed_pack-2" in line or "light forcing" in line.lower()
    ]
    assert any("seconds" in line for line in about_us)  # ComfyUI's list of import times
    assert not [line for line in about_us if "FAILED" in line or "WARNING" in line or "Error" in line], about_us


def test_errors_are_shown_without_the_path_of_the_folder(server):
    prompt_id = server.queue(graph({"model": loader(weights="ema")}))
    with pytest.raises(Failed, match="has no weights named 'ema', but one set without a name"):
        server.wait(prompt_id)
    messages = dict(server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"])
    assert messages["execution_error"]["exception_type"] == "light_forcing.CheckpointError"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_host_serves_texts_and_help_pages(server, language):
    served = server.get("/i18n")[language]
    for part in ("nodeDefs", "settings", "main"):
        texts = json.loads((ROOT / "locales" / language / f"{part}.json").read_text(encoding="utf-8"))
        for section, found in {part: texts}.items() if part != "main" else texts.items():
            assert served[section].items() >= found.items()
    for node in served["nodeDefs"].keys() & {path.stem for path in DOCS.glob("*.md")}:
        place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
        page = httpx.get(f"{server.url}/extensions/Renamed_pack-2/docs/{place}", timeout=30)
        assert page.text == (DOCS / place).read_text(encoding="utf-8")
