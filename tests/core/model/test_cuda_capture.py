"""Captures into CUDA graphs, as far as can be seen without a card: what is asked of torch, in which order, and whether
a step asks for anything that a capture forbids.
"""

import functools
import gc
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.causal import ModelState, predict
from lightforcing.lightforcing_core.model.cuda_capture import CudaRecorder, capture_stream
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict

from ...support import tape

CPU = torch.device("cpu")


class FakeStream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class FakeGraph:
    """What the recorder asks of a CUDA graph, written down."""

    log: ClassVar = []
    refuses = ()

    def __getattr__(self, name):
        def called(**options):
            self.log.append((name, options))
            if name in self.refuses:
                raise RuntimeError(f"{name}: operation failed due to a previous error during capture")

        return called


@pytest.fixture
def cuda(monkeypatch):
    """Just so much of `torch.cuda` that `CudaRecorder` finds what it calls."""
    monkeypatch.setattr(FakeGraph, "log", [])
    monkeypatch.setattr(FakeGraph, "refuses", ())
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", functools.partial(next, iter((0, id) for id in range(7, 99))))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(FakeGraph.log))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: FakeGraph.log.append(("end pool", {})), False)
    capture_stream.cache_clear()
    yield FakeGraph
    capture_stream.cache_clear()


class FakeEvent:
    def __init__(self, log):
        self.record = lambda stream: log.append(("event", {}))
        self.synchronize = lambda: log.append(("wait", {}))


def test_graphs_that_live_together_share_a_pool_and_outlive_their_last_launch(cuda):
    recorder = CudaRecorder(CPU)

    def record():
        recording, result = recorder.record(lambda: FakeGraph.log.append(("work", {})) or "result")
        assert result == "result"
        return recording

    first, second = record(), record()
    first.free()
    third = record()
    third.launch()
    for recording in (second, third):
        recording.free()
    record()
    names = [name for name, _ in cuda.log]
    once = ["capture_begin", "work", "capture_end"]
    freed = ["wait", "reset"]
    assert names == [*once, *once, *freed, *once, "replay", "event", *freed, *freed, *once]
    begun = [options for name, options in cuda.log if name == "capture_begin"]
    assert [options["pool"][1] for options in begun] == [7, 7, 7, 8]  # a pool went with its last graph
    assert {options["capture_error_mode"] for options in begun} == {"thread_local"}


@pytest.mark.parametrize(("breaks", "refuses"), [(False, False), (False, True), (True, True)])
def test_a_capture_that_fails_leaves_the_allocator_free_and_collects_no_garbage_meanwhile(cuda, breaks, refuses):
    """What goes with garbage may ask of the driver what a capture forbids. The first error is the one that counts."""
    cuda.refuses = ("capture_end",) if refuses else ()
    seen = []

    def work():
        seen.append(gc.isenabled())
        if breaks:
            raise ValueError("the first error")

    error = "the first error" if breaks else "previous error"
    with pytest.raises((ValueError, RuntimeError), match=error) if breaks or refuses else nullcontext():
        CudaRecorder(CPU).record(work)
    assert [*seen, gc.isenabled()] == [False, True]
    ends = ["capture_end", "capture_end", "end pool"] if refuses else ["capture_end"]
    assert [name for name, _ in cuda.log] == ["capture_begin", *ends[breaks:]]


# Operations that wait for the device, or whose result's size only it knows.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")


class Watchdog(TorchDispatchMode):
    """With the meta device in the place of a GPU: fails where CPU tensors or the device's numbers are used."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name.removeprefix("aten::") not in WAITING, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        for tensor in tape.tensors((args, kwargs, out)):
            assert tensor.device.type == "meta", f"{func} uses a CPU tensor: {tensor.shape} on {tensor.device}"
        self.seen.append(func)
        return out


@pytest.mark.parametrize(
    ("sparsity", "options", "kv"),
    [
        (0.0, {}, "same"),
        (0.5, {}, "same"),
        (0.0, {}, "int8"),
        (0.5, {}, "int8"),
        (0.5, {}, "fp8"),
        (0.5, {"tail": True}, "same"),
        (0.5, {"estimator": "lse"}, "same"),
        (0.5, {"tiles": True}, "same"),
        (0.5, {"policy": "pbsa"}, "int8"),
        (0.5, {"tail": True, "estimator": "lse", "tiles": True}, "fp8"),
    ],
)
def test_a_chunks_second_pass_neither_waits_nor_brings_anything_from_the_host(sparsity, options, kv):
    dtype = torch.bfloat16
    weights = random_state_dict(dim=128, ffn_dim=128, layers=2, text_dim=32)
    dit = wan_from_state_dict(weights, dtype=dtype, device="meta")
    shape = CacheShape(
        layers=2,
        batch=1,
        slots=12,
        grid=(5, 7),
        heads=1,
        head_dim=128,
        block_k=16,
        sink_frames=1,
        sink_rope="follow",
        pool=2 if "policy" in options else 0,
        pools=AttentionOptions(**options).pools(sparse=True),
        dtype=dtype,
    )
    cache = KVCache(shape, KVOptions(kv), "meta")
    state = ModelState(cache, AttentionOptions("reference", (16, 16), 4, 1, 1, **options))
    x, text = torch.empty(1, 16, 3, 10, 14, dtype=dtype, device="meta"), torch.empty(1, 6, 32, device="meta")
    state.follow(text.to(dtype))
    with torch.no_grad():
        for _ in range(4 if shape.pool else 3):
            state.open_chunk(3, sparsity, "meta")
            cache.commit()
        state.open_chunk(3, sparsity, "meta")
        assert (state.chunk.attention.plan is not None) == (sparsity > 0)
        passes = [predict(dit, x, torch.empty(1, device="meta"), state)]
        for _ in range(2):
            with Watchdog() as seen:
                passes.append(predict(dit, x, torch.empty(1, device="meta"), state))
            assert len(seen.seen) > 100
    assert [one.shape for one in passes] == [x.shape] * 3
