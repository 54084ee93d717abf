"""Translations say all that English says, in files that ComfyUI reads and messages that its frontend takes."""

import json
import re
from pathlib import Path

import pytest

from lightforcing.lightforcing_core.attention.policies import POLICIES
from lightforcing.tools import help_tables

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
FILES = ("main", "nodeDefs", "settings")  # of the four that ComfyUI reads; there are no commands to translate
OTHERS = sorted(folder.name for folder in LOCALES.iterdir() if folder.name != "en")
NUMBER = re.compile(r"(?<![\w.])\d[\d.]*\b", re.ASCII)


def texts(language, name):
    """{path: text} of one file, such as {"LightForcingApply/inputs/model/name": "model"}."""

    def flatten(value, path):
        if isinstance(value, str):
            return {path: value}
        return {key: text for part in value for key, text in flatten(value[part], f"{path}/{part}".lstrip("/")).items()}

    return flatten(json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8")), "")


def test_both_languages_are_there():
    assert "zh" in OTHERS
    for language in ("en", *OTHERS):
        assert sorted(path.name for path in (LOCALES / language).iterdir()) == sorted(f"{name}.json" for name in FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", OTHERS)
def test_translation_has_each_text_and_no_other(language, name):
    english, translated = texts("en", name), texts(language, name)
    assert set(translated) == set(english)
    assert all(text.strip() for text in translated.values())
    if language == "zh" and name == "nodeDefs":
        spoken = {path: text for path, text in translated.items() if path.endswith(("/tooltip", "/description"))}
        assert all(re.search(r"[\u4e00-\u9fff]", text) for text in spoken.values())


@pytest.mark.parametrize("language", OTHERS)
def test_translation_names_the_same_numbers(language):
    """A value that changes in a tooltip has to change in its translation."""
    english, translated = texts("en", "nodeDefs"), texts(language, "nodeDefs")
    for path in (path for path in english if path.endswith(("/tooltip", "/description"))):
        assert len(english[path]) > 20, path
        assert set(NUMBER.findall(translated[path])) == set(NUMBER.findall(english[path])), path


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_no_message_holds_what_the_frontend_would_interpret(language):
    """vue-i18n reads { } @ | in a message; only the tooltips of nodes are shown as they are."""
    for name in FILES:
        for path, text in texts(language, name).items():
            if name != "nodeDefs" or not path.endswith("/tooltip"):
                assert not set("{}@|") & set(text), f"{name}: {path}"


def test_settings_are_those_of_the_page():
    page = (ROOT / "nodes" / "web" / "js" / "page.js").read_text(encoding="utf-8")
    identity = re.search(r'SETTING = "([\w.]+)"', page).group(1).replace(".", "_")
    for path, text in texts("en", "settings").items():
        assert path.startswith(f"{identity}/")
        assert f'"{text}"' in page
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes" / "web" / "js").glob("*.js"))
    for category in texts("en", "main"):
        section, _, name = category.partition("/")
        used = f'textOf("{name}")' in scripts if section == "lightForcing" else f'"{name}"' in page
        assert used or section == "nodeCategories"


def test_every_node_has_a_help_page_in_each_language_and_no_page_is_left_over():
    """The frontend falls back to NODE.md if there is no NODE/LANGUAGE.md, so NODE.md is English."""
    nodes = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    wanted = {f"{node}.md" for node in nodes} | {f"{node}/{language}.md" for node in nodes for language in OTHERS}
    assert {path.relative_to(help_tables.PAGES).as_posix() for path in help_tables.PAGES.rglob("*.*")} == wanted


@pytest.mark.parametrize("language", help_tables.HEADS)
def test_help_pages_are_titled_as_the_node_and_list_its_inputs(language):
    for node, texts in help_tables.texts(language).items():
        page = help_tables.page_of(node, language).read_text(encoding="utf-8")
        assert page.startswith(f"# {texts['display_name']}\n")
        assert page == help_tables.renewed(node, language), f"{node}, {language}: run `make help-tables`"


@pytest.mark.parametrize("language", help_tables.HEADS)
def test_help_says_of_each_policy_what_it_is_for(language):
    page = help_tables.page_of("LightForcingModelLoader", language).read_text(encoding="utf-8")
    for name, policy in POLICIES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` | ")]
        assert policy.standing in row
