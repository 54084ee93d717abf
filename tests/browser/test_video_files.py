"""Video files on the canvas: what their names may hold, and the graph that comes back when one is dropped."""

import re

import pytest

from ..support.graphs import empty, graph, link, loader, vae_loader, video_output
from .tiny import tiny_text_to_video

DROP = """async ({ filename, subfolder, type }) => {
    const query = new URLSearchParams({ filename, subfolder, type });
    const answer = await fetch(`/view?${query}`);
    await app.handleFile(new File([await answer.blob()], filename, { type: answer.headers.get("content-type") }));
}"""


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_fields_in_a_videos_file_name_are_filled_in(canvas):
    canvas.evaluate(
        """() => {
            const node = LiteGraph.createNode("LightForcingVideoOutput");
            app.graph.add(node);
            node.widgets.find((one) => one.name === "filename_prefix").value = "%date:yyyy%/%year%_clip";
        }"""
    )
    prompt = canvas.evaluate("async () => (await app.graphToPrompt()).output")
    (node,) = prompt.values()
    assert re.fullmatch(r"\d{4}/%year%_clip", node["inputs"]["filename_prefix"])  # the rest is the server's


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_dropped_video_brings_its_graph_back(canvas, server, form):
    document = tiny_text_to_video(21)
    prompt = graph({"model": loader(), "vae": vae_loader()}, latent=empty(21), video_output=link("out"))
    prompt["sampler"]["inputs"]["vae"] = link("vae")
    prompt["out"] = video_output(f"dropped/{form}", format=form)
    (saved,) = server.run(prompt, document)["outputs"]["sampler"]["images"]
    assert canvas.evaluate("() => app.rootGraph.nodes.length") == 0
    canvas.evaluate(DROP, saved)
    canvas.wait_for(f"app.rootGraph.nodes.length === {len(document['nodes'])}")
    assert sorted(node["type"] for node in canvas.nodes()) == sorted(node["type"] for node in document["nodes"])
