"""A chunk's denoising steps as one CUDA graph, recorded once per chunk.

Within a chunk every step has the same shapes, cache slots, plan and text; only x and the timestep differ. What a graph
reads must stay in place: it lives in the open chunk and the prompt's memory, so if either is replaced, the
next pass runs without a graph. All graphs of a run share one memory pool; therefore a graph's results are copied out
before another one runs.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..fast_path import FastPath, one_line, recording
from ..pinned import parts_of, why_not_resident
from .causal import ModelState, Predict, Watch, predict
from .cuda_capture import CudaRecorder, CudaRecording

CudaGraph = Literal["auto", "on", "off"]

# Recording costs the CPU about as much as running, so it pays only if a graph is launched at least this often.
LEAST_LAUNCHES = 2
# Largest accepted difference between the first launch of a kind and a normal pass: rounding, not another result.
TOLERANCE = 0.02

# Kinds of passes whose first launch in this process matched a normal pass.
_checked: set[tuple[object, ...]] = set()

_log = logging.getLogger(__name__)


def why_no_graph(dit: Any, device: torch.device, *, kv_in_cpu_memory: bool) -> str | None:
    """One sentence of why the steps of `dit` cannot be recorded on `device`, or None."""
    if reason := CudaRecorder.why_not(device):
        return reason
    if kv_in_cpu_memory:
        return "the KV cache is in CPU memory and is copied by a stream of its own"
    return why_not_resident(dit, device)


@contextlib.contextmanager
def step_graphs(
    wanted: CudaGraph, why_not: str | None, device: torch.device, states: int, note: Callable[[str], object]
) -> Iterator[list[Predict]]:
    """A `predict` per state of a run, with CUDA graphs if wanted and possible.

    why_not: as `why_no_graph` gives it. note: called with a sentence about the graphs for the run's record.
    """
    if wanted == "off" or why_not is not None:
        if wanted != "off":
            note(f"not used: {why_not}")
        yield [predict] * states
        return
    recorder = CudaRecorder(device)
    graphs = [StepGraph(recorder, note, must=wanted == "on") for _ in range(states)]
    try:
        yield list(graphs)
        if not any(graph.why_off for graph in graphs):
            note(f"{sum(graph.launches for graph in graphs)} steps launched as graphs")
    finally:
        for graph in graphs:
            graph.free()


class StepGraph:
    """`predict` for one `ModelState`, as a graph from a chunk's second pass on.

    recorder: shared by the states of a run.
    on_stop: called with one sentence if steps turn out not to be recordable.
    must: raise a RuntimeError with it instead of running the steps one by one.
    """

    def __init__(self, recorder: CudaRecorder, on_stop: Callable[[str], object], *, must: bool = False) -> None:
        self._recorder, self._on_stop, self._must = recorder, on_stop, must
        self.why_off: str | None = None
        self.launches = 0
        self._spent: list[CudaRecording] = []  # of the previous chunk: the next recording reuses their memory
        self._recorded: _Recorded | None = None
        self._ran: tuple[object, ...] | None = None  # epoch of the normal pass that prepared a recording

    def __call__(self, dit: Any, x: Tensor, timestep: Tensor, state: ModelState, watch: Watch | None = None) -> Tensor:
        """Run `predict` normally or from a recording; the caller owns the result."""
        call = _Call(dit, x, timestep, state, watch)
        recorded = self._recorded
        if self._ran != call.epoch or (recorded is not None and recorded.weights != _addresses(dit)):
            self._forget()
            self._ran = call.epoch
            return call.run()
        if recorded is not None:
            state.chunk.passes += 1
            return self._launch(recorded, call)
        if self.why_off or state.chunk.steps - state.chunk.passes < LEAST_LAUNCHES:
            return call.run()
        return self._first_launch(call)

    def free(self) -> None:
        self._forget()
        self._free_spent()

    def _forget(self) -> None:
        """Drop the recordings, because something that they read has been replaced."""
        if self._recorded is not None:
            self._spent.append(self._recorded.recording)
            # Its tensors go back to the pool, for the next recording to use.
        self._recorded = self._ran = None

    def _launch(self, recorded: "_Recorded", call: "_Call") -> Tensor:
        """Launch a recorded pass on the inputs of `call`, with all effects of a pass."""
        for held, given in zip(recorded.inputs, (call.x, call.timestep), strict=True):
            held.copy_(given)
        recorded.recording.launch()
        self.launches += 1
        if call.watch is not None:
            for seen in recorded.seen:
                call.watch(*seen)
        return recorded.out.clone()

    def _first_launch(self, call: "_Call") -> Tensor:
        """Record this pass and launch it, or stop using graphs if that fails."""
        passes = call.state.chunk.passes
        path = FastPath("CUDA graph", call.x.device, call.x.dtype, detail=call.kind())
        reason = why_not_resident(call.dit, call.x.device)
        try:
            out = None if reason else path.attempt(lambda: self._record_and_check(call), "running steps one by one")
        except torch.OutOfMemoryError as error:  # a recording takes more memory than running, which may still fit
            out, reason = None, one_line(error)
        if out is not None:
            return out
        if reason is not None:
            _log.warning("[Light Forcing] CUDA graphs are no longer used in this run: %s", reason)
        call.state.chunk.passes = passes
        self.free()
        self.why_off = reason = reason or path.failure or "a recording failed"
        if self._must:
            raise RuntimeError(f"cuda_graph 'on' is not possible: {reason}; use 'auto' or 'off'")
        self._on_stop(f"no longer used: {reason}")
        return call.run()

    def _record_and_check(self, call: "_Call") -> Tensor:
        """Record and launch; compare the first launch of its kind with a normal pass."""
        chunk, passes, kind = call.state.chunk, call.state.chunk.passes, call.kind()
        inputs = call.x.clone(), call.timestep.clone()
        seen: list[tuple[Any, ...]] = []
        held = _Call(call.dit, *inputs, call.state, lambda *one: seen.append(one))
        with recording():
            graph, result = self._recorder.record(held.run)
        self._free_spent()
        self._recorded = _Recorded(graph, inputs, result, seen, _addresses(call.dit))
        out = self._launch(self._recorded, call)
        if kind not in _checked:
            chunk.passes = passes
            plain = call.run()
            far = float((out - plain).float().norm() / plain.float().norm().clamp_min(1e-12))
            if not far <= TOLERANCE:  # also true for NaN
                raise RuntimeError(f"a recorded step and a normal one gave different results ({far:.2g} away)")
            _checked.add(kind)
        return out

    def _free_spent(self) -> None:
        for spent in self._spent:
            spent.free()
        self._spent.clear()


@dataclass(frozen=True)
class _Call:
    """One call of `predict`."""

    dit: Any
    x: Tensor
    timestep: Tensor
    state: ModelState
    watch: Watch | None

    @property
    def epoch(self) -> tuple[object, ...]:
        """All that a recording depends on besides weights; chunk and prompt by identity."""
        x, timestep, state = self.x, self.timestep, self.state
        inputs = x.shape, x.dtype, x.device, timestep.shape, timestep.dtype
        return state.chunk, state.text, id(self.dit), inputs

    def run(self) -> Tensor:
        return predict(self.dit, self.x, self.timestep, self.state, self.watch)

    def kind(self) -> tuple[object, ...]:
        """The kind of its graph; checking one graph of a kind checks them all."""
        state, dit, x, plan = self.state, self.dit, self.x, self.state.chunk.attention.plan
        sizes = (type(dit), dit.dim, len(dit.blocks), x.shape, x.dtype, x.device, self.timestep.shape)
        sparse = plan is not None and (plan.kind,)
        return (*sizes, state.cache.storage.dtype, state.attention, state.dense_attention, sparse)


@dataclass(eq=False)
class _Recorded:
    """A recorded pass: its x and timestep, its output, and its weights' addresses."""

    recording: CudaRecording
    inputs: tuple[Tensor, Tensor]
    out: Tensor
    seen: list[tuple[Any, ...]]
    weights: tuple[int, ...]


def _addresses(tree: nn.Module) -> tuple[int, ...]:
    tensors = itertools.chain(tree.parameters(), tree.buffers())
    return tuple(part.data_ptr() for tensor in tensors for part in parts_of(tensor))
