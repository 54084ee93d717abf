"""The report in a real server: fed by both samplers, drawn over frames, added later without sampling again."""

import numpy as np
import pytest
from PIL import Image

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies import POLICIES

from ..support.graphs import change, custom_graph, demo_graph, empty, graph, link, loader, save_images, schedule, text

WIDTH, HEIGHT = 160, 128  # 80 tokens per latent frame: two blocks of 64


def report(**inputs):
    defaults = {"samples": link("sampler"), "chunk": -1, "layer": -1, "head": -1}
    return {"class_type": "LightForcingReport", "inputs": {**defaults, **inputs}}


def run_graph(seed, **report_inputs):
    """A sparse run of four chunks with frames, its report, and the report's pages saved."""
    prompt = graph(
        {"model": loader()},
        latent=empty(length=45, width=WIDTH, height=HEIGHT),
        vae=True,
        seed=seed,
        schedule=link("schedule"),
    )
    prompt["schedule"] = schedule(length=45, window=9, sink_frames=1)
    prompt["report"] = report(images=link("sampler", 1), **report_inputs)
    prompt["pages"] = save_images(link("report"))
    return prompt


@pytest.fixture(scope="module")
def first(server):
    return server.run(run_graph(31))


def pages_of(server, entry):
    files = [path for path in server.files(entry) if path.name.startswith("frames") and path.parent.name == "output"]
    pages = [Image.open(path).convert("RGB") for path in files]
    return [np.asarray(page) for page in pages if page.size == (512, 512)]


def test_pages_and_words_come_out_after_the_run(server, first):
    assert len(pages_of(server, first)) == 3
    shown = first["outputs"]["report"]
    assert len(shown["images"]) == 3
    words = shown["text"][0]
    assert "video: 45 frames (12 latent) at 160×128" in words
    assert "4 chunks, " in words
    assert "sees: 9 latent frames, 1 of them sinks" in words
    assert "attention: reference (" in words
    assert "dense: chunk 0: it has no past frames" in words
    rows = [line.split() for line in words.splitlines() if line.strip()[:1].isdigit() and "denoise" in line]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[2] for row in rows] == ["3", "6", "9", "9"]
    assert rows[0][4] == "100.0%"
    assert all(float(row[4][:-1]) < 60 for row in rows[1:])


def test_another_map_is_drawn_without_sampling_again_and_one_that_is_not_there_refused(server, first):
    prompt = first["prompt"][2]
    again = {**prompt, "report": report(images=link("sampler", 1), chunk=1, layer=1, head=0)}
    again["pages"] = save_images(link("report"))
    entry = server.run(again)
    assert {"report", "pages"} == server.executed(entry)
    before, after = pages_of(server, first)[:3], pages_of(server, entry)[:3]
    assert np.array_equal(before[0], after[0])
    assert not np.array_equal(before[2], after[2])
    assert "no layer 2" in server.error_of({**prompt, "report": report(layer=2)})


def test_a_latent_without_a_run_is_refused_with_the_way_out(server):
    prompt = {"latent": empty(), "report": report(samples=link("latent"))}
    assert "holds no record of a run; connect LATENT of Light Forcing Sampler" in server.error_of(prompt)


def test_the_record_of_samplercustomadvanced_comes_with_its_sampler(server):
    prompt = custom_graph({"model": loader()}, schedule=link("schedule"), timeline=link("timeline"))
    prompt |= {"other": text("rain.safetensors"), "timeline": change(0.6, "hard"), "latent": empty(21, WIDTH, HEIGHT)}
    prompt |= {"schedule": schedule(frames_per_chunk=2, target=0.0, base=0.0), "report": report(sampler=link("select"))}
    words = server.run(prompt)["outputs"]["report"]["text"][0]
    assert "attention: dense in every call" in words
    assert "dense: chunk 1-2: its scheduled sparsity is 0" in words
    assert "the hard prompt switch at chunk" in words
    assert "recompute" in words


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_and_the_report_shows_what_it_read(server, policy):
    """Chosen in the API form, with a setting if it has one that is published with another value."""
    settings = {"mass": {"top_p": 0.9}, "radial": {"decay": 0.5}}.get(policy, {})
    prompt = demo_graph(schedule=link("schedule"))
    prompt |= {"schedule": schedule(45), "latent": empty(45, WIDTH, HEIGHT), "report": report()}
    prompt["model"]["inputs"] |= {"policy": policy, **{f"policy.{name}": value for name, value in settings.items()}}
    words = server.run(prompt)["outputs"]["report"]["text"][0]
    options = AttentionOptions(policy=policy, settings=tuple(settings.items()))
    assert f"policy: {options.policy_text}\n" in words
    rows = [line.split() for line in words.splitlines() if line.strip()[:1].isdigit() and "denoise" in line]
    assert [row[3] == "–" for row in rows] == [False, *[not (options.rule and options.rule.uses_sparsity)] * 3]
    read = [float(row[4][:-1]) for row in rows]
    if options.rule is None:
        assert read == [100.0] * 4
    elif options.rule.uses_sparsity:
        pool = 100 * 3 / 9 if policy == "pbsa" else 0  # of the window, which is full by then
        assert pool < read[3] <= pool + 100.1 - float(rows[3][3][:-1])
    else:
        assert 0 < read[3] < 100
    assert ("the keys decide how much is read" in words) == (policy in ("mass", "vmoba", "forcing_kv", "dummy_forcing"))


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ({"policy": "later"}, "attention policy 'later' is not known; use one of light_forcing, "),
        ({"policy": "radial", "policy.top_p": 0.9}, "'radial' has no setting 'top_p'; its settings are decay"),
    ],
)
def test_a_policy_that_is_not_there_is_refused_by_name(server, policy, problem):
    assert problem in server.error_of(graph({"model": loader(**policy)}))
