"""The end of a run in words, on the node: readable without a click, until the next run."""

import re

from .tiny import opened

SAID = "document.querySelector('.light-forcing-message')?.textContent"
SEEN = """() => {
    const { width, height } = document.querySelector(".light-forcing-message").getBoundingClientRect();
    return [width, height];
}"""
SET = "([id, name, value]) => { app.rootGraph.getNodeById(id).widgets.find((one) => one.name === name).value = value; }"
QUEUE = "() => app.queuePrompt(0, 1).catch(() => null)"


def test_errors_and_refusals_are_on_the_sampler_until_the_next_run(canvas):
    _, sampler, view = opened(canvas, 33)
    canvas.evaluate(SET, [sampler, "cfg", 3.0])
    canvas.evaluate(QUEUE)
    assert "cfg 3 needs a negative prompt" in canvas.wait_for(SAID)
    canvas.evaluate(SET, [sampler, "cfg", 1.0])
    canvas.evaluate(SET, [sampler, "chunk_seeds", "40: 1"])
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"/this video has chunks 0 to 2/.test({SAID})")
    assert min(canvas.evaluate(SEEN)) > 20
    canvas.evaluate("(graph) => app.loadGraphData(graph)", canvas.evaluate("() => app.rootGraph.serialize()"))
    canvas.wait_for(f"/this video has chunks 0 to 2/.test({SAID})")  # as after undo
    assert "light_forcing_message" not in str(canvas.evaluate("() => app.rootGraph.serialize()"))
    canvas.evaluate(SET, [sampler, "chunk_seeds", ""])
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until === 33 && !{view}.live", seconds=120)
    assert canvas.evaluate(f"() => {SAID} ?? null") is None
    canvas.errors.clear()  # of the two runs that were refused


def test_a_cancelled_run_says_how_far_it_came(canvas):
    _, sampler, view = opened(canvas, 189)
    canvas.evaluate(QUEUE)
    canvas.wait_for(f"{view}?.until >= 33")
    canvas.evaluate("() => app.api.interrupt()")
    assert re.search(r"cancelled after \d+ of 16 chunks: \d+ of 189 frames", canvas.wait_for(SAID))
    canvas.evaluate(
        "(id) => app.api.dispatchEvent(new CustomEvent('execution_interrupted', { detail: { node_id: String(id) } }))",
        sampler,
    )
    canvas.wait_for(f"{SAID} === 'cancelled'")
