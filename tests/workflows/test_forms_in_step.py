"""Each workflow has a canvas form and an API form, brings its models and looks right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from safetensors import safe_open

from lightforcing.lightforcing_core.demo.model import ABOUT, DIT, SHIPPED, TEXT, VAE, DemoVideo
from lightforcing.lightforcing_core.families import FAMILIES

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO = "light_forcing_1_quickstart"  # runs on the model that comes with the pack, nothing is downloaded
DOWNLOADS = re.compile(r"https://(huggingface\.co|civitai\.com)/.+\.(safetensors|sft|ckpt|pth|pt)")


def read(*parts):
    return json.loads(FOLDER.joinpath(*parts).read_text(encoding="utf-8"))


def nodes_of(name):
    return [node for node in read(f"{name}.json")["nodes"] if node["type"] != "MarkdownNote"]


def test_every_workflow_is_there_in_both_forms():
    kinds = ("quickstart", "text_to_video", "image_to_video", "long_video", "prompt_timeline", "continue_video")
    # ComfyUI's template search reads nothing but the file's name.
    assert [f"light_forcing_{place}_{kind}" for place, kind in enumerate(kinds, 1)] == NAMES
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_have_the_same_nodes(name):
    """`tests/browser` compares their inputs."""
    kinds = {key: node["class_type"] for key, node in read("api", f"{name}.json").items()}
    assert kinds == {str(node["id"]): node["type"] for node in nodes_of(name)}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_names_its_download(name):
    offered = {}
    for node in nodes_of(name):
        assert node["properties"]["Node name for S&R"] == node["type"]
        for model in node["properties"].get("models", []):
            assert DOWNLOADS.fullmatch(model["url"])
            assert model["url"].endswith(f"/{model['name']}")
            assert model["name"] in node["widgets_values"]
            offered[model["directory"]] = model["name"]
    wanted = set() if name == DEMO else {"diffusion_models", "text_encoders", "vae"}
    assert set(offered) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_length_is_set_in_one_place(name):
    api = read("api", f"{name}.json")
    lengths = {tuple(node["inputs"]["length"]) for node in api.values() if "length" in node["inputs"]}
    ((source, slot),) = lengths
    assert api[source]["class_type"] == "PrimitiveInt"
    assert (api[source]["inputs"]["value"] - 1) % 4 == slot == 0


@pytest.mark.parametrize("name", NAMES)
def test_note_and_thumbnail_come_along(name):
    (note,) = [node for node in read(f"{name}.json")["nodes"] if node["type"] == "MarkdownNote"]
    for node in nodes_of(name):
        for model in node["properties"].get("models", []):
            assert model["url"] in note["widgets_values"][0]
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.width == thumbnail.height >= 256  # cards are square
        colours = np.asarray(thumbnail.convert("YCbCr").resize((192, 108)), dtype=np.float32)[..., 1:]
    # In a picture colours change along outlines, in noise everywhere.
    changes = np.abs(np.diff(colours, axis=1)).max(axis=2) > 4
    assert sliding_window_view(changes, (24, 36)).mean(axis=(2, 3)).max() < 0.35
    assert (FOLDER / f"{name}.jpg").stat().st_size < 50_000


def test_quickstart_asks_for_what_its_shipped_model_makes():
    with safe_open(SHIPPED / DIT, "pt") as file:
        video = DemoVideo(**json.loads(file.metadata()[ABOUT]))
    by_type = {node["class_type"]: node["inputs"] for node in read("api", f"{DEMO}.json").values()}
    latent = by_type["EmptyARVideoLatent"]
    assert (latent["height"], latent["width"]) == (video.height, video.width)
    assert by_type["PrimitiveInt"]["value"] == video.frames
    assert by_type["LightForcingModelLoader"]["block"] == "auto"
    assert FAMILIES["demo"].sparse.block == video.block
    assert by_type["LightForcingModelLoader"]["model_name"] == Path(DIT).name
    assert by_type["VAELoader"]["vae_name"] == Path(VAE).name
    assert sum((SHIPPED / name).stat().st_size for name in (DIT, VAE, TEXT)) < 24_000_000
