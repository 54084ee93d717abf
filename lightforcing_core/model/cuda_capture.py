"""Capture of a device's work into CUDA graphs that share one memory pool."""

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..pinned import indexed


class CudaRecorder:
    """Records CUDA graphs, which share one memory pool.

    lane: graphs that may run at the same time need different ones.
    """

    def __init__(self, device: torch.device, *, lane: str = "steps") -> None:
        self._device, self._lane = indexed(device), lane
        self._pool: Any = None
        self._alive: set[CudaRecording] = set()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """The reason why nothing can be recorded on `device`, or None."""
        if device.type != "cuda":
            return f"CUDA graphs are for NVIDIA GPUs, not for {device.type}"
        if torch.version.hip:
            return "CUDA graphs have not been tried on AMD GPUs"
        return None

    def record(self, work: Callable[[], Tensor]) -> tuple["CudaRecording", Tensor]:
        """Capture the device work of `work`; a launch fills the tensor that it returned.

        `torch.cuda.graph` would wait for the device and empty the allocator's cache each time; neither is needed
        here. Other threads may use the device meanwhile. Raises any error of the capture.
        """
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()  # a pool is freed with the last of its graphs
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(self._device, self._lane)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), _garbage_kept():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        torch.cuda.current_stream(self._device).wait_stream(stream)
        recording = CudaRecording(graph, self._device, self._alive)
        self._alive.add(recording)
        return recording, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture, so that the allocator serves ordinary requests again."""
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):  # a capture that ends with an error can leave the allocator recording
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Keep reference cycles until the end: freeing one may make calls to the driver that a capture forbids."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@functools.cache
def capture_stream(device: torch.device, lane: str = "steps") -> torch.cuda.Stream:
    """The stream for captures, which cannot happen on the default one.

    One for the whole process and lane, because the matrix libraries keep a workspace for every stream that has used
    them. They use it here first, so that the workspace is in ordinary memory and not in a graph's pool.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        x = torch.zeros(16, 16, device=device)
        nn.functional.linear(x @ x, x, x[0])
    return stream


class CudaRecording:
    """Recorded work."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, alive: "set[CudaRecording]") -> None:
        self._graph, self._device, self._alive = graph, device, alive
        self._done = torch.cuda.Event()

    def launch(self) -> None:
        """Run it again, on the present values of the tensors that it reads."""
        self._graph.replay()
        self._done.record(torch.cuda.current_stream(self._device))

    def free(self) -> None:
        self._done.synchronize()  # a running graph must not be destroyed; this one ended about a pass ago
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's allocator cudaMallocAsync warns about tensors of a graph
            self._graph.reset()
        self._alive.discard(self)
