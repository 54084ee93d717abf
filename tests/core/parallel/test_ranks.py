"""One video on several ranks: the same as on one, bit for bit in float64, with every option."""

import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.runtime import Runtime
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.ranks import each_rank
from ...support.rollouts import TEXT, recipe_of, text, video

SIZE = 6, 14  # 21 tokens per frame, in blocks of 16: ragged, and not divisible by 2 or 4
FINE = {"backend": "reference", "block": (16, 16), "keep_frames": 4, "sink_frames": 1, "near_frames": 1}
FOLLOWING = {"window": 8, "sink_frames": 1, "sink_rope": "follow"}
LSE = {"estimator": "lse", "tail": True}
OPTIONS = {
    "published": {},
    "dense": {"growth": None},
    "lse and tail": {"attention": LSE},
    "int8": {"kv": KVOptions("int8")},
    "fp8 in CPU memory": {"kv": KVOptions("fp8", host=True)},
    "following sinks": FOLLOWING,
    "changing sinks": FOLLOWING | {"sink_rope": "average", "window": 9, "sink_frames": 3},
    "hard switch": {"context": [Prompt(text(1)), Prompt(text(2), 2, "hard")]},
    "cut": {"context": [Prompt(text(1)), Prompt(text(2), 2, "cut", jump=8, pin=1)]},
    "batch 2": {"batch": 2},
    "given end": {"last_latents": torch.ones(1, 16, 1, *SIZE)},
    "image": {"initial_latents": torch.ones(1, 16, 3, *SIZE)},
    "cfg": {"cfg": 3.0, "negative": text(4)},
    "tiles": {"attention": {"tiles": True}},
    **{name: {"attention": {"policy": name}} for name in ("topk", "radial", "mass", "vmoba", "forcing_kv")},
    "dummy_forcing": {"attention": {"policy": "dummy_forcing"}},
    "rolling_sink": {"attention": {"policy": "rolling_sink"}, "window": 9, "frames": 15},
    "echo_forcing": {"attention": {"policy": "echo_forcing"}, "window": 10, "frames": 15},
    "pbsa": {"attention": {"policy": "pbsa"}, "window": 6, "frames": 15},
    "rolling_forcing": {
        "attention": {"policy": "rolling_forcing"},
        "sink_rope": "follow",
        "sink_frames": 3,
        "frames": 15,
    },
    "everything": FOLLOWING
    | {"attention": LSE | {"tiles": True}, "batch": 2, "cfg": 2.0, "negative": text(4), "kv": KVOptions("int8")}
    | {"last_latents": torch.ones(1, 16, 1, *SIZE), "context": [Prompt(text(1)), Prompt(text(2), 2, "hard")]},
}


@pytest.fixture(scope="module")
def dits():
    weights = random_state_dict(dim=512, ffn_dim=64, layers=2, text_dim=TEXT)
    return {dtype: wan_from_state_dict(weights, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def run(dit, name, exchange=None, finished=()):
    options = {"frames": 12, "context": text(1), "growth": (0.0, 0.5, 0.6, 0.7), **OPTIONS[name]}
    attention = AttentionOptions(**FINE | options.get("attention", {}))
    kv, shape = options.pop("kv", KVOptions()), (options.pop("batch", 1), 16, options.pop("frames"), *SIZE)
    options |= {"attention": attention, "latent_shape": shape, "sigmas": (1.0, 0.5, 0.0), "frames_per_chunk": 3}
    runtime = Runtime(kv=kv, exchange=exchange, recorder=RunRecorder(reads_blocks=False))
    return list(rollout(dit, recipe_of(**options), runtime, finished))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_video_of_several_ranks_is_that_of_one(dits, name):
    far = 1e-3 if "kv" in OPTIONS[name] else 1e-5  # a rounded key may become the next of 8 bits
    for dtype, sizes, tolerance in ((torch.float64, (3, 4), 0), (torch.float32, (2,), far)):
        alone = video(run(dits[dtype], name))
        for size in sizes:
            videos = [video(chunks) for chunks in each_rank(size, lambda rank, dit=dits[dtype]: run(dit, name, rank))]
            assert all(torch.equal(one, videos[0]) for one in videos)
            torch.testing.assert_close(videos[0], alone, rtol=0, atol=tolerance)


def test_a_run_goes_on_with_another_number_of_ranks(dits):
    dit, name = dits[torch.float64], "lse and tail"
    whole = run(dit, name)
    first = each_rank(3, lambda rank: run(dit, name, rank))[0]
    rest = each_rank(2, lambda rank: run(dit, name, rank, first[:2]))
    assert all(torch.equal(video(chunks), video(whole[2:])) for chunks in rest)


def test_a_lost_rank_is_an_error_of_the_others_and_their_chunks_are_kept(tmp_path):
    script, paths = Path(__file__).with_name("processes.py"), {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, str(script)]
    ranks = [
        Popen([*command, str(rank), str(tmp_path)], env=os.environ | paths, stderr=PIPE, text=True) for rank in range(4)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0, 9], errors
    assert sorted(file.name for file in tmp_path.glob("ended.*")) == ["ended.0", "ended.1", "ended.2"], errors
