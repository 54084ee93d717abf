"""What the artist sees: templates that open whole, a plot that follows the widgets, a video that grows."""

import itertools
import json
import re
import time

import pytest

from ..support.graphs import HEIGHT, WIDTH, empty, graph, link, loader, video_output
from .tiny import NAMES, WORKFLOWS, node_id, opened, tiny_text_to_video, workflow

LENGTH = 45  # video frames: four chunks
PROMPT = "async () => (await app.graphToPrompt()).output"
PLOT = "app.rootGraph.getNodeById({id}).lightForcingPlot"
SET_WIDGET = """([id, name, value]) => {
    const widget = app.rootGraph.getNodeById(id).widgets.find((one) => one.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
DROP = """async ({ filename, subfolder, type }) => {
    const query = new URLSearchParams({ filename, subfolder, type });
    const answer = await fetch(`/view?${query}`);
    await app.handleFile(new File([await answer.blob()], filename, { type: answer.headers.get("content-type") }));
}"""
# How much of the plot is drawn in the colour of its bars.
BARS = """(id) => {
    const { canvas } = app.rootGraph.getNodeById(id).lightForcingPlot;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let at = 0; at < data.length; at += 4)
        if (Math.abs(data[at] - 0x3b) < 8 && Math.abs(data[at + 1] - 0x7d) < 8 && data[at + 3] > 60) count += 1;
    return count / (canvas.width * canvas.height);
}"""


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_templates_open_from_browse_templates_with_nothing_missing(canvas, models):
    page = canvas.page
    for name in NAMES:
        canvas.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.wait_for_selector('[data-testid="template-workflows-content"]')
        page.locator('input[placeholder*="earch"]').last.fill("light forcing")
        card = page.locator(f'[data-testid="template-workflow-{name}"]')
        card.wait_for()
        page.wait_for_function(
            "(name) => document.querySelector(`[data-testid='template-workflow-${name}'] img`)?.naturalWidth > 0",
            arg=name,
        )
        card.click()
        document = workflow(name)
        canvas.wait_for(f"app.rootGraph.nodes.length === {len(document['nodes'])}")
        assert [node for node in canvas.nodes() if not node["known"]] == []
        assert sorted(node["type"] for node in canvas.nodes()) == sorted(node["type"] for node in document["nodes"])
        wanted = [model for node in document["nodes"] for model in node["properties"].get("models", ())]
        there = [(models / "models" / model["directory"] / model["name"]).exists() for model in wanted]
        missing = page.get_by_test_id("error-overlay-see-errors")
        page.wait_for_timeout(1000)
        assert canvas.evaluate("() => app.canvas.ds.scale") > 0.6, name  # below 0.57 litegraph draws no text
        if not wanted:  # the quickstart's files come with the pack
            assert missing.count() == 0
            continue
        missing.click()
        downloads = page.get_by_text("Download", exact=True)
        downloads.first.wait_for()
        assert downloads.count() == len(wanted) - sum(there) > 0


def test_workflows_open_at_their_own_scale_and_no_node_covers_another(canvas):
    for name in NAMES:
        document = workflow(name)
        canvas.open_graph(document)
        canvas.page.wait_for_timeout(2000)  # until each node has the height of what it shows
        assert canvas.evaluate("() => app.canvas.ds.scale") == document["extra"]["ds"]["scale"]
        boxes = canvas.evaluate("() => app.rootGraph.nodes.map((node) => [node.type, ...node.getBounding()])")
        for (one, x, y, width, height), (other, left, top, wide, high) in itertools.combinations(boxes, 2):
            beside = x + width <= left or left + wide <= x
            assert beside or y + height <= top or top + high <= y, f"{name}: {one} and {other}"


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_canvas_and_api_form_send_the_same_prompt(canvas, name):
    """A newer ComfyUI may add inputs to its nodes, if both forms leave them at the same default."""

    def sent_now():
        prompt = canvas.evaluate(PROMPT)
        for node in prompt.values():
            node["inputs"].pop("video-preview", None)  # the frontend's own player, there once the clip is loaded
            node["_meta"] = {"title": node["_meta"]["title"]}  # the canvas adds each node's pack since frontend 1.58
        return prompt

    canvas.open_graph(workflow(name))
    sent = sent_now()
    form = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert sent == {key: {**node, "inputs": sent[key]["inputs"] | node["inputs"]} for key, node in form.items()}
    canvas.evaluate("(form) => app.loadApiJson(form, 'api')", form)
    assert sent_now() == sent


def test_plot_follows_the_widgets(canvas):
    document = tiny_text_to_video(81)
    schedule, length = node_id(document, "LightForcingSchedule"), node_id(document, "PrimitiveInt")
    loader = node_id(document, "LightForcingModelLoader")
    canvas.open_graph(document)
    plot = PLOT.format(id=schedule)

    def shown(condition):
        canvas.wait_for(f"(() => {{ const n = {plot}?.numbers; return n && ({condition}); }})()")
        numbers = canvas.evaluate(f"() => {plot}.numbers")
        return numbers, canvas.evaluate(BARS, schedule)

    auto, auto_bars = shown("n.title === 'Self Forcing' && n.lengths.length === 7")
    assert auto["target"] == 0.7
    canvas.evaluate(SET_WIDGET, [schedule, "preset", "light_forcing_short"])
    sparse, sparse_bars = shown("n.target === 0.88")
    assert sparse["attention_ratio"] < auto["attention_ratio"]
    assert auto_bars > 1.2 * sparse_bars > 0
    canvas.evaluate(SET_WIDGET, [schedule, "preset", "dense"])
    assert shown("n.target === null")[1] > 1.2 * auto_bars
    canvas.evaluate(SET_WIDGET, [schedule, "preset", "custom"])
    custom, _ = shown("n.title === 'custom'")
    canvas.evaluate(SET_WIDGET, [schedule, "preset.target", 0.3])
    lower, _ = shown("n.target === 0.3")
    assert lower["model_ratio"] > custom["model_ratio"]
    canvas.evaluate(SET_WIDGET, [schedule, "preset.window", 2])
    assert "use at least 3" in shown("n.error")[0]["error"]
    canvas.evaluate(SET_WIDGET, [schedule, "preset.window", 0])
    canvas.evaluate(SET_WIDGET, [length, "value", 33])
    shown("n.lengths?.length === 3")
    canvas.evaluate(SET_WIDGET, [schedule, "preset", "auto"])
    canvas.evaluate(SET_WIDGET, [loader, "model_name", "long_video_gen.pt"])
    assert shown("n.title === 'Light Forcing, long video'")[0]["window"] == 12
    canvas.evaluate(SET_WIDGET, [loader, "policy", "radial"])
    own, bars = shown("n.policy.startsWith('radial')")
    assert 0.0 < own["attention_ratio"] < 1.0
    canvas.evaluate(SET_WIDGET, [loader, "policy.decay", 1.0])
    assert shown("n.policy.includes('decay 1')")[0]["attention_ratio"] > own["attention_ratio"]
    canvas.evaluate(SET_WIDGET, [loader, "policy", "vmoba"])
    assert 0 < shown("n.attention_ratio === null")[1] < 0.6 * bars  # only a dense first chunk is known
    saved = canvas.evaluate("() => app.rootGraph.serialize()")
    canvas.open_graph(saved)
    inputs = canvas.evaluate(PROMPT)[str(loader)]["inputs"]
    assert {name: value for name, value in inputs.items() if "policy" in name} == {
        "policy": "vmoba",
        "policy.share": 0.25,
    }


def test_custom_schedule_survives_saving(canvas):
    document = tiny_text_to_video(LENGTH)
    schedule = node_id(document, "LightForcingSchedule")
    canvas.open_graph(document)
    canvas.wait_for(f"{PLOT.format(id=schedule)}?.numbers")
    canvas.evaluate(SET_WIDGET, [schedule, "preset", "custom"])
    canvas.evaluate(SET_WIDGET, [schedule, "preset.window", 9])
    canvas.evaluate(SET_WIDGET, [schedule, "preset.target", 0.45])
    saved = canvas.evaluate("() => app.rootGraph.serialize()")
    (node,) = [node for node in saved["nodes"] if node["id"] == schedule]
    assert len(node["widgets_values"]) == 11  # length, preset and its nine settings; the plot stores nothing
    canvas.evaluate("() => app.rootGraph.clear()")
    canvas.open_graph(saved)
    canvas.wait_for(f"{PLOT.format(id=schedule)}?.numbers?.window === 9")
    prompt = canvas.evaluate(PROMPT)
    inputs = prompt[str(schedule)]["inputs"]
    assert (inputs["preset.window"], inputs["preset.target"]) == (9, 0.45)
    assert not [name for name in inputs if "plot" in name]


def test_video_grows_on_the_sampler_and_ends_on_the_canvas(canvas):
    document, sampler, view = opened(canvas, LENGTH)
    seen = []
    canvas.wait_for(f"{PLOT.format(id=node_id(document, 'LightForcingSchedule'))}?.numbers")
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    end = time.monotonic() + 120
    while time.monotonic() < end:
        until, pictures, live = canvas.evaluate(
            f"() => [{view}?.until ?? 0, {view}?.cells.length ?? 0, {view}?.live ?? true]"
        )
        if until and (until, pictures) not in seen:
            seen.append((until, pictures))
        if not live:
            break
    lengths = [until for until, _ in seen]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 3
    assert seen[-1] == (LENGTH, (LENGTH + 1) // 2)  # every second frame of the whole video, decoded
    picture = f"app.rootGraph.getNodeById({sampler}).lightForcingPanel.canvas.toDataURL()"
    first = canvas.evaluate(f"() => {picture}")
    canvas.wait_for(f"{picture} !== {first!r}")  # it plays
    canvas.wait_for("[...document.querySelectorAll('video')].some((video) => video.videoWidth > 0)")
    size = canvas.evaluate("() => { const v = document.querySelector('video'); return [v.videoWidth, v.videoHeight]; }")
    assert size == [WIDTH, HEIGHT]


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_switched_off_the_hosts_own_preview_is_shown(canvas):
    setting = "app.extensionManager.setting.set('LightForcing.LiveView', {})"
    canvas.evaluate(f"() => {setting.format('false')}")
    document, _, view = opened(canvas, LENGTH - 4)
    schedule = node_id(document, "LightForcingSchedule")
    canvas.evaluate("() => { window.sheets = 0; app.api.addEventListener('b_preview', () => (window.sheets += 1)); }")
    canvas.evaluate("() => app.queuePrompt(0, 1)")
    canvas.wait_for("[...document.querySelectorAll('video')].some((video) => video.videoWidth > 0)", seconds=120)
    assert canvas.evaluate("() => window.sheets") >= 3
    assert canvas.evaluate(f"() => !{view}")
    assert canvas.evaluate(f"() => app.nodeOutputs[{schedule}]") is None  # the plot is there without a picture
    canvas.evaluate(f"() => {setting.format('true')}")


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_blueprint_is_in_the_node_library_and_runs_as_one_node(canvas):
    page, name = canvas.page, "Light Forcing text to video"
    canvas.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')")
    page.locator('input[placeholder^="Search"]').first.fill(name)
    page.get_by_text(name).first.click()
    page.mouse.click(900, 500)
    canvas.wait_for("app.rootGraph.nodes.length === 1")
    assert [node for node in canvas.nodes() if not node["known"]] == []
    inside = "app.rootGraph.nodes[0].subgraph.nodes.find((node) => node.type === 'LightForcingSchedule')"
    canvas.wait_for(f"{inside}.lightForcingPlot.numbers?.lengths?.length === 7")  # read across the subgraph's border
    prompt = canvas.evaluate(PROMPT)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert {"LightForcingModelLoader", "LightForcingSchedule", "LightForcingSampler", "CreateVideo"} <= set(kinds)
    assert kinds["EmptyARVideoLatent"]["length"] == kinds["LightForcingSchedule"]["length"] == 81
    assert kinds["CLIPTextEncode"]["text"].startswith("A red panda")


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
    prompt = graph({"model": loader()}, latent=empty(21), vae=True, video_output=link("out"))
    prompt["out"] = video_output(f"dropped/{form}", format=form, keep_images=True)
    (saved,) = server.run(prompt, document)["outputs"]["sampler"]["images"]
    assert canvas.evaluate("() => app.rootGraph.nodes.length") == 0
    canvas.evaluate(DROP, saved)
    canvas.wait_for(f"app.rootGraph.nodes.length === {len(document['nodes'])}")
    assert sorted(node["type"] for node in canvas.nodes()) == sorted(node["type"] for node in document["nodes"])


@pytest.mark.parametrize("canvas", ["litegraph"], indirect=True)
def test_advanced_widgets_are_hidden_until_asked_for(canvas):
    """Those of a preset too."""
    shown = """(kind) => {
        const node = app.rootGraph.nodes.find((one) => one.type === kind);
        return node.widgets.filter((one) => node.isWidgetVisible(one)).map((one) => one.name);
    }"""
    document = workflow("light_forcing_1_quickstart")
    canvas.open_graph(document)
    assert canvas.evaluate(shown, "LightForcingModelLoader") == ["model_name", "lora_name", "family", "policy"]
    canvas.evaluate(
        """(id) => {
            const node = app.rootGraph.getNodeById(id);
            const preset = node.widgets.find((one) => one.name === "preset");
            preset.setValue("custom", { node, canvas: app.canvas, e: null }); // as a click does
        }""",
        node_id(document, "LightForcingSchedule"),
    )
    names = canvas.evaluate(shown, "LightForcingSchedule")
    assert "preset.target" in names
    assert "preset.curve" not in names
    canvas.evaluate("() => void app.graph.add(LiteGraph.createNode('LightForcingApply'))")
    canvas.page.wait_for_timeout(500)  # until it is drawn, which makes room for rows that do not fit
    assert canvas.evaluate("() => app.rootGraph.nodes.at(-1).size[1] === app.rootGraph.nodes.at(-1).computeSize()[1]")


def test_timeline_is_drawn_and_follows_its_nodes(canvas):
    document = workflow("light_forcing_5_prompt_timeline")
    canvas.open_graph(document)
    first, last = (node["id"] for node in document["nodes"] if node["type"] == "LightForcingPromptTimeline")
    strips = "[...document.querySelectorAll('.light-forcing-timeline')].map((one) => one.innerText.split('\\n'))"
    texts = [node["widgets_values"][0] for node in document["nodes"] if node["type"] == "CLIPTextEncode"]
    canvas.wait_for(f"{strips}.some((one) => one.length === 6)")
    drawn = max(canvas.evaluate(f"() => {strips}"), key=len)
    assert drawn == [texts[0], "0 s", texts[1], "5 s hard", texts[2], "10 s blend"]
    canvas.evaluate(SET_WIDGET, [first, "start", 12.5])
    canvas.wait_for(f"{strips}.some((one) => one.at(-1) === '12.5 s hard')")  # in the order of time
    canvas.evaluate(f"() => app.rootGraph.remove(app.rootGraph.getNodeById({last}))")
    canvas.wait_for(f"{strips}.length === 1 && {strips}[0].length === 4")


@pytest.mark.parametrize("canvas", ["vue"], indirect=True)
@pytest.mark.parametrize("name", ["light_forcing_1_quickstart", "light_forcing_2_text_to_video"])
def test_app_mode_finds_its_inputs_and_the_video(canvas, name):
    document = workflow(name)
    canvas.open_graph(document)
    wanted = document["extra"]["linearData"]
    widgets = """(inputs) => inputs.map(([id, name]) =>
        app.rootGraph.getNodeById(id).widgets.some((widget) => widget.name === name))"""
    assert all(canvas.evaluate(widgets, wanted["inputs"]))
    canvas.page.wait_for_timeout(1000)  # the frontend drops what it cannot find
    kept = canvas.evaluate("() => app.rootGraph.extra.linearData")
    assert len(kept["inputs"]) == len(wanted["inputs"])
    assert len(kept["outputs"]) == len(wanted["outputs"]) == 1
