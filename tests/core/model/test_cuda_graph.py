"""Passes that are recorded once per kind and launched again: equal to running them, bit for bit.

Recording is done on a tape of operations in the place of a CUDA graph, see `tape`.
"""

import importlib
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lightforcing.benchmarks import step
from lightforcing.lightforcing_core import machine
from lightforcing.lightforcing_core.attention import selection
from lightforcing.lightforcing_core.model import cuda_graph, fused
from lightforcing.lightforcing_core.model.causal import ModelState, run_pass
from lightforcing.lightforcing_core.model.cuda_graph import StepGraph, why_no_graph
from lightforcing.lightforcing_core.model.fp8 import quantize_rows
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.pinned import Weights, why_not_resident
from lightforcing.lightforcing_core.rollout import loop
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support import tape
from ...support.rollouts import FINE, TEXT, roll, text, video
from ...support.tape import TapeRecorder

CPU = torch.device("cpu")
FOUR, SIX = few_step_sigmas(), few_step_sigmas((1000, 850, 700, 550, 400, 250))


@pytest.fixture
def dit():
    return wan_from_state_dict(random_state_dict(dim=128, ffn_dim=128, layers=2, text_dim=TEXT, seed=0))


@pytest.fixture
def events(monkeypatch):
    """Steps are recorded on tapes, even if that is not faster; what became of the recordings."""
    monkeypatch.setattr(cuda_graph, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(cuda_graph, "choose", lambda *_, **__: "graph")
    monkeypatch.setattr(cuda_graph, "is_off", lambda: False)
    monkeypatch.setattr(cuda_graph, "_checked", set())
    monkeypatch.setattr(TapeRecorder, "events", [])
    return TapeRecorder.events


def run(dit, graphs, *, seen=None, options=None, context=None, **changes):
    """Chunks of 2 frames of 35 tokens in ragged blocks of 16; `seen` gets what every pass leaves behind."""

    def denoise(x, sigma, passes):
        timestep, predicted = torch.full((x.shape[0],), sigma * 1000.0), []
        for one in passes:
            predicted.append(x - sigma * one(dit, x, timestep))
            if seen is not None:
                seen.append(left_by(one.state))
        return torch.stack(predicted).mean(0)

    settings = {
        "latent_shape": (1, 16, 6, 10, 14),
        "frames_per_chunk": 2,
        "sigmas": FOUR,
        "growth": (0.0, 0.5, 0.6),
        "attention": replace(FINE, **(options or {})),
        "denoise": denoise,
        "cuda_graph": graphs,
        **changes,
    }
    return roll(dit, text(1) if context is None else context, **settings)


def left_by(state):
    """Everything that a pass leaves in a state: numbers, and copies of all that is visible of its tensors."""
    cache, chunk = state.cache, state.chunk
    memory = [cache.visible(layer) for layer in range(cache.shape.layers)]
    held = [part.clone() for layer in memory for part in layer if part is not None]
    numbers = (chunk.passes, chunk.steps, chunk.given, chunk.frames, chunk.start_frame)
    numbers += (list(cache.slot_frames), cache.current_frames, cache.storage.visible)
    return numbers, held + [part.clone() for pair in state.text.keys_values for part in pair]


CASES = {
    "dense": {"growth": None},
    "sparse": {},
    "int8": {"kv": KVOptions("int8")},
    "tail, parts, tiles, int8": {"options": {"tail": True, "estimator": "lse", "tiles": True}, "kv": KVOptions("int8")},
    "ring wrapped, sinks follow": {"window": 4, "sink_frames": 1, "sink_rope": "follow"},
    "guided": {"cfg": 2.0, "negative": text(9), "sigmas": SIX},
    "prompt changes": {"context": [Prompt(text(1)), Prompt(text(2), 1, "soft"), Prompt(text(3), 2, "hard")]},
    "a longer first chunk": {"first_sigmas": SIX},
    "a given end": {"last_latents": torch.ones(1, 16, 1, 10, 14), "cfg": 2.0, "negative": text(9)},
    "a pool": {"options": {"policy": "pbsa", "settings": (("persistent", 1),)}, "window": 4},
    "nothing chosen by frames": {"growth": (0.0, 0.5, 0.5), "latent_shape": (1, 16, 4, 10, 14)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_launched_steps_leave_exactly_what_running_them_leaves(dit, events, case):
    plainly, launched = [], []
    expected = video(run(dit, "off", seen=plainly, **case))
    assert not events
    assert torch.equal(video(run(dit, "on", seen=launched, **case)), expected)
    assert sum(kind == "launch" for kind, _ in events) >= 4
    for (numbers, held), (same_numbers, same_held) in zip(plainly, launched, strict=True):
        assert numbers == same_numbers
        assert len(held) == len(same_held)
        assert all(map(torch.equal, held, same_held))


def test_a_recording_replaces_one_that_serves_no_more_chunks(dit, events):
    list(run(dit, "on"))
    # The first launch of each kind, dense and sparse, was compared with running it.
    one, two, three = ([("record", number), *3 * [("launch", number)]] for number in (1, 2, 3))
    assert events == [*one, *two, three[0], ("free", 2), *three[1:], ("free", 1), ("free", 3)]
    events.clear()
    list(run(dit, "on", cfg=2.0, negative=text(9)))
    assert sorted(number for kind, number in events if kind == "free") == [1, 2, 3, 4, 5, 6]  # of both prompts


@pytest.mark.parametrize("end", ["closed", "broken"])
def test_recordings_go_with_a_run_that_ends_early(dit, events, end):
    def on_step(event):
        if end == "broken" and event.index == 1 and event.step == 2:
            raise RuntimeError("stop")

    chunks = run(dit, "on", on_step=on_step)
    next(chunks)
    if end == "closed":
        chunks.close()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            next(chunks)
    recorded, freed = ({number for kind, number in events if kind == what} for what in ("record", "free"))
    assert recorded == freed != set()


@pytest.mark.parametrize("steps", [(1000,), (1000, 500)])
def test_too_few_steps_are_not_worth_recording(dit, events, steps):
    expected = video(run(dit, "off", sigmas=few_step_sigmas(steps)))
    assert torch.equal(video(run(dit, "on", sigmas=few_step_sigmas(steps))), expected)
    assert not events


def test_a_recorder_of_the_run_sees_launched_steps_as_it_sees_others(dit, events):
    records = {}
    for how in ("off", "on"):
        recorder = RunRecorder({"seed": "1"})
        list(run(dit, how, recorder=recorder))
        records[how] = recorder.finish()
    for plain, launched in zip(records["off"].chunks, records["on"].chunks, strict=True):
        assert plain.layer_density == launched.layer_density
        assert plain.block_map is launched.block_map is None or torch.equal(plain.block_map, launched.block_map)
    assert records["off"].attention == records["on"].attention
    assert "CUDA graphs" not in records["off"].facts
    assert records["on"].facts["CUDA graphs"] == "9 passes launched as graphs"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("not permitted"), "CUDA graph failed on cpu in torch.float32 (RuntimeError: not permitted)"),
        (torch.OutOfMemoryError("full"), "OutOfMemoryError: full"),
    ],
)
def test_steps_that_cannot_be_recorded_run_one_by_one(dit, events, monkeypatch, caplog, error, reason):
    tries = []

    def record(self, work):
        tries.append(1)
        work()  # leaves marks in the state, as a capture does that breaks half-way
        raise error

    plainly, seen, recorder = [], [], RunRecorder()
    expected = video(run(dit, "off", seen=plainly))
    monkeypatch.setattr(TapeRecorder, "record", record)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(run(dit, "auto", recorder=recorder, seen=seen)), expected)
    assert [numbers for numbers, *_ in seen] == [numbers for numbers, *_ in plainly]
    assert f"no longer used: {reason}" in recorder.finish().facts["CUDA graphs"]
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match=r"cuda_graph 'on' is not possible: .*; use 'auto' or 'off'"):
        list(run(dit, "on"))
    assert len(tries) == 2  # once in each run


@pytest.mark.parametrize("value", [1.5, torch.nan])
def test_a_launch_that_gives_another_result_is_found_out_at_once(dit, events, monkeypatch, value):
    expected = video(run(dit, "off"))
    monkeypatch.setattr(TapeRecorder, "spoil", staticmethod(lambda out: out.mul_(value)))
    recorder = RunRecorder()
    assert torch.equal(video(run(dit, "auto", recorder=recorder)), expected)
    assert "a recorded step and a normal one gave different results" in recorder.finish().facts["CUDA graphs"]
    assert [kind for kind, _ in events] == ["record", "launch", "free"]


def test_only_first_steps_recordings_and_the_first_check_of_a_kind_run_the_modules(dit, events, monkeypatch):
    calls = Counter()

    def count(name, module):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *given: calls.update([name]) or forward(*given))

    for name, module in (("head", dit.head.head), ("first", dit.blocks[0].ffn), ("last", dit.blocks[1].ffn)):
        count(name, module)
    # Twelve steps, of which nine are launched; replayed operations are no calls. Kinds are dense, sparse, and sparse
    # with frames to choose from; each is compared once in a process.
    for how, steps in (("off", 12), ("on", 3 + 3 + 3), ("on", 3 + 3)):
        list(run(dit, how))
        # Clean passes of all but the last chunk skip what only the output needs.
        assert calls == {"head": steps, "first": steps + 2, "last": steps}
        calls.clear()


def new_prompt(dit, state, run):
    for number in range(8):
        if number in (0, 4):
            state.follow(text(number))
        run()


def other_shape(dit, state, run):
    for shape in 3 * [(1,)] + 3 * [(1, 2)] + 3 * [(1,)]:
        run(torch.full(shape, 800.0))


def opened_anew(dit, state, run):
    for _ in range(2):
        for _ in range(3):
            run()
        state.cache.commit()  # the last pass counts as the clean one
        state.open_chunk(2, 0.0, "cpu", steps=9)


def weights_moved(dit, state, run):
    weight = dit.blocks[0].ffn[0].weight
    for number in range(8):
        if number == 4:
            old, weight.data = weight.data, weight.data.clone()
            old.fill_(torch.nan)  # somebody else has that memory now
        run()


@pytest.mark.parametrize(
    ("happens", "recordings"), [(new_prompt, 2), (other_shape, 3), (opened_anew, 2), (weights_moved, 2)]
)
def test_a_change_within_a_chunk_is_followed(dit, events, happens, recordings):
    def passes(predict):
        shape = CacheShape(layers=2, batch=1, slots=4, grid=(5, 7), heads=1, head_dim=128, block_k=16)
        state, out = ModelState(KVCache(shape), FINE), []
        state.follow(text(1))
        state.open_chunk(2, 0.0, "cpu", steps=9)
        x = torch.randn(1, 16, 2, 10, 14, generator=torch.Generator().manual_seed(3))
        times = iter(torch.arange(900.0, 0.0, -50.0).split(1))
        happens(dit, state, lambda time=None: out.append(predict(dit, x, next(times) if time is None else time, state)))
        return out

    graph = StepGraph(Weights(dit, CPU), print)
    with graph.held():
        launched, plain = passes(graph), passes(run_pass)
    assert all(map(torch.equal, launched, plain))
    assert [kind for kind, _ in events].count("record") == recordings


def test_auto_records_once_a_run_has_measured_that_graphs_are_faster(dit, events, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LIGHTFORCING_PROFILE")
    monkeypatch.setattr(cuda_graph, "choose", machine.choose)
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: 1e-3 if run.args == ("graph",) else 2e-3)
    monkeypatch.setattr(loop.Looks, "look", lambda *_, **__: None)
    expected, said = video(run(dit, "off")), []
    for _ in range(2):
        recorder = RunRecorder()
        assert torch.equal(video(run(dit, "auto", recorder=recorder, measuring=machine.measuring)), expected)
        said.append(recorder.finish().facts["CUDA graphs"])
    assert said == [
        "not used: they were not measured to be faster for this model and size",
        "9 passes launched as graphs",
    ]


def test_weights_that_comfyui_begins_to_patch_are_no_longer_recorded_in_this_run(dit, events):
    def patched_from_the_second_chunk_on(event):
        module.weight_function = [torch.clone] if event.chunk > 0 else []

    module = dit.blocks[1].ffn[0]
    expected = video(run(dit, "off"))
    recorder = RunRecorder()
    assert torch.equal(video(run(dit, "auto", on_step=patched_from_the_second_chunk_on, recorder=recorder)), expected)
    assert [kind for kind, _ in events].count("record") == 1
    assert "no longer used: ComfyUI moves or patches" in recorder.finish().facts["CUDA graphs"]
    module.weight_function = []
    list(run(dit, "on"))  # the next run is not held to it


# ------------------------------------------------------------------------------------------- where it cannot work


@pytest.mark.parametrize(("host", "reason"), [(False, "for NVIDIA GPUs, not for cpu"), (True, "CPU memory")])
def test_a_cpu_and_a_cache_in_its_memory_have_no_graphs_and_say_so(dit, request, host, reason):
    events = request.getfixturevalue("events") if host else []
    recorder = RunRecorder()
    list(run(dit, "auto", recorder=recorder, kv=KVOptions(host=host), latent_shape=(1, 16, 2, 10, 14)))
    assert reason in recorder.finish().facts["CUDA graphs"]
    assert not events
    with pytest.raises(ValueError, match=f"'on' cannot run: .*{reason}"):
        run(dit, "on", kv=KVOptions(host=host))
    with pytest.raises(ValueError, match=r"cuda_graph 'maybe' is not known; use one of auto, on, off"):
        run(dit, "maybe")


class Packed(torch.Tensor):
    pass


def changes_of(weight):
    return {"weight": torch.nn.Parameter(weight, requires_grad=False)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda weight: {"comfy_cast_weights": True, **changes_of(weight.to("meta"))},
            " moves or patches the weights of blocks.1.ffn.0",
        ),
        (lambda weight: {"weight_function": [torch.clone]}, " moves or patches the weights of blocks.1.ffn.0"),
        (lambda weight: {"_forward_hooks": {0: print}}, "blocks.1.ffn.0 has a hook"),
        (lambda weight: changes_of(weight.as_subclass(Packed)), "blocks.1.ffn.0.weight is a Packed, which is unpacked"),
        (lambda weight: changes_of(weight.to("meta")), "blocks.1.ffn.0.weight is on meta, not on cpu"),
    ],
)
def test_weights_that_are_not_simply_there_cannot_be_recorded(dit, events, change, reason):
    assert why_not_resident(dit, CPU) is None
    module = dit.blocks[1].ffn[0]
    for name, value in change(module.weight.data).items():
        setattr(module, name, value)
    assert reason in why_not_resident(dit, CPU)
    assert reason in why_no_graph(Weights(dit, CPU), kv_in_cpu_memory=False)


def test_fp8_layers_can_be_recorded(dit, events, monkeypatch):
    monkeypatch.setattr(step, "quantised", quantize_rows)  # a tape records no interpreted kernel
    step.quantize_linears(dit)
    expected = video(run(dit, "off"))
    assert torch.equal(video(run(dit, "on")), expected)
    assert events


class Cast(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def test_weights_of_another_kind_are_checked_by_themselves(dit, events):
    list(run(dit, "on"))
    plain = set(cuda_graph._checked)
    dit.blocks[0].ffn[0].half().__class__ = Cast
    list(run(dit, "on"))
    assert len(cuda_graph._checked - plain) == len(plain)


# ------------------------------------------------------------------------------------------------- fused kernels


@pytest.fixture
def kernels(monkeypatch):
    """The fused kernels under Triton's interpreter; on a tape each launch is one entry."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(selection, "why_not_fused", lambda *means: None)
    for name, launcher in (
        ("store", "fused_store"),
        ("modulation", "add_norm"),
        ("selection", "select_blocks"),
        ("block_sparse", "block_sparse_attention"),
    ):
        kernel = importlib.import_module(f"lightforcing.kernels.{name}")
        entry = tape.opaque(getattr(kernel, launcher), lambda _, kwargs: tape.tensors(kwargs.get("ring")))
        monkeypatch.setattr(kernel, launcher, entry)


# Chunks of a frame, which is one ragged block; those that skip blocks keep 1, 1, 2 and 1 of up to 5.
MANY = {
    "latent_shape": (1, 16, 5, 4, 10),
    "frames_per_chunk": 1,
    "growth": (0.0, 0.5, 0.5, 0.5, 0.8),
    "sigmas": few_step_sigmas((1000, 750, 500)),
}


@pytest.mark.parametrize(
    "case",
    [
        {"window": 4, "sink_frames": 1, "sigmas": few_step_sigmas((1000, 500)), "first_sigmas": MANY["sigmas"]},
        {"options": {"tail": True, "estimator": "lse"}, "kv": KVOptions("int8"), "latent_shape": (2, 16, 5, 4, 10)},
    ],
    ids=["window and sink, two steps", "tail, parts, int8, two videos"],
)
def test_one_recording_of_a_kind_serves_all_chunks(dit, events, kernels, case):
    plainly, launched, case = [], [], MANY | case | {"options": {"backend": "triton", **case.get("options", {})}}
    expected = video(run(dit, "off", seen=plainly, **case))
    assert torch.equal(video(run(dit, "on", seen=launched, **case)), expected)
    for (numbers, held), (same_numbers, same_held) in zip(plainly, launched, strict=True):
        assert numbers == same_numbers
        assert all(map(torch.equal, held, same_held))
    # The first chunk's steps, the steps of all others, and their clean passes but for the first.
    assert [kind for kind, _ in events].count("record") == 3
    steps = len(case["sigmas"]) - 1
    assert [kind for kind, _ in events].count("launch") == 2 + 4 * steps - 1 + 2
