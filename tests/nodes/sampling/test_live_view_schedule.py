"""The numbers behind the schedule's plot, and what is refused when a prompt is queued."""

import json
from itertools import accumulate
from urllib.error import HTTPError

import pytest

from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.rollout.schedule import Schedule

from ...support.comfy_server import Refused
from ...support.graphs import graph, link, loader, schedule, vae_loader, video_output

CUSTOM = {name.removeprefix("preset."): value for name, value in schedule()["inputs"].items() if name != "length"}
CUSTOM["sparsity"] = ""
# As the authors' own configuration gives them.
PUBLISHED_H100 = {
    ("light_forcing_short_h100", 81): [0, 0.746990, 0.775068, 0.791806, 0.803228, 0.811660, 0.818213],
    ("light_forcing_long_h100", 249): [0, 0.684473, 0.724023, 0.747599, 0.763689, 0.775565, 0.784796],
}


def refusal(server, prompt, node):
    """The one message with which a prompt is refused, which is this node's."""
    with pytest.raises(Refused) as refused:
        server.queue(prompt)
    ((named, errors),) = refused.value.errors["node_errors"].items()
    assert named == node
    (error,) = errors["errors"]
    return error["details"]


@pytest.fixture
def numbers(server):
    return lambda **asked: json.loads(server.post("/light_forcing/schedule", {"length": 81, **asked}))


@pytest.mark.parametrize(
    "preset", ["light_forcing_short", "light_forcing_long", "longlive", "causal_forcing_framewise"]
)
def test_plot_shows_what_the_run_will_do(numbers, preset):
    found, made = numbers(preset={"preset": preset}, length=249), Schedule.of_family(FAMILIES[preset], 63)
    assert found["sparsities"] == pytest.approx(made.sparsities())
    assert (found["lengths"], found["window"]) == (made.chunk_lengths(), made.window)
    assert 0 < found["attention_ratio"] < found["model_ratio"] < 1
    weights = [min(end, made.window or end) for end in accumulate(made.chunk_lengths())][1:]
    mean = sum(a * b for a, b in zip(weights, made.sparsities()[1:], strict=True)) / sum(weights)
    assert found["mean"] == pytest.approx(mean)
    assert (found["mean"] == pytest.approx(found["target"])) == (preset == "light_forcing_long")


@pytest.mark.parametrize(("preset", "length"), PUBLISHED_H100)
def test_h100_presets_equal_the_published_lists(numbers, preset, length):
    found = numbers(preset={"preset": preset}, length=length)["sparsities"]
    published = PUBLISHED_H100[preset, length]
    assert found[: len(published)] == pytest.approx(published, abs=2e-6)


def test_presets_that_follow_the_model_do(numbers):
    assert "follows" in numbers(preset={"preset": "auto"})
    by_file = numbers(preset={"preset": "auto"}, file="short_video_gen.pt")
    by_family = numbers(preset={"preset": "auto"}, family="light_forcing_short", file="longlive_base.pt")
    assert by_file == by_family == numbers(preset={"preset": "light_forcing_short"})
    gentle = numbers(preset={"preset": "gentle"}, file="long_video_gen.pt")
    assert (gentle["target"], gentle["window"]) == (0.6, 12)
    dense = numbers(preset={"preset": "dense"}, file="long_video_gen.pt")
    assert (dense["attention_ratio"], dense["target"], dense["window"]) == (1.0, None, 12)


@pytest.mark.parametrize(
    "asked",
    [
        {"preset": "auto"},
        {"preset": {"preset": "auto"}, "file": 5},
        {"preset": {**CUSTOM, "frames_per_chunk": None}},
        {"preset": {**CUSTOM, "target": "0.5"}},
        {"preset": {**CUSTOM, "reference": 30}},
        {"preset": {"preset": ["auto"]}, "family": {}},
    ],
)
def test_request_that_no_node_makes_is_refused(server, asked):
    with pytest.raises(HTTPError) as refused:
        server.post("/light_forcing/schedule", {"length": 81, **asked})
    assert refused.value.code == 400
    assert "not the inputs of a Light Forcing Schedule" in json.load(refused.value)["error"]


def test_plot_says_why_a_schedule_cannot_be_met(numbers):
    assert "use at least 4" in numbers(preset={**CUSTOM, "window": 3, "sink_frames": 1})["error"]
    assert "16001" in numbers(preset={**CUSTOM, "frames_per_chunk": 1}, length=4_000_001)["error"]
    assert "does not exist" in numbers(preset={"preset": "of_tomorrow"}, file="short_video_gen.pt")["error"]


@pytest.mark.parametrize("route", ["page", "schedule"])
def test_body_of_another_kind_is_refused_with_the_reason(server, route):
    unread = [b"", b"{", b"\xff", b"[" * 100_000, b'"' + b"x" * (1 << 18) + b'"']
    for body in ([], {}, {"client_id": [1], "plays": True}, {"preset": "x" * 1000}, *unread):
        with pytest.raises(HTTPError) as refused:
            server.post(f"/light_forcing/{route}", body)
        assert refused.value.code == 400
        assert json.load(refused.value)["error"]


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"length": 82}, "use 81 or 85"),
        ({"length": 4_000_000_001}, "more than 16001 video frames"),
        ({"sparsity": "0, " * 50_000}, "sparsity is longer than a number for each of 4001 chunks"),
        ({"window": 3, "sink_frames": 1}, "use at least 4 latent frames"),
        ({"sparsity": "99: 0.5"}, "chunks 0 to 6"),
        ({"preset": "of_tomorrow"}, "this preset does not exist"),
    ],
)
def test_wrong_schedule_is_refused_once_when_it_is_queued(server, changes, way_out):
    prompt = graph({"model": loader(), "schedule": schedule(**{"length": 81, **changes})})
    prompt["schedule"]["inputs"]["preset.sparsity"] = changes.get("sparsity", "")
    prompt["sampler"]["inputs"]["schedule"] = link("schedule")
    assert way_out in refusal(server, prompt, "schedule")


def test_linked_length_is_not_held_against_a_schedule(server):
    prompt = graph({"model": loader(), "schedule": schedule(21, sparsity="9: 0.5")})
    prompt["length"] = {"class_type": "PrimitiveInt", "inputs": {"value": 21}}
    prompt["schedule"]["inputs"]["length"] = link("length")
    prompt["sampler"]["inputs"]["schedule"] = link("schedule")
    assert "this video has chunks 0 to 1" in server.error_of(prompt)
    prompt["schedule"]["inputs"] |= {"preset.window": 3, "preset.sink_frames": 1}
    with pytest.raises(Refused, match="use at least 4"):
        server.queue(prompt)


def test_seed_for_a_chunk_that_the_video_does_not_have_is_refused(server):
    assert "this video has chunks 0 to 1" in server.error_of(graph({"model": loader()}, chunk_seeds="1: 5, 2: 7"))


@pytest.mark.parametrize(
    ("inputs", "way_out"),
    [
        ({"cfg": 3.0}, "needs a negative prompt"),
        ({"chunk_seeds": "x: y"}, "write it like"),
        ({"video_output": ["out", 0]}, "connect Load VAE to vae"),
    ],
)
def test_wrong_sampler_inputs_are_refused_when_they_are_queued(server, inputs, way_out):
    assert way_out in refusal(server, graph({"model": loader(), "out": video_output("a")}, **inputs), "sampler")


@pytest.mark.parametrize(
    ("inputs", "way_out"),
    [
        ({"crf": 60}, "outside 0 … 51 of .mp4"),
        ({"crf": 64, "format": "webm"}, "outside 0 … 63 of .webm"),
        ({"crf": -2}, "outside 0 … 51"),
        ({"format": "avi"}, "use .mp4 or .webm"),
        ({"format": "a/../../../../evil.mp4"}, "use .mp4 or .webm"),
        ({"prefix": ""}, "use one such as video/clip"),
        ({"prefix": "video/.."}, "use one such as video/clip"),
    ],
)
def test_wrong_video_file_is_refused_when_it_is_queued(server, inputs, way_out):
    prompt = graph({"model": loader(), "out": video_output(**{"prefix": "a", **inputs})}, video_output=link("out"))
    prompt["sampler"]["inputs"]["vae"] = link("vae")
    prompt["vae"] = vae_loader()
    assert way_out in refusal(server, prompt, "out")
