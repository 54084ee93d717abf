"""`lightforcing queue` against a real server."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from ..support.graphs import graph, link, loader, node

COUNT = 8
LARGE = 1500  # pixels a side: a prompt takes a moment, so that a command can die in the middle of one
GRAPH = {
    "1": {**node("PrimitiveString", value="nobody"), "_meta": {"title": "Name"}},
    "2": node("EmptyImage", width=32, height=32, batch_size=1, color=0),
    "3": node("ImageScale", image=link("2"), upscale_method="lanczos", width=LARGE, height=LARGE, crop="disabled"),
    "4": node("SaveImage", images=link("3"), filename_prefix=link("1")),
}


@pytest.fixture
def start(tmp_path):
    """`lightforcing queue` as a process of its own, with files below `out`."""

    def run(document, server, *arguments):
        (tmp_path / "graph.json").write_text(json.dumps(document))
        code = "from lightforcing.cli.main import main; main()"
        given = ["queue", tmp_path / "graph.json", "--out", tmp_path / "out", "--server", server.url, *arguments]
        command = [sys.executable, "-c", code, *map(str, given)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def finish(process, seconds=120):
    """The events of a `--json` process that ended well."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def test_single_prompt_and_the_same_again_fetch_the_same_file(server, start, tmp_path):
    small = ["--set", "Name.value=a", "--set", "3.width=64", "--set", "3.height=64", "--json"]
    for _ in range(2):
        assert finish(start(GRAPH, server, *small))[-1]["done"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_00001_-2.png", "a_00001_.png"]
    assert len(list(server.output.glob("a_*.png"))) == 1


def test_unknown_choice_is_refused_in_the_servers_words(server, start):
    process = start(GRAPH, server, "--set", "ImageScale.upscale_method=magic")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ImageScale: Value not in list (upscale_method: 'magic' not in" in errors


def test_previews_of_a_run_are_saved(server, start, tmp_path):
    arguments = ["--set", "sampler.seed=11", "--save-previews", tmp_path / "previews", "--json"]
    events = finish(start(graph({"model": loader()}), server, *arguments))
    previews = [event for event in events if event["event"] == "preview"]
    assert previews
    for event in previews:
        assert event["node"] == "sampler"
        with Image.open(event["file"]) as picture:
            picture.load()
            assert min(picture.size) > 1


def test_batch_outlives_its_command_and_nothing_runs_twice(server, start, tmp_path):
    lines = [{"text": f"picture{number}", "set": {"2.color": number}} for number in range(1, COUNT + 1)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ["--prompts", tmp_path / "prompts.jsonl", "--prompt-node", "Name.value", "--json"]
    process, done = start(GRAPH, server, *batch), 0
    for event in map(json.loads, process.stdout):
        done += event["event"] == "finished"
        if done >= 2 and event["event"] == "progress" and event["node"] == "ImageScale":
            process.kill()  # while the next one is at work
    process.communicate()
    events = finish(start(GRAPH, server, *batch))
    assert 0 < [event["event"] for event in events].count("finished") < COUNT
    for number in range(1, COUNT + 1):
        (path,) = (tmp_path / "out" / f"{number:04d}").iterdir()
        assert path.name == f"picture{number}_00001_.png"
        with Image.open(path) as picture:
            assert (picture.size, picture.getpixel((0, 0))) == ((LARGE, LARGE), (0, 0, number))
    assert len(list(server.output.glob("picture*.png"))) == COUNT
    assert {event["event"] for event in finish(start(GRAPH, server, *batch))} == {"batch", "summary"}
