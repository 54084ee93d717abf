"""The package's own files agree with each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
