"""The panel on the node: a line, notes readable without a click, details; right after undo and a change of the tab."""

import re

import pytest

from .test_live_view import WRAP
from .tiny import opened

NOTES = "document.querySelector('.light-forcing-notes')?.textContent"
LINE = "document.querySelector('.light-forcing-line')?.textContent"
SEEN = """(name) => {
    const { width, height } = document.querySelector(`.light-forcing-${name}`).getBoundingClientRect();
    return [width, height];
}"""
SET = "([id, name, value]) => { app.rootGraph.getNodeById(id).widgets.find((one) => one.name === name).value = value; }"
QUEUE = "() => app.queuePrompt(0, 1).catch(() => null)"
# A change of a widget, taken back.
UNDO = """async ([id, name, value]) => {
    const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
    const check = () => (changeTracker.captureCanvasState ?? changeTracker.checkState).call(changeTracker);
    check();
    app.rootGraph.getNodeById(id).widgets.find((one) => one.name === name).value = value;
    check();
    await changeTracker.undo();
}"""
SIZES = """(id) => {
    const saved = app.rootGraph.serialize().nodes.find((one) => one.id === id);
    return [app.rootGraph.getNodeById(id), saved].map(({ size }) => [...size]);
}"""
WIDTHS = """() => {
    const { scrollWidth, clientWidth } = document.querySelector(".light-forcing-line");
    return [scrollWidth, clientWidth];
}"""
IDLE = "(async () => !(await (await app.api.fetchApi('/queue')).json()).queue_running.length)"
SEND = "([name, detail]) => app.api.dispatchEvent(new CustomEvent(name, { detail }))"
LAST_PROMPT = "async () => (await (await app.api.fetchApi('/queue')).json()).queue_running[0]?.[1]"


def test_errors_and_refusals_are_on_the_sampler_until_the_next_run(canvas):
    _, sampler, view = opened(canvas, 33)
    canvas.evaluate(SET, [sampler, "cfg", 3.0])
    canvas.evaluate(QUEUE)
    assert "cfg 3 needs a negative prompt" in canvas.wait_for(NOTES)
    canvas.evaluate(SET, [sampler, "cfg", 1.0])
    canvas.evaluate(SET, [sampler, "chunk_seeds", "40: 1"])
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"/this video has chunks 0 to 2/.test({NOTES})")
    assert min(canvas.evaluate(SEEN, "notes")) > 10
    canvas.evaluate(UNDO, [sampler, "replay", "window"])
    canvas.wait_for(f"/this video has chunks 0 to 2/.test({NOTES})")
    assert "light_forcing_panel" not in str(canvas.evaluate("() => app.rootGraph.serialize()"))
    canvas.evaluate(SET, [sampler, "chunk_seeds", ""])
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until === 33 && !{view}.live", seconds=120)
    assert canvas.evaluate(f"() => {NOTES}") == ""
    canvas.errors.clear()  # of the two runs that were refused


def test_a_cancelled_run_says_how_far_it_came_and_keeps_its_picture_after_undo(canvas):
    _, sampler, view = opened(canvas, 189)
    canvas.evaluate(
        "(id) => app.rootGraph.getNodeById(id).setSize(app.rootGraph.getNodeById(id).computeSize())", sampler
    )
    (_, before) = canvas.evaluate(SIZES, sampler)[0]
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until >= 33")
    line = canvas.wait_for(f"/left$/.test({LINE}) && {LINE}")
    assert re.fullmatch(r"chunk \d+/16 · density \d+ % · \d+\.\d s per chunk · \d+ s left", line)
    text, space = canvas.evaluate(WIDTHS)
    assert 0 < text <= space
    low = canvas.evaluate(SEEN, "status")[1]
    canvas.evaluate("() => (document.querySelector('.light-forcing-status').open = true)")
    assert canvas.evaluate(SEEN, "status")[1] > low + 20
    canvas.evaluate("() => app.api.interrupt()")
    assert re.search(
        r"^cancelled after \d+ of 16 chunks: \d+ of 189 frames", canvas.wait_for(f"/^cancel/.test({LINE}) && {LINE}")
    )
    (_, shown), (_, saved) = canvas.evaluate(SIZES, sampler)
    assert saved == before < shown
    canvas.evaluate(UNDO, [sampler, "replay", "window"])
    canvas.wait_for(f"/^cancelled after/.test({LINE}) && {view}.until >= 9")
    assert canvas.evaluate(SEEN, "live-view")[1] > 100
    canvas.evaluate("() => new Promise((done) => setTimeout(done, 1000))")  # in which Vue makes the node higher
    assert canvas.evaluate(SIZES, sampler)[1][1] == saved


def test_messages_of_a_sampler_in_a_subgraph_come_and_go(canvas):
    _, sampler, _ = opened(canvas, 9)
    canvas.evaluate(SET, [sampler, "chunk_seeds", "40: 1"])
    outer = canvas.evaluate(WRAP, sampler)
    names = f"app.rootGraph.getNodeById({outer}).widgets.map((one) => one.name)"
    others = canvas.evaluate(f"() => {names}")
    for _ in range(2):
        canvas.evaluate(QUEUE)
        canvas.wait_for(f"/this video has chunk/.test({NOTES})")
        assert canvas.evaluate(f"() => {names}") == [*others, "light_forcing_panel"]
    inside = f"app.rootGraph.getNodeById({outer}).subgraph.nodes.find((node) => node.type === 'LightForcingSampler')"
    canvas.evaluate(f"() => {{ {inside}.widgets.find((one) => one.name === 'chunk_seeds').value = ''; }}")
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"/done$/.test({LINE})", seconds=120)
    canvas.wait_for(f"{NOTES} === ''")
    canvas.errors.clear()  # of the runs that were refused


def test_message_stays_with_the_workflow_that_was_queued(canvas):
    document, _, view = opened(canvas, 189)
    first = "window.firstWorkflow"
    canvas.evaluate(f"() => {{ {first} = app.extensionManager.workflow.activeWorkflow; }}")
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until >= 9 && /left$/.test({LINE})")
    canvas.open_graph(document)  # the same nodes in another tab
    canvas.wait_for(f"app.extensionManager.workflow.activeWorkflow !== {first}")
    canvas.wait_for("!document.querySelector('.light-forcing-panel')")
    canvas.evaluate("() => app.api.interrupt()")
    canvas.wait_for(f"{IDLE}()")
    canvas.evaluate("() => new Promise((done) => setTimeout(done, 600))")  # longer than panels take to come
    assert canvas.evaluate("() => document.querySelectorAll('.light-forcing-panel').length") == 0
    canvas.evaluate(f"() => app.loadGraphData({first}.activeState, true, true, {first})")
    canvas.wait_for(f"/^cancelled after/.test({LINE})")
    canvas.wait_for(f"{view}?.live === false")


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_a_result_without_a_file_leaves_the_picture(canvas):
    _, sampler, view = opened(canvas, 189)
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until >= 33")
    about = {"node": str(sampler), "prompt_id": canvas.evaluate(LAST_PROMPT)}
    canvas.evaluate("() => app.api.interrupt()")
    canvas.wait_for(f"{IDLE}()")
    canvas.evaluate(SEND, ["executed", {**about, "output": {"images": [], "text": ["not finite"]}}])
    canvas.wait_for(f"{NOTES} === 'not finite'")
    assert canvas.evaluate(SEEN, "live-view")[1] > 100
    canvas.evaluate(SEND, ["execution_interrupted", {"prompt_id": about["prompt_id"], "node_id": str(sampler)}])
    canvas.wait_for(f"{NOTES} === 'cancelled'")
