"""A small graph with a text and a seed, and servers that render it into a text file: what the queue's tests share."""

import json
import time

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
MODES = [
    {"key": "plain", "inputs": {}},
    {
        "key": "growth",
        "inputs": {"required": {"target": ["FLOAT", {"default": 0.6}], "curve": [["linear", "root"], {}]}},
    },
]
OBJECT_INFO = {
    "CLIPLoader": {"input": {"required": {"clip_name": [["umt5", "clip_l"], {}]}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP", {}]}}},
    "Sampler": {
        "input": {
            "required": {
                "positive": ["CONDITIONING", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": MODES}],
            },
            "optional": {"cfg": ["FLOAT", {"default": 1.0}]},
        }
    },
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
