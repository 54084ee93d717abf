"""Captures into CUDA graphs, as far as can be seen without a card: what is asked of torch, and in which order."""

import functools
import gc
from typing import ClassVar

import pytest
import torch

from lightforcing.lightforcing_core.cuda_recorder import CudaRecorder, capture_stream

CPU = torch.device("cpu")


def test_nothing_is_recorded_on_an_allocator_that_keeps_no_pool_for_it(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert CudaRecorder.why_not(torch.device("cuda")) is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,backend:cudaMallocAsync")
    assert "use its native one" in CudaRecorder.why_not(torch.device("cuda"))


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


def test_work_that_breaks_ends_the_capture_and_says_why_itself(cuda):
    cuda.refuses = ("capture_end",)

    def work():
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        CudaRecorder(CPU).record(work)
    assert [name for name, _ in cuda.log] == ["capture_begin", "capture_end", "end pool"]


def test_a_capture_that_was_invalidated_leaves_the_allocator_free(cuda):
    cuda.refuses = ("capture_end",)
    with pytest.raises(RuntimeError, match="previous error"):
        CudaRecorder(CPU).record(lambda: None)
    assert cuda.log[-1][0] == "end pool"


@pytest.mark.parametrize("breaks", [False, True])
def test_no_garbage_is_collected_during_a_capture(cuda, breaks):
    """What goes with it may ask of the driver what a capture forbids."""

    def work():
        seen.append(gc.isenabled())
        if breaks:
            raise ValueError("no result")

    seen = []
    try:
        CudaRecorder(CPU).record(work)
    except ValueError:
        assert breaks
    assert [*seen, gc.isenabled()] == [False, True]
