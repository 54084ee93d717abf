"""The package's own files agree with each other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH_FAMILY = re.compile(
    r"^(torch|torchvision|torchaudio|triton|triton-windows|flash-attn.*|xformers)\b", re.IGNORECASE
)


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_those_of_pyproject(project):
    assert sorted(requirements("requirements.txt")) == sorted(project["dependencies"])


def test_users_torch_is_never_touched(project):
    for line in (*requirements("requirements.txt"), *project["dependencies"]):
        assert not TORCH_FAMILY.match(line), line


def test_development_tools_are_pinned():
    for line in requirements("requirements-dev.txt"):
        assert re.match(r"^[\w-]+==[\w.]+(;|$)", line), line


def test_license_is_the_one_declared(project):
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_version_has_its_release_notes(project):
    """What the publish workflow runs: the tag fits the version, and the changelog has something to say of it."""

    def notes(*tag):
        command = [sys.executable, str(ROOT / ".ci" / "release_notes.py"), *tag]
        return subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")

    done = notes(f"v{project['version']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("### ")
    assert "\n## [" not in done.stdout
    refused = notes("v0.0.1")
    assert refused.returncode != 0
    assert f"tag the release as v{project['version']}" in refused.stderr


def test_changelog_links_every_version(project):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    released = versions[versions[0] == "Unreleased" :]
    assert released[0] == project["version"]
    assert released == sorted(released, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    for version in versions:
        assert f"[{version}]: {project['urls']['Repository']}/" in changelog


def nodes_of(value):
    """Every node of a graph, those inside its subgraphs included."""
    if isinstance(value, dict):
        if "properties" in value and "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from nodes_of(part)


@pytest.mark.parametrize("path", [*ROOT.glob("workflows/*.json"), *ROOT.glob("subgraphs/*.json")], ids=lambda p: p.stem)
def test_graphs_name_the_version_that_made_them(path, project):
    graph = json.loads(path.read_text(encoding="utf-8"))
    ours = [
        node
        for node in nodes_of(graph)
        if node["type"].startswith("LightForcing") or node["properties"].get("cnr_id") == project["name"]
    ]
    assert ours
    for node in ours:
        assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == (project["name"], project["version"])
