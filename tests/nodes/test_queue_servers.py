"""`lightforcing queue` against real servers: a batch over two of them survives the death of one."""

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

COUNT = 20
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


@pytest.fixture(scope="module")
def second(comfyui, tmp_path_factory):
    """A running server besides `server`."""
    checkout, python = comfyui
    started = ComfyServer(python, checkout, tmp_path_factory.mktemp("second"), ROOT, "light_forcing")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def start(*arguments):
    """`lightforcing queue` as a process of its own."""
    code = "from lightforcing.cli.main import main; main()"
    command = [sys.executable, "-c", code, "queue", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_batch(folder: Path):
    """The graph and a prompt file whose lines become the saved files' names, each in a colour of its own."""
    (folder / "graph.json").write_text(json.dumps(GRAPH))
    lines = [{"text": f"picture{number}", "set": {"2.color": number}} for number in range(1, COUNT + 1)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "graph.json", "--prompts", folder / "prompts.jsonl", "--prompt-node", "Name.value"]


def saved_on(server):
    """How many files each picture has in a server's own output folder."""
    return Counter(path.name.partition("_")[0] for path in server.output.glob("picture*.png"))


def test_single_prompt_and_the_same_again_from_the_cache(server, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    answers = []
    for _ in range(2):
        arguments = [
            tmp_path / "graph.json",
            "--out",
            tmp_path / "out",
            "--server",
            server.url,
            "--set",
            "Name.value=a",
        ]
        process = start(*arguments, "--set", "3.width=64", "--set", "3.height=64", "--json")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        answers += [event for event in map(json.loads, output.splitlines()) if event["event"] == "finished"]
    assert [answer["cached"] for answer in answers] == [False, True]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_00001_-2.png", "a_00001_.png"]
    assert len(list(server.output.glob("a_*.png"))) == 1


def test_unknown_choice_is_refused_in_the_servers_words(server, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    arguments = [tmp_path / "graph.json", "--out", tmp_path / "out", "--server", server.url]
    process = start(*arguments, "--set", "ImageScale.upscale_method=magic")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ImageScale: upscale_method: Value not in list ('magic' not in" in errors


def test_previews_of_a_run_are_saved(server, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph({"model": loader()})))
    arguments = [tmp_path / "graph.json", "--out", tmp_path / "out", "--server", server.url]
    process = start(*arguments, "--set", "sampler.seed=11", "--save-previews", tmp_path / "previews", "--json")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in output.splitlines()]
    previews = [event for event in events if event["event"] == "preview"]
    assert previews
    for event in previews:
        assert event["node"] == "sampler"
        with Image.open(event["file"]) as picture:
            picture.load()
            assert min(picture.size) > 1


def test_batch_over_two_servers_outlives_one(server, second, tmp_path):
    staying, dying = server, second
    batch = write_batch(tmp_path)
    arguments = [*batch, "--out", tmp_path / "out", "--server", staying.url, "--server", dying.url]
    process = start(*arguments, "--patience", 2, "--json")
    events = []
    try:
        killed = False
        for line in process.stdout:
            events.append(json.loads(line))
            at_work = events[-1]["event"] == "progress" and events[-1]["node"] == "ImageScale"
            done = Counter(event["server"] for event in events if event["event"] == "finished")
            if not killed and at_work and events[-1]["server"] == dying.url and done.total() >= COUNT // 2 - 2:
                killed = True
                dying.kill()
        errors = process.stderr.read()
        assert process.wait(60) == 0, errors
    finally:
        process.kill()
    assert killed
    assert done[dying.url] >= 1
    assert done[staying.url] >= COUNT // 2
    finished = Counter(event["prompt"] for event in events if event["event"] == "finished")
    assert finished == Counter({f"{number:04d}": 1 for number in range(1, COUNT + 1)})
    assert [event["server"] for event in events if event["event"] == "server_lost"] == [dying.url]
    for number in range(1, COUNT + 1):
        (path,) = (tmp_path / "out" / f"{number:04d}").iterdir()
        assert path.name == f"picture{number}_00001_.png"
        with Image.open(path) as picture:
            assert picture.size == (LARGE, LARGE)
            assert picture.getpixel((0, 0)) == (0, 0, number)
    (returned,) = [int(event["prompt"]) for event in events if event["event"] == "returned"]
    on_dying = saved_on(dying)
    del on_dying[f"picture{returned}"]  # it may have been saved in the moment in which the server died
    assert saved_on(staying) + on_dying == Counter({f"picture{number}": 1 for number in range(1, COUNT + 1)})
    again = start(*arguments, "--json")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert [json.loads(line)["event"] for line in output.splitlines() if '"submitted"' in line] == []
