"""The live view where the sampler is not in plain sight: in a subgraph, after a reload, under another workflow."""

import itertools
import re

import pytest

from .tiny import opened

LENGTH = 45  # video frames: four chunks
WRAP = """(id) => {
    const inner = app.rootGraph.getNodeById(id);
    return Number(app.rootGraph.convertToSubgraph(new Set([inner])).node.id);
}"""
# Whether the canvas of a node's live view is on the page and shows more than one colour.
SHOWS = """(id) => {
    const canvas = app.rootGraph.getNodeById(id).lightForcingPanel?.canvas;
    if (!canvas?.isConnected) return false;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size > 16;
}"""

# Two messages of a new run, the first of whose pictures is there last; where the pictures of the view then begin.
TAKE_SLOW_THEN_FAST = """async (id) => {
    const view = app.rootGraph.getNodeById(id).lightForcingPanel?.view;
    const image = document.createElement("canvas").toDataURL();
    const size = { image, width: 8, height: 8, columns: 1, start: 0, stop: 9 };
    const message = (at) => ({ prompt_id: "another", frames: 9, fps: 16, end: null, strips: [{ ...size, at }] });
    const decode = Image.prototype.decode;
    let wait = 300;
    Image.prototype.decode = async function () {
        const milliseconds = wait;
        wait = 0;
        await new Promise((done) => setTimeout(done, milliseconds));
        return decode.call(this);
    };
    await Promise.all([view.take(message([0, 3, 6])), view.take(message([0, 2, 4, 6, 8]))]);
    Image.prototype.decode = decode;
    return view.cells.map((cell) => cell.at);
}"""


def test_subgraph_node_shows_what_the_sampler_in_it_makes(canvas):
    _, sampler, _ = opened(canvas, LENGTH + 48)
    outer = canvas.evaluate(WRAP, sampler)
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    view = f"app.rootGraph.getNodeById({outer}).lightForcingPanel?.view"
    canvas.wait_for(f"{view}?.until > 0 && {view}.until < {LENGTH + 48}")
    canvas.wait_for(f"({SHOWS})({outer})")
    line = f"app.rootGraph.getNodeById({outer}).lightForcingPanel.line.textContent"
    assert re.match(r"chunk \d/8 · density \d+ %", canvas.wait_for(f"/^chunk/.test({line}) && {line}"))
    canvas.wait_for(f"{view}.until === {LENGTH + 48} && !{view}.live", seconds=120)
    saved = canvas.evaluate("() => app.rootGraph.serialize()")
    (node,) = [node for node in saved["nodes"] if node["id"] == outer]
    assert "light_forcing" not in str(node)
    inside = f"app.rootGraph.getNodeById({outer}).subgraph.nodes.find((node) => node.type === 'LightForcingSampler')"
    assert canvas.evaluate(f"() => {inside}.lightForcingPanel?.view === {view}")


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_page_that_is_reloaded_plays_the_video_from_its_start(canvas):
    _, _, view = opened(canvas, 189)  # so long that it still runs when the page is back
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    canvas.wait_for(f"{view}?.until >= 9")
    canvas.page.remove_listener("console", canvas._on_console)  # a page that goes away breaks off its requests
    canvas.page.reload()
    canvas.page.wait_for_function("window.app?.isGraphReady && !!window.app.extensionManager")
    canvas.wait_for("app.rootGraph.nodes.length > 0")  # the tab is open again
    at = canvas.wait_for(f"{view}?.cells[0]?.at === 0 && {view}.cells.map((cell) => cell.at)", seconds=120)
    assert at[-1] >= 9
    assert max(after - before for before, after in itertools.pairwise(at)) <= 4  # a draft has one picture in four
    canvas.evaluate("() => app.api.interrupt()")


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_draft_that_is_slow_to_load_does_not_replace_the_frames_behind_it(canvas):
    _, sampler, view = opened(canvas, LENGTH)
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    canvas.wait_for(f"{view}?.until === {LENGTH} && !{view}.live")
    at = canvas.evaluate(TAKE_SLOW_THEN_FAST, sampler)
    assert at == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_node_of_another_workflow_with_the_same_number_shows_nothing(canvas):
    document, sampler, _ = opened(canvas, LENGTH)
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    other = {"id": sampler, "type": "PrimitiveInt", "pos": [0, 0], "size": [200, 80], "properties": {}}
    other |= {"inputs": [], "outputs": [], "widgets_values": [1, "fixed"]}
    canvas.evaluate("() => { window.shown = 0; app.api.addEventListener('light_forcing.preview', () => shown++); }")
    canvas.open_graph({**document, "nodes": [other], "links": []})
    canvas.wait_for("window.shown >= 2")
    widgets = canvas.evaluate(f"() => app.rootGraph.getNodeById({sampler}).widgets.map((one) => one.name)")
    assert widgets[:1] == ["value"]
    assert "light_forcing_panel" not in widgets
