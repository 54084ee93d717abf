"""The package's own files agree with each other, everything that runs is published, and public names are light."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightforcing

ROOT = Path(__file__).parents[1]
NEEDED = ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md")
LEFT_OUT = ("tests/", "laboratory/", "docs/", "benchmarks/results/", ".github/", ".ci/", "Makefile", "CONTRIBUTING.md")
TORCH_FAMILY = re.compile(
    r"^(torch|torchvision|torchaudio|triton|triton-windows|flash-attn.*|xformers)\b", re.IGNORECASE
)


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def metadata():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(metadata):
    return metadata["project"]


def test_requirements_are_those_of_pyproject_without_the_frontend(project):
    """ComfyUI reads the frontend's lower bound from pyproject.toml; pip must never install another frontend."""
    bounds = [line for line in project["dependencies"] if line.startswith("comfyui-frontend-package>=")]
    assert len(bounds) == 1
    assert sorted(requirements("requirements.txt")) == sorted(set(project["dependencies"]) - set(bounds))


def test_a_wheel_has_every_package(metadata):
    code = "lightforcing_core", "kernels", "nodes", "cli", "benchmarks"
    found = {path.parent.relative_to(ROOT).parts for part in code for path in (ROOT / part).rglob("__init__.py")}
    assert sorted(metadata["tool"]["setuptools"]["packages"]) == sorted(
        ".".join(("lightforcing", *parts)) for parts in {(), *found}
    )


def test_users_torch_is_never_touched(project):
    for line in (*requirements("requirements.txt"), *project["dependencies"]):
        assert not TORCH_FAMILY.match(line), line


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


@pytest.mark.parametrize("path", [*ROOT.glob("workflows/*.json"), *ROOT.glob("subgraphs/*.json")], ids=lambda p: p.stem)
def test_graphs_name_the_version_that_made_them(path, project):
    found = []
    json.loads(path.read_text(encoding="utf-8"), object_hook=lambda one: found.append(one) or one)
    nodes = [(one["type"], one["properties"]) for one in found if "properties" in one and "type" in one]
    ours = [own for kind, own in nodes if kind.startswith("LightForcing") or own.get("cnr_id") == project["name"]]
    assert {(own["cnr_id"], own["ver"]) for own in ours} == {(project["name"], project["version"])}


def test_shipped_code_keeps_to_the_registrys_standards():
    """No installing at run time, and no script that Manager would run; ruff finds eval and exec."""
    assert not [name for name in ("install.py", "prestartup_script.py", "uninstall.py") if (ROOT / name).exists()]
    for folder in ("kernels", "lightforcing_core", "nodes", "cli", "benchmarks"):
        for path in ROOT.joinpath(folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"\bpip\b.*\binstall\b.*subprocess|subprocess.*\bpip\b", source), path.name
            assert not re.search(r"torch\.load\((?!.*weights_only=True)", source), path.name


@pytest.fixture(scope="module")
def published():
    """What `comfy node publish` packs: the repository's files without those that .comfyignore names."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what would be published cannot be listed")

    def listed(*options):
        command = ["git", "-c", "core.quotePath=false", "ls-files", "--cached", "--others", *options]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())

    return listed("--exclude-standard") - listed("--ignored", "--exclude-from=.comfyignore")


def test_what_only_developers_need_is_not_published(published):
    assert not [name for name in published if name.startswith(LEFT_OUT)]


def test_everything_that_runs_or_is_read_is_published(published):
    patterns = "*/**/*.py", "nodes/web/**/*.*", "locales/**/*.json", "workflows/**/*.*", "subgraphs/*.json"
    parts = "nodes", "lightforcing_core", "kernels", "cli", "benchmarks", "locales", "workflows", "subgraphs"
    here = [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    names = {path.as_posix() for path in here if path.parts[0] in parts}
    assert any(name.endswith(".safetensors") for name in names)
    assert (names | set(NEEDED)) - published == set()


def test_github_tests_the_oldest_comfyui_and_python_that_are_promised(metadata):
    jobs = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for path in ROOT.glob(".github/workflows/*.yml")
    }
    oldest = metadata["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    versions = [one["comfyui"] for one in jobs["comfyui"]["test"]["strategy"]["matrix"]["include"]]
    assert versions == [f"v{oldest}", "newest", "newest"]
    python = metadata["project"]["requires-python"].removeprefix(">=").partition(",")[0]
    assert jobs["test"]["test"]["strategy"]["matrix"]["python"][0] == python
    assert jobs["publish"]["publish"]["needs"] == "test"


@pytest.mark.parametrize("name", lightforcing.PUBLIC)
def test_public_name_comes_from_its_module(name):
    assert getattr(lightforcing, name) is not None


def test_rollout_is_the_function():
    assert lightforcing.rollout.__module__ == "lightforcing.lightforcing_core.rollout.loop"


def test_importing_the_package_imports_no_torch():
    script = "import sys, lightforcing; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
