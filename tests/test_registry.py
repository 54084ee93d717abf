"""What the ComfyUI registry asks of a pack: its metadata, what is published of it, and how.

The rules are those of docs.comfy.org/registry (specifications, publishing, standards) and of its client, comfy-cli,
which drops a field that breaks them with no more than a warning.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("OS Independent", "Microsoft", "POSIX", "MacOS")
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
BOUND = re.compile(r"(==|>=|<=|!=|~=|>|<|=)?\s*\d+\.\d+\.\d+(-[a-zA-Z0-9]+)?")
FIELDS = {
    "PublisherId",
    "DisplayName",
    "Icon",
    "Banner",
    "requires-comfyui",
    "includes",
}  # never `web`: see __init__.py
NEEDED = [
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "benchmarks/commands.py",
    "cli/main.py",
    "kernels/block_sparse.py",
    "nodes/web/docs/LightForcingSampler.md",
    "nodes/web/docs/LightForcingSampler/zh.md",
    "nodes/web/js/live_view.js",
    "locales/en/nodeDefs.json",
    "locales/zh/main.json",
    "workflows/models/diffusion_models/light_forcing_demo.safetensors",
    "workflows/models/vae/light_forcing_demo_vae.safetensors",
    "workflows/models/light_forcing_demo_text.safetensors",
    "workflows/quickstart_demo.json",
    "workflows/text_to_video_5s.json",
    "workflows/text_to_video_5s.jpg",
    "workflows/api/text_to_video_5s.json",
    "subgraphs/Light Forcing text to video.json",
]
LEFT_OUT = ("tests/", "laboratory/", "docs/", "benchmarks/results/", ".github/", ".ci/", "Makefile", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def metadata():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(metadata):
    return metadata["project"]


@pytest.fixture(scope="module")
def comfy(metadata):
    return metadata["tool"]["comfy"]


def test_name_can_be_a_registry_id(project):
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", project["name"])
    assert len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower()


def test_version_is_semantic_and_everything_recommended_is_said(project):
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert 20 < len(project["description"]) < 300
    assert project["requires-python"].startswith(">=3.")
    assert (ROOT / project["readme"]).is_file()
    assert all((ROOT / name).is_file() for name in project["license-files"])


def test_repository_is_the_one_that_the_readme_clones(project):
    repository = project["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", repository)
    assert not repository.endswith(".git")
    assert f"git clone {repository}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(url.startswith(repository) for url in project["urls"].values())


def test_classifiers_are_on_the_registrys_list(project):
    systems = [c.partition(" :: ")[2] for c in project["classifiers"] if c.startswith("Operating System ::")]
    accelerators = [c.partition(" :: ")[2] for c in project["classifiers"] if c.startswith("Environment ::")]
    assert systems
    assert all(system.startswith(SYSTEMS) for system in systems)
    assert accelerators
    assert set(accelerators) <= ACCELERATORS
    assert len(systems) + len(accelerators) == len(project["classifiers"])


def test_bounds_are_such_as_the_client_understands(project, comfy):
    bounds = [comfy["requires-comfyui"]]
    for line in project["dependencies"]:
        name, _, bound = line.partition("comfyui-frontend-package")
        bounds += [bound] if bound and not name else []
    for bound in bounds:
        assert all(BOUND.fullmatch(part.strip()) for part in bound.split(",")), bound


def test_publisher_is_the_owner_and_every_field_is_one_that_is_read(project, comfy):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", comfy["PublisherId"])
    assert project["urls"]["Repository"].split("/")[3] == comfy["PublisherId"]
    assert comfy["DisplayName"].strip()
    assert set(comfy) <= FIELDS


def test_icon_is_a_small_square_in_the_repository(project, comfy):
    owner_and_name = project["urls"]["Repository"].removeprefix("https://github.com/")
    prefix = f"https://raw.githubusercontent.com/{owner_and_name}/main/"
    assert comfy["Icon"].startswith(prefix)
    with Image.open(ROOT / comfy["Icon"].removeprefix(prefix)) as icon:
        assert icon.format in ("PNG", "JPEG", "GIF")
        assert icon.width == icon.height <= 400


def test_shipped_code_keeps_to_the_registrys_standards():
    """No eval or exec, no installing at run time, one statement per line, and no script that Manager would run."""
    assert not [name for name in ("install.py", "prestartup_script.py", "uninstall.py") if (ROOT / name).exists()]
    for folder in ("kernels", "lightforcing_core", "nodes", "benchmarks"):
        for path in ROOT.joinpath(folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), f"{path.name}:{node.lineno}"
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


@pytest.mark.parametrize("name", NEEDED)
def test_everything_that_runs_is_published(name, published):
    assert name in published


def test_what_only_developers_need_is_not_published(published):
    assert not [name for name in published if name.startswith(LEFT_OUT)]


def test_everything_that_a_node_or_the_command_line_reads_is_published(published):
    here = [path for pattern in ("*/**/*.py", "nodes/web/**/*.*", "locales/**/*.json") for path in ROOT.glob(pattern)]
    parts = ("nodes", "lightforcing_core", "kernels", "benchmarks", "locales")
    names = {path.relative_to(ROOT).as_posix() for path in here if path.relative_to(ROOT).parts[0] in parts}
    assert names - published == set()


def test_workflows_are_yaml_and_test_the_oldest_version_that_is_promised(comfy):
    jobs = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        for path in ROOT.glob(".github/workflows/*.yml")
    }
    tried = jobs["comfyui"]["test"]["strategy"]["matrix"]["comfyui"]
    assert tried == [f"v{comfy['requires-comfyui'].removeprefix('>=')}", "master"]
    assert jobs["comfyui"]["test"]["steps"][-1] == {"run": "make test-comfyui"}
    assert jobs["publish"]["publish"]["needs"] == "test"
    (publish,) = [step for step in jobs["publish"]["publish"]["steps"] if "publish-node-action" in step.get("uses", "")]
    assert publish["with"]["personal_access_token"] == "${{ secrets.REGISTRY_ACCESS_TOKEN }}"
