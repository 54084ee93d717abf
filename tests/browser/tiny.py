"""The shipped canvas workflows, cut down to weights and sizes that run on a CPU in seconds."""

import itertools
import json
from pathlib import Path
from typing import Any

from ..support.graphs import EMBEDS, HEIGHT, WIDTH

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SEEDS = itertools.count(100)
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def tiny_text_to_video(length: int, seed: int = 0) -> dict[str, Any]:
    """The text-to-video workflow with a stored embedding instead of the text encoder.

    ComfyUI answers a graph with the seed of an earlier one from its cache, without a run.
    """
    document = workflow("light_forcing_2_text_to_video")
    for node in document["nodes"]:
        node["properties"].pop("models", None)
        if node["type"] == "PrimitiveInt":
            node["widgets_values"][0] = length
        elif node["type"] == "LightForcingSampler":
            node["widgets_values"][0] = seed
        elif node["type"] == "EmptyARVideoLatent":
            node["widgets_values"][:3] = [WIDTH, HEIGHT, length]
        elif node["type"] == "VAELoader":
            node["widgets_values"] = ["tiny_lightvae.safetensors"]
        elif node["type"] == "CLIPTextEncode":
            name = {"localized_name": "name", "name": "name", "type": "COMBO", "widget": {"name": "name"}, "link": None}
            node |= {"type": "LightForcingLoadTextEmbeds", "inputs": [name], "widgets_values": [EMBEDS]}
    document["nodes"] = [node for node in document["nodes"] if node["type"] != "CLIPLoader"]
    document["links"] = [link for link in document["links"] if link[5] != "CLIP"]
    return document


def opened(canvas: Any, length: int) -> tuple[dict[str, Any], int, str]:
    """The document of a new run, opened; the number of its sampler, and the sampler's live view in JavaScript."""
    document = tiny_text_to_video(length, seed=next(SEEDS))
    canvas.open_graph(document)
    sampler = node_id(document, "LightForcingSampler")
    return document, sampler, f"app.rootGraph.getNodeById({sampler})?.lightForcingPanel?.view"


def node_id(document: dict[str, Any], kind: str) -> int:
    (found,) = [node["id"] for node in document["nodes"] if node["type"] == kind]
    return found
