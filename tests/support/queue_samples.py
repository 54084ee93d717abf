"""A small graph with a text and a seed, a server that renders it into a text file, and batches of it."""

import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from lightforcing.cli.queue.batch import Batch
from lightforcing.cli.queue.jobs import make_jobs
from lightforcing.cli.queue.server import ComfyServer

from .fake_comfy import SUCCESS

GRAPH = {
    "1": {"class_type": "CLIPLoader", "inputs": {"clip_name": "umt5"}, "_meta": {"title": "Load CLIP"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog", "clip": ["1", 0]}, "_meta": {"title": "Prompt"}},
    "3": {
        "class_type": "Sampler",
        "inputs": {"positive": ["2", 0], "seed": 5, "mode": "plain"},
        "_meta": {"title": "My sampler"},
    },
    "4": {"class_type": "Save", "inputs": {"images": ["3", 0], "prefix": "clip"}, "_meta": {"title": "Save"}},
}
GROWTH = {
    "required": {"target": ["FLOAT", {"default": 0.6}], "curve": [["linear", "root"], {}]},
    "optional": {"note": ["STRING", {"default": ""}]},
}
MODES = {"options": [{"key": "plain", "inputs": {}}, {"key": "growth", "inputs": GROWTH}]}
SAMPLER = {
    "required": {"positive": ["CONDITIONING", {}], "seed": ["INT", {}], "mode": ["COMFY_DYNAMICCOMBO_V3", MODES]},
    "optional": {"cfg": ["FLOAT", {}], "block": ["COMBO", {"options": ["16", "64"]}], "tail": ["BOOLEAN", {}]},
}
OBJECT_INFO = {
    "CLIPLoader": {"input": {"required": {"clip_name": [["umt5", "clip_l"], {}]}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP", {}]}}},
    "Sampler": {"input": SAMPLER},
    "Save": {"input": {"required": {"images": ["IMAGE", {}], "prefix": ["STRING", {}]}}},
}


def text_of(body):
    return body["prompt"]["2"]["inputs"]["text"]


def render_text(fake):
    """Let `fake` answer every prompt with one numbered file that holds the prompt's text, like a video's save node."""

    def render(body):
        name = f"clip_{len(fake.rendered) + 1:05d}_.txt"
        fake.files[name, "video", "output"] = text_of(body).encode()
        return {
            "outputs": {"4": {"images": [{"filename": name, "subfolder": "video", "type": "output"}]}},
            "status": SUCCESS,
        }

    fake.object_info, fake.render = OBJECT_INFO, render
    fake.events = [("executing", {"node": "3"})]


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def texts_below(folder):
    """The content of every file of every job's folder, by the job's name; each must hold exactly one."""
    found = {}
    for job in folder.iterdir():
        if job.is_dir():
            (path,) = [path for path in job.rglob("*") if path.is_file()]
            found[job.name] = path.read_text()
    return found


def events_of(output):
    return [json.loads(line) for line in output.splitlines()]


def hold(fake, after=0):
    """Let runs wait, so many of them excepted."""
    fake.hold, fake.hold_after = True, after


class TextBatch:
    """Prompts `text 1` … `text n` under the names `0001` …, and what happened to them."""

    def __init__(self, out, fake, count, **options):
        self.fake, self.out, self.events = fake, out, []
        self.jobs = make_jobs(GRAPH, OBJECT_INFO, lines=[{"text": f"text {number}"} for number in range(1, count + 1)])
        self.patience, self.options = options.pop("patience", 1.0), options

    def start(self):
        """Run in another thread; the future's result is the counts."""
        return ThreadPoolExecutor(1).submit(self.run)

    def run(self):
        """How many are done, failed and left."""
        with closing(ComfyServer(self.fake.url, patience=self.patience)) as server:
            Batch(self.jobs, server, self._note, self.out, **self.options).run()
        return tuple(self.events[-1][key] for key in ("done", "failed", "left"))

    def _note(self, kind, **fields):
        self.events.append({"event": kind, **fields})

    def of(self, kind):
        return [event for event in list(self.events) if event["event"] == kind]

    def check_complete(self, *, once=True):
        """Every job's folder holds its text; `once`: and no prompt ran twice."""
        wanted = {job.name: text_of({"prompt": job.prompt}) for job in self.jobs}
        assert texts_below(self.out) == wanted
        assert not [name for name in os.listdir(self.out) if name.endswith(".part")]
        if once:
            assert Counter(map(text_of, self.fake.rendered)) == Counter(wanted.values())
