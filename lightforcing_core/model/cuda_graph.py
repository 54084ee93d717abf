"""The passes of a run as CUDA graphs, each kind recorded once and launched again, in later chunks too.

Passes of one kind differ in x, in the timestep, and in what a chunk keeps in device memory: its rotary table, its slots
and its plan. A graph reads those of the chunk in which it was recorded; a later chunk's are copied there. All else that
it reads must stay in place: a graph is dropped if the prompt or the address of a weight changes. All graphs of a run
share one memory pool; therefore a graph's results are copied out before another one runs.
"""

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..fast_path import FastPath, one_line, recording
from ..machine import choose, is_off
from ..pinned import Weights
from .causal import ModelState, OpenChunk, TextMemory, Watch, run_pass, tables
from .cuda_capture import CudaRecorder, CudaRecording

CudaGraph = Literal["auto", "on", "off"]

# Recording costs the CPU about as much as running, so it pays only if a graph is launched at least this often.
LEAST_LAUNCHES = 2
# Largest accepted difference between the first launch of a kind and a normal pass: rounding, not another result.
TOLERANCE = 0.02
ANOTHER = "another rank could not"
WORK = "CUDA graphs of {2} layers of width {1}, {4} in {5}"

# Kinds of passes whose first launch in this process matched a normal pass.
_checked: set[Hashable] = set()

_log = logging.getLogger(__name__)


def why_no_graph(weights: Weights, *, kv_in_cpu_memory: bool) -> str | None:
    """One sentence of why passes of the model with these weights cannot be recorded, or None."""
    if reason := CudaRecorder.why_not(weights.device):
        return reason
    if kv_in_cpu_memory:
        return "the KV cache is in CPU memory and is copied by a stream of its own"
    reason = weights.hold()
    weights.release()
    return reason


class StepGraph:
    """`run_pass` for the states of one run, as graphs from the second pass of a kind on; `held` surrounds the calls.

    weights: the model's. note: called with a sentence about the graphs for the run's record.
    wanted: "off" runs all passes normally; "on" raises a RuntimeError if a pass turns out not to be recordable.
    why_not: as `why_no_graph` gives it.
    agree: tells whether all ranks say yes. They record and check the same passes, as each needs the others in all.
    """

    def __init__(
        self,
        weights: Weights,
        note: Callable[[str], object],
        wanted: CudaGraph = "on",
        why_not: str | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._weights, self._note, self._must, self._agree = weights, note, wanted == "on", agree
        if wanted == "auto" and is_off():
            why_not = why_not or "nothing is chosen by measurement in this run"
        self.why_off = "it was not asked for" if wanted == "off" else why_not
        if why_not is not None:
            note(f"not used: {why_not}")
        self.launches = 0
        self._last: _Call | None = None
        self._recorder = None if self.why_off else CudaRecorder(weights.device)
        self._recorded: dict[Hashable, _Recorded] = {}  # by state, and whether the pass commits and skips blocks
        self._spent: list[CudaRecording] = []  # replaced: the next recording reuses their memory
        self._ran: set[Hashable] = set()  # what has run normally, and can be recorded

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the weights in place for the passes of a chunk."""
        if not self.why_off:
            reason = self._weights.hold()
            if not self._agree(reason is None):
                self._stop(reason or ANOTHER)
        try:
            yield
        finally:
            self._weights.release()

    def __call__(
        self,
        dit: Any,
        x: Tensor,
        timestep: Tensor,
        state: ModelState,
        watch: Watch | None = None,
        *,
        commits: bool = False,
    ) -> Tensor:
        """Run `run_pass` normally or from a recording; the caller owns the result."""
        call = _Call(dit, x, timestep, state, watch, commits)
        if self.why_off:
            return call.run()
        self._last = None if commits else call
        recorded = self._recorded.get(call.place)
        serves = recorded is not None and recorded.is_for(call) and recorded.weights == self._weights.signature()
        if self._agree(serves) and recorded is not None:
            state.chunk.passes += 1
            return self._launch(recorded, call)
        if recorded is not None:
            self._spent.append(self._recorded.pop(call.place).recording)  # its tensors return to the pool
            if recorded.weights != self._weights.signature() and (reason := self._weights.hold()):
                self._stop(reason)
                return call.run()
        has_run = call.key in self._ran and state.text is not None and bool(state.text.keys_values)
        wanted = has_run and call.launches >= LEAST_LAUNCHES and self._weights.are_ready() and self._pays(call)
        if self._agree(wanted):
            return self._first_launch(call)
        self._ran.add(call.key)
        return self._plain(call)

    def finish(self) -> None:
        """Note the launches of a run that has ended well."""
        if self.launches and not self.why_off:
            self._note(f"{self.launches} passes launched as graphs")
        elif not self.why_off:
            self._note("not used: they were not measured to be faster for this model and size")

    def measure(self) -> None:
        """Inside `machine.measuring`, compare the last pass of the open chunk as it ran with a recording of it."""
        if self._last is None or self.why_off or self._must:
            return
        with torch.no_grad(), self.held():
            if not self.why_off and self._weights.are_ready():
                self._pays(self._last)

    def _pays(self, call: "_Call") -> bool:
        """Whether recordings of such passes are wanted: they are proved to be faster, or must be used."""
        if self._must:
            return True
        state, chunk, usual, call = call.state, call.state.chunk, "pass by pass", replace(call, watch=None)
        before = chunk.passes, self.launches
        facts = *map(str, call.kind[:9]), str(state.cache.storage.dtype), str(state.attention)

        def run(name: str) -> Tensor:
            return call.run() if name == usual else self._launched(call)

        name = choose(WORK, facts, call.x.device, (usual, "graph"), run, incumbent=usual, tolerance=TOLERANCE)
        chunk.passes, self.launches = before
        return name != usual

    def free(self) -> None:
        self._spent += [one.recording for one in self._recorded.values()]
        self._recorded.clear()
        self._free_spent()

    def _free_spent(self) -> None:
        for spent in self._spent:
            spent.free()
        self._spent.clear()

    def _launch(self, recorded: "_Recorded", call: "_Call") -> Tensor:
        """Launch a recorded pass on the inputs of `call`, with all effects of a pass."""
        if recorded.chunk is not call.state.chunk:
            recorded.chunk = call.state.chunk
            for held, given in zip(recorded.tables, tables(call.dit, call.x, call.state), strict=True):
                held.copy_(given)
        for held, given in zip(recorded.inputs, (call.x, call.timestep), strict=True):
            held.copy_(given)
        recorded.recording.launch()
        self.launches += 1
        if call.watch is not None:
            for seen in recorded.seen:
                call.watch(*seen)
        return recorded.out.clone()

    def _plain(self, call: "_Call") -> Tensor:
        """Run a pass normally; if memory runs out, once more without graphs and with weights that may move."""
        passes = call.state.chunk.passes
        try:
            return call.run()
        except torch.OutOfMemoryError as error:
            reason = one_line(error)
        call.state.chunk.passes = passes
        self._stop(reason)
        return call.run()

    def _first_launch(self, call: "_Call") -> Tensor:
        """Record this pass and launch it, or stop using graphs if that fails."""
        passes = call.state.chunk.passes
        path, reason = FastPath("CUDA graph", call.x.device, call.x.dtype, detail=call.kind), None
        try:
            out = path.attempt(lambda: self._launch_and_check(call), "running steps one by one")
        except torch.OutOfMemoryError as error:  # a recording takes more memory than running, which may still fit
            out, reason = None, one_line(error)
        if out is not None:
            return out
        call.state.chunk.passes = passes
        self._stop(reason or path.failure or "a recording failed", is_said=reason is None)
        return call.run()

    def _launched(self, call: "_Call") -> Tensor:
        """Launch a recording of this pass, which is made now if there is none."""
        recorded = self._recorded.get(call.place)
        if recorded is None or not recorded.is_for(call):
            try:
                recorded = self._recorded[call.place] = self._record(call)
            except Exception:
                self._agree(False)
                raise
            if not self._agree(True):
                raise RuntimeError(ANOTHER)
        return self._launch(recorded, call)

    def _record(self, call: "_Call") -> "_Recorded":
        assert self._recorder is not None
        state = call.state
        seen: list[tuple[Any, ...]] = []
        inputs = call.x.clone(), call.timestep.clone()
        held = _Call(call.dit, *inputs, state, lambda *one: seen.append(one), call.commits)
        given, state.cache.wrote_runs = tables(call.dit, call.x, state), False
        with recording():
            graph, out = self._recorder.record(held.run)
        self._free_spent()
        weights, is_bound = self._weights.signature(), state.cache.wrote_runs
        return _Recorded(graph, inputs, out, seen, given, state.chunk, call.key, state.text, weights, is_bound)

    def _launch_and_check(self, call: "_Call") -> Tensor:
        """Launch; compare the first launch of its kind with a normal pass."""
        chunk, passes = call.state.chunk, call.state.chunk.passes
        out = self._launched(call)
        chunk.passes = passes + 1
        if not self._agree(call.kind in _checked):
            launched, chunk.passes = call.left_by(out), passes
            plain = call.left_by(call.run())
            far = float((launched - plain).norm() / plain.norm().clamp_min(1e-12))
            if not far <= TOLERANCE:  # also true for NaN
                raise RuntimeError(f"a recorded step and a normal one gave different results ({far:.2g} away)")
            _checked.add(call.kind)
        return out

    def _stop(self, reason: str, *, is_said: bool = False) -> None:
        """Use no graphs any more in this run."""
        if not is_said:
            _log.warning("[Light Forcing] CUDA graphs are no longer used in this run: %s", reason)
        self.free()
        self._weights.release()
        self.why_off = reason
        if self._must:
            raise RuntimeError(f"cuda_graph 'on' is not possible: {reason}; use 'auto' or 'off'")
        self._note(f"no longer used: {reason}")


@dataclass(frozen=True)
class _Call:
    """One call of `run_pass`."""

    dit: Any
    x: Tensor
    timestep: Tensor
    state: ModelState
    watch: Watch | None
    commits: bool

    def run(self) -> Tensor:
        return run_pass(self.dit, self.x, self.timestep, self.state, self.watch, commits=self.commits)

    @property
    def place(self) -> Hashable:
        """A recording takes the place of an older one of the same state, purpose and density."""
        return id(self.state), self.commits, self.state.chunk.attention.plan is None

    @property
    def key(self) -> Hashable:
        """All numbers that a recording holds; the chunk itself if it reads more of it than `tables`."""
        chunk, cache = self.state.chunk, self.state.cache
        numbers: Hashable = len(cache.slot_frames)
        if chunk.attention.plan is not None:
            numbers = "steady" if chunk.attention.is_steady else chunk.start_frame
        return id(self.dit), self.place, self.kind, chunk.given, cache.keeps_originals, numbers

    @property
    def kind(self) -> tuple[object, ...]:
        """The kind of its graph; checking one graph of a kind checks them all."""
        state, dit, x, attention = self.state, self.dit, self.x, self.state.chunk.attention
        weights = sorted({str(getattr(part, "_layout_cls", part.dtype)) for part in dit.blocks[0].parameters()})
        sizes = (type(dit), dit.dim, len(dit.blocks), tuple(weights), x.shape, x.dtype, x.device)
        sparse = attention.plan is not None and (attention.plan.kind, attention.choice)
        steps = self.timestep.shape, self.timestep.dtype, self.commits
        return (*sizes, *steps, state.cache.storage.dtype, state.attention, state.dense_attention, sparse)

    @property
    def launches(self) -> int:
        """How often a recording of it can be launched in this run, as far as that is known."""
        chunk = self.state.chunk
        if self.commits:
            return chunk.later
        return chunk.steps - chunk.passes + (chunk.later if chunk.attention.plan and chunk.attention.is_steady else 0)

    def left_by(self, out: Tensor) -> Tensor:
        """What it has computed, in float32: its result, or what a commit has stored in the last layer."""
        if not self.commits:
            return out.float()
        cache = self.state.cache
        values = cache.storage.at(cache.shape.layers - 1).values.unflatten(1, (cache.shape.all_slots, -1))
        return torch.stack([values[:, cache.slot_frames.index(frame)].float() for frame in cache.current_frames])


@dataclass(eq=False)
class _Recorded:
    """A recorded pass: its x and timestep, its output, and what it reads besides.

    chunk: the one whose contents `tables` have. is_bound: it can serve no other one.
    """

    recording: CudaRecording
    inputs: tuple[Tensor, Tensor]
    out: Tensor
    seen: list[tuple[Any, ...]]
    tables: list[Tensor]
    chunk: OpenChunk
    key: Hashable
    text: TextMemory | None
    weights: Hashable
    is_bound: bool

    def is_for(self, call: _Call) -> bool:
        chunk, text = call.state.chunk, call.state.text
        return self.key == call.key and self.text is text and (self.chunk is chunk or not self.is_bound)
