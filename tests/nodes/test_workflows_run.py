"""The shipped workflows run over the HTTP API, from tiny weights to a playable video."""

import json
from fractions import Fraction
from pathlib import Path

import av
import pytest

from ..support.graphs import EMBEDS, HEIGHT, OTHER_EMBEDS, WIDTH, text

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = tuple(sorted(path.stem for path in WORKFLOWS.glob("*.json")))
LENGTH = 33  # video frames: three chunks
SIZES = {"Length": LENGTH, "Width": WIDTH, "Height": HEIGHT}


def tiny_prompt(prompt):
    """A workflow's API form at a tiny size, its text encoder replaced by a stored embedding."""
    for node_id, node in list(prompt.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CLIPTextEncode":
            prompt[node_id] = text(OTHER_EMBEDS if "from" in node["_meta"]["title"] else EMBEDS)
        elif kind == "CLIPLoader":
            del prompt[node_id]
        elif kind == "VAELoader":
            inputs["vae_name"] = "tiny_lightvae.safetensors"
        elif kind == "EmptyARVideoLatent":
            sizes = {"width": WIDTH, "height": HEIGHT}
            inputs |= {name: size for name, size in sizes.items() if isinstance(inputs[name], int)}
        elif kind == "PrimitiveInt":
            inputs["value"] = SIZES[node["_meta"]["title"].split()[0]]
        elif kind == "LightForcingPromptTimeline":
            inputs["start"] /= 7
    return prompt


def probe(path):
    """(frames, width, height, frames per second) of a video file, every frame decoded."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return len(frames), frames[0].shape[1], frames[0].shape[0], Fraction(stream.average_rate)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_makes_a_playable_video(server, name):
    prompt = tiny_prompt(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))
    (path,) = [path for path in server.files(server.run(prompt)) if path.suffix == ".mp4"]
    assert probe(path) == (LENGTH, WIDTH, HEIGHT, 16)
