"""Every input has its English text and no text is left over, and ComfyUI serves each language to its frontend."""

import json
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"


def read(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def test_schemas_show_all_english_texts(run_inside):
    expected = run_inside("node_texts")
    found = read("en", "nodeDefs")
    assert set(found) == set(expected)
    for node, texts in expected.items():
        assert found[node] == texts, node


@pytest.mark.parametrize("language", ["en", "zh"])
def test_host_serves_the_texts(server, language):
    served = server.get("/i18n")[language]
    assert served["nodeDefs"].items() >= read(language, "nodeDefs").items()
    assert served["settings"].items() >= read(language, "settings").items()
    for section, texts in read(language, "main").items():
        assert served[section].items() >= texts.items()
