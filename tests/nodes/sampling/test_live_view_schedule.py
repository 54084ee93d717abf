"""The numbers behind the schedule's plot, and inputs that are refused when a prompt is queued."""

from itertools import accumulate

import pytest

from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.rollout.schedule import Schedule

from ...support.comfy_server import Refused
from ...support.graphs import graph, link, loader, node, schedule, vae_loader, video_output

CUSTOM = {name.removeprefix("preset."): value for name, value in schedule()["inputs"].items() if name != "length"}
CUSTOM["sparsity"] = ""
# As the authors' own configuration gives them.
PUBLISHED_H100 = {
    ("light_forcing_short_h100", 81): [0, 0.746990, 0.775068, 0.791806, 0.803228, 0.811660, 0.818213],
    ("light_forcing_long_h100", 249): [0, 0.684473, 0.724023, 0.747599, 0.763689, 0.775565, 0.784796],
}


@pytest.fixture
def numbers(server):
    return lambda **asked: server.post("/light_forcing/schedule", {"length": 81, **asked}).json()


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


def test_plot_draws_what_a_policy_with_its_own_density_skips(numbers):
    def of(**widgets):
        return numbers(preset={"preset": "light_forcing_short"}, widgets={"block": "64", "keep_sink": -1, **widgets})

    radial = of(policy="radial", **{"policy.decay": 0.2})
    read = [1.0, 0.6576, 0.4775, 0.3873, 0.3332, 0.2971, 0.2639]  # frames of 1560 tokens, from 3 to 21 of them visible
    assert radial["sparsities"] == pytest.approx([1.0 - share for share in read], abs=1e-4)
    pairs = sum(share * 3 * chunk for chunk, share in enumerate(read, 1))
    assert radial["attention_ratio"] == pytest.approx(pairs / 84, abs=1e-4)
    assert radial["policy"] == "radial (baseline), decay 0.2; decides itself how much it reads"
    by_keys = of(policy="mass", **{"policy.top_p": 0.9})
    assert by_keys["sparsities"] == [0.0, *[None] * 6]
    assert (by_keys["attention_ratio"], by_keys["model_ratio"], by_keys["mean"]) == (None, None, None)
    assert of(policy="mass")["sparsities"] == of()["sparsities"] == of(policy="auto")["sparsities"]
    pool = of(policy="pbsa")  # a window of 9 latent frames, and the blocks of 3 that have left it
    skipped = [one - (1 / 3 if chunk > 2 else 0) for chunk, one in enumerate(of()["sparsities"])]
    assert (pool["sparsities"], pool["window"]) == (pytest.approx(skipped, abs=0.01), 9)
    assert of(policy="rolling_sink")["window"] == 21
    assert of(policy="dense")["attention_ratio"] == 1.0
    assert "no setting 'share'" in of(policy="radial", **{"policy.share": 1})["error"]
    assert "is no number" in of(policy="radial", **{"policy.decay": "x"})["error"]


SCHEDULES = (
    {"preset": "auto"},
    {"preset": {"preset": "auto"}, "file": 5},
    {"preset": {**CUSTOM, "frames_per_chunk": None}},
    {"preset": {**CUSTOM, "target": "0.5"}},
    {"preset": {**CUSTOM, "reference": 30}},  # a field of the schedule
    {"preset": {"preset": ["auto"]}, "family": {}},
    {"preset": CUSTOM, "widgets": [1]},
    {"preset": CUSTOM, "widgets": {"policy": {}}},
)
PAGES = ({"client_id": [1], "plays": True}, {"preset": "x" * 1000})
UNREAD = (b"", b"{", b"\xff", b"[" * 100_000, b'"' + b"x" * (1 << 18) + b'"', b"[]", b"{}")


@pytest.mark.parametrize(
    ("route", "bodies"), [("schedule", [{"length": 81, **one} for one in SCHEDULES]), ("page", PAGES)]
)
def test_request_that_no_page_makes_is_refused_with_the_reason(server, route, bodies):
    for body in (*bodies, *UNREAD):
        answer = server.post(f"/light_forcing/{route}", body)
        assert (answer.status_code, bool(answer.json()["error"])) == (400, True)


def test_plot_says_why_a_schedule_cannot_be_met(numbers):
    assert "use at least 4" in numbers(preset={**CUSTOM, "window": 3, "sink_frames": 1})["error"]


REFUSED = [
    ("plan", {"length": 82}, "use 81 or 85"),
    ("plan", {"length": 4_000_000_001}, "more than 16001 video frames"),
    ("plan", {"sparsity": "0, " * 50_000}, "sparsity is longer than a number for each of 4001 chunks"),
    ("plan", {"window": 3, "sink_frames": 1}, "use at least 4 latent frames"),
    ("plan", {"sparsity": "99: 0.5"}, "chunks 0 to 6"),
    ("plan", {"preset": "of_tomorrow"}, "this preset does not exist"),
    ("sampler", {"cfg": 3.0}, "needs a negative prompt"),
    ("sampler", {"chunk_seeds": "x: y"}, "write it like"),
    ("sampler", {"vae": None}, "connect Load VAE to vae"),
    ("out", {"crf": 60}, "outside 0 … 51 of .mp4"),
    ("out", {"crf": 64, "format": "webm"}, "outside 0 … 63 of .webm"),
    ("out", {"crf": -2}, "outside 0 … 51"),
    ("out", {"format": "avi"}, "use .mp4 or .webm"),
    ("out", {"format": "a/../../../../evil.mp4"}, "use .mp4 or .webm"),
    ("out", {"prefix": ""}, "use one such as video/clip"),
    ("out", {"prefix": "video/.."}, "use one such as video/clip"),
]


@pytest.mark.parametrize(("wrong", "inputs", "way_out"), REFUSED)
def test_wrong_input_is_refused_once_when_it_is_queued(server, wrong, inputs, way_out):
    given = {"plan": {"length": 81, "sparsity": ""}, "sampler": {"vae": link("vae")}, "out": {"prefix": "a"}}
    given[wrong] |= inputs
    prompt = graph({"model": loader(), "plan": schedule(**given["plan"]), "vae": vae_loader()}, schedule=link("plan"))
    prompt["out"] = video_output(**given["out"])
    connected = {"video_output": link("out"), **given["sampler"]}
    prompt["sampler"]["inputs"] |= {name: value for name, value in connected.items() if value is not None}
    with pytest.raises(Refused) as refused:
        server.queue(prompt)
    ((named, errors),) = refused.value.errors["node_errors"].items()
    (error,) = errors["errors"]
    assert (named, way_out in error["details"]) == (wrong, True), error


def test_linked_length_is_not_held_against_a_schedule(server):
    prompt = graph({"model": loader(), "schedule": schedule(21, sparsity="9: 0.5")})
    prompt["length"] = node("PrimitiveInt", value=21)
    prompt["schedule"]["inputs"]["length"] = link("length")
    prompt["sampler"]["inputs"]["schedule"] = link("schedule")
    assert "this video has chunks 0 to 1" in server.error_of(prompt)
    prompt["schedule"]["inputs"] |= {"preset.window": 3, "preset.sink_frames": 1}
    with pytest.raises(Refused, match="use at least 4"):
        server.queue(prompt)
