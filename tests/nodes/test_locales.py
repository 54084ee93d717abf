"""ComfyUI serves each language, and the help pages in it, to its frontend."""

import json
import urllib.request

import pytest

from .conftest import ROOT

DOCS = ROOT / "nodes" / "web" / "docs"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_host_serves_texts_and_help_pages(server, language):
    served = server.get("/i18n")[language]
    for part in ("nodeDefs", "settings", "main"):
        texts = json.loads((ROOT / "locales" / language / f"{part}.json").read_text(encoding="utf-8"))
        for section, found in {part: texts}.items() if part != "main" else texts.items():
            assert served[section].items() >= found.items()
    for node in served["nodeDefs"].keys() & {path.stem for path in DOCS.glob("*.md")}:
        place = f"{node}.md" if language == "en" else f"{node}/{language}.md"
        with urllib.request.urlopen(f"{server.url}/extensions/Renamed_pack-2/docs/{place}", timeout=30) as answer:
            assert answer.read().decode() == (DOCS / place).read_text(encoding="utf-8")
