"""`lightforcing queue` against a real server."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ..support.comfy_server import ComfyServer
from ..support.graphs import graph, loader
from .conftest import ROOT

COUNT = 8
LARGE = 1500  # pixels a side: a prompt takes a moment, so that a server can die in the middle of one
GRAPH = {
    "1": {"class_type": "PrimitiveString", "inputs": {"value": "nobody"}, "_meta": {"title": "Name"}},
    "2": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 0}},
    "3": {
        "class_type": "ImageScale",
        "inputs": {"image": ["2", 0], "upscale_method": "lanczos", "width": LARGE, "height": LARGE, "crop": "disabled"},
    },
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": ["1", 0]}},
}


@pytest.fixture
def second(comfyui, tmp_path):
    """A running server besides `server`, for a test that ends it."""
    checkout, python = comfyui
    started = ComfyServer(python, checkout, tmp_path / "second", ROOT, "light_forcing")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


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


def saved_on(server):
    """How many files each picture has in a server's own output folder."""
    return Counter(path.name.partition("_")[0] for path in Path(server.output).glob("picture*.png"))


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


def test_batch_outlives_its_command_and_its_server(server, second, start, tmp_path):
    """The command is killed in the middle of the batch, then its server; a third start ends it on another server."""
    lines = [{"text": f"picture{number}", "set": {"2.color": number}} for number in range(1, COUNT + 1)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = ["--prompts", tmp_path / "prompts.jsonl", "--prompt-node", "Name.value", "--patience", 2, "--json"]
    events = []

    def run_until(done, end):
        """Until so many prompts are finished and the next one is at work: then call `end` with the process."""
        process = start(GRAPH, second, *batch)
        try:
            for line in process.stdout:
                events.append(json.loads(line))
                at_work = events[-1]["event"] == "progress" and events[-1]["node"] == "ImageScale"
                if at_work and sum(event["event"] == "finished" for event in events) >= done:
                    end(process)
                    done = COUNT + 1
            return process.wait(60)
        finally:
            process.kill()

    run_until(2, lambda process: process.kill())
    assert run_until(4, lambda process: second.kill()) == 1
    assert [event["server"] for event in events if event["event"] == "server_lost"] == [second.url]
    events += finish(start(GRAPH, server, *batch))
    finished = Counter(event["prompt"] for event in events if event["event"] == "finished")
    assert finished == Counter({f"{number:04d}": 1 for number in range(1, COUNT + 1)})
    for number in range(1, COUNT + 1):
        (path,) = (tmp_path / "out" / f"{number:04d}").iterdir()
        assert path.name == f"picture{number}_00001_.png"
        with Image.open(path) as picture:
            assert picture.size == (LARGE, LARGE)
            assert picture.getpixel((0, 0)) == (0, 0, number)
    rendered = saved_on(server) + saved_on(second)
    assert rendered.total() <= COUNT + 2  # what ended on the second server while it died may be there too
    assert {event["event"] for event in finish(start(GRAPH, server, *batch))} == {"batch", "summary"}
