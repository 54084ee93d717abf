"""Video files of runs and of the shipped workflows: they play, know their graph, and are whole or called partial."""

import json
from pathlib import Path

import av
import pytest

from ..support.graphs import (
    EMBEDS,
    HEIGHT,
    LENGTH,
    OTHER_EMBEDS,
    WIDTH,
    empty,
    graph,
    link,
    loader,
    saved_latents,
    text,
    video_output,
)

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SIZES = {"Length": 33, "Width": WIDTH, "Height": HEIGHT}


def to_file(prefix, latent=None, seed=3, **output):
    prompt = graph({"model": loader()}, latent=latent, vae=True, seed=seed, video_output=link("out"))
    if not output.get("keep_images"):
        del prompt["images"]
    return {**prompt, "out": video_output(prefix, **output)}


def frames_of(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert (frames[0].width, frames[0].height, container.streams.video[0].average_rate) == (WIDTH, HEIGHT, 16)
        return len(frames), dict(container.metadata)


@pytest.mark.parametrize("extension", ["mp4", "webm"])
def test_file_plays_and_restores_its_graph(server, extension):
    prompt = to_file(f"clips/%year%_{extension}", format=extension)
    workflow = {"nodes": [], "version": 0.4, "title": "from the canvas"}
    entry = server.run(prompt, workflow)
    (saved,) = entry["outputs"]["sampler"]["images"]
    assert saved["subfolder"] == "clips"
    assert saved["filename"].endswith(f"_{extension}_00001.{extension}")
    assert "%" not in saved["filename"]
    assert entry["outputs"]["sampler"]["animated"] == [True]
    count, metadata = frames_of(server.output / "clips" / saved["filename"])
    assert count == LENGTH
    stored = {key.lower(): value for key, value in metadata.items()}
    assert json.loads(stored["workflow"]) == workflow
    assert json.loads(stored["prompt"])["sampler"]["inputs"]["seed"] == 3
    assert not list((server.output / "clips").glob(".*"))


def test_batch_of_two_holds_two_videos_in_a_file_each(server):
    prompt = to_file("clips/batch", latent=empty(batch_size=2), keep_images=True)
    entry = server.run(prompt)
    names = [saved["filename"] for saved in entry["outputs"]["sampler"]["images"]]
    assert names == ["batch_00001.mp4", "batch_00002.mp4"]
    one, other = saved_latents(server, entry)
    assert (one - other).abs().max() > 0.1
    assert len([path for path in server.files(entry) if path.suffix == ".png"]) == 2 * LENGTH


def test_cancelled_run_returns_and_shows_its_finished_chunks(server):
    prompt = to_file("clips/cancelled", latent=empty(length=1001), seed=8)
    for attempt in (1, 2):  # the shorter video must not answer the next run
        since = len(server.log())
        prompt_id = server.queue(prompt)
        server.wait_for_steps(6, 336, since)
        server.interrupt()
        entry = server.wait(prompt_id)
        assert "sampler" in server.executed(entry)
        (text,) = entry["outputs"]["sampler"]["text"]
        assert text.startswith("cancelled after ")
        frames = saved_latents(server, entry).shape[2]
        assert 3 <= frames < 251
        assert f"{4 * frames - 3} of 1001 frames" in text
        (saved,) = entry["outputs"]["sampler"]["images"]
        assert saved["filename"] == f"cancelled_0000{attempt}.partial.mp4"
        assert frames_of(server.output / "clips" / saved["filename"])[0] == 4 * frames - 3
        assert not (server.output / "clips" / f"cancelled_0000{attempt}.mp4").exists()


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
        elif kind == "LoadVideo":
            inputs["file"] = "example.mp4"
        elif kind == "PrimitiveInt":
            inputs["value"] = SIZES[node["_meta"]["title"].split()[0]]
        elif kind == "LightForcingPromptTimeline":
            inputs["start"] /= 7
    return prompt


@pytest.mark.parametrize("name", sorted(path.stem for path in WORKFLOWS.glob("*.json")))
def test_workflow_makes_a_playable_video(server, name):
    prompt = tiny_prompt(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))
    (path,) = [path for path in server.files(server.run(prompt)) if path.suffix == ".mp4"]
    assert frames_of(path)[0] == SIZES["Length"]
