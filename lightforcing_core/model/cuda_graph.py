"""A chunk's denoising steps as one CUDA graph: recorded once per chunk, then launched as a whole.

Within a chunk every step has the same shapes, cache slots, plan and text; only x and the timestep differ. So the
chunk's first pass runs as it is (there kernels are compiled and tuned, and the rotary table and the prompt's keys are
made), the second one is recorded, and from it on each pass is one launch. The clean pass is never recorded.

What a graph reads must stay where it was, so `CausalState` calls `forget` wherever it replaces any of it, and a graph
is let go of when the host has moved the weights. All graphs of a run share one memory pool; therefore everything that a
graph leaves is copied out before another one runs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..attention.fast_path import recording_thread
from .cuda_capture import CudaRecorder, indexed

if TYPE_CHECKING:
    from ..attention.selection import BlockSelection
    from .causal import CausalState

CudaGraph = Literal["auto", "on", "off"]
Forward = Callable[[Any, Tensor, Tensor, Tensor, "CausalState"], Tensor]

# Recording costs about as much of the host's time as running, so it must be launched at least this often.
LEAST_LAUNCHES = 2
# How far the first launch of a kind may differ from running it: another algorithm's rounding, not another result.
TOLERANCE = 0.02

# What became of the first graph of each kind in this process: None, it gave what running gives, or why it may not run.
_verdicts: dict[tuple[object, ...], str | None] = {}


class Recording(Protocol):
    """Work that was recorded."""

    def launch(self) -> None:
        """Run it again, on whatever lies in the tensors that it reads."""

    def free(self) -> None:
        """Give its memory back to the pool."""


class Recorder(Protocol):
    """Records work on one device into one memory pool."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        """Note all that `work` asks of the device, which need not do it yet; launches fill what it returns."""


def why_no_graph(dit: Any, device: torch.device, *, kv_in_host_memory: bool) -> str | None:
    """One sentence of why the steps of `dit` cannot be recorded on `device`, or None."""
    if reason := CudaRecorder.why_not(device):
        return reason
    if kv_in_host_memory:
        return "the KV cache is in host memory and is copied by a stream of its own"
    return why_not_resident(dit, device)


def why_not_resident(tree: nn.Module, device: torch.device) -> str | None:
    """Why the weights of a module tree are not ordinary tensors that stay on `device`, or None.

    What moves, casts, patches or unpacks weights while they are used would be recorded once and then be out of date.
    """
    device = indexed(device)
    for name, module in tree.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} carries a hook"
        moved = getattr(module, "comfy_cast_weights", False)
        if moved or getattr(module, "weight_function", ()) or getattr(module, "bias_function", ()):
            return f"the host moves, casts or patches the weights of {name} while they are used"
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for key, tensor in own:
            if type(tensor) not in (nn.Parameter, Tensor):
                return f"{name}.{key} is a {type(tensor).__name__}, which is unpacked while it is used"
            if tensor.device != device:
                return f"{name}.{key} is on {tensor.device}, not on {device}"
    return None


class StepGraph:
    """Runs the passes of one `CausalState`, those of an open chunk from the second on as a graph.

    recorder: shared by the states of a run. tell: called with one sentence when steps turn out not to be recordable.
    must: raise it as a RuntimeError instead of running the steps one by one.
    """

    def __init__(self, recorder: Recorder, tell: Callable[[str], object], *, must: bool = False) -> None:
        self._recorder, self._tell, self._must = recorder, tell, must
        self.why_off: str | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None  # x and timestep, where recorded passes read them
        self._spent: list[_Step] = []  # of the chunk before: their memory is taken over, not given back
        self.launches = 0
        self._steps: dict[bool, _Step] = {}
        self.forget()

    def forget(self) -> None:
        """Something that recorded passes read is about to be replaced: the next pass runs as it is."""
        self._spent += self._steps.values()
        for step in self._steps.values():
            step.let_go()
        self._steps = {}
        self._warm: tuple[object, ...] | None = None  # what the pass that ran as it is was called with
        self._selections: dict[int, BlockSelection] = {}  # where passes that reuse a selection read it

    def free(self) -> None:
        """Let go of all memory."""
        self.forget()
        self._free_spent()
        self._inputs = None

    def __call__(
        self, forward: Forward, dit: Any, x: Tensor, timestep: Tensor, context: Tensor, state: "CausalState"
    ) -> Tensor:
        """`forward(dit, x, timestep, context, state)`, as it is or recorded; the result is the caller's to keep."""
        run = Pass(forward, dit, x, timestep, context, state)
        called = (id(dit), x.shape, x.dtype, x.device, timestep.shape, timestep.dtype)
        if state.clean or self._warm != called:
            self.forget()
            self._warm = None if state.clean else called
            return self._run(run)
        step = self._steps.get(run.selects)
        if step is not None and step.weights == _addresses(dit):
            state.passes += 1
            return self._launch(step, run)
        if step is not None:
            self.forget()
            self._warm = called
        if step is not None or self.why_off or run.alike() < LEAST_LAUNCHES:
            return self._run(run)
        return self._first(run)

    def _run(self, run: "Pass") -> Tensor:
        selects = run.selects
        out = run()
        if selects:
            self._settle(run.state, run.state.selections)
        return out

    def _launch(self, step: "_Step", run: "Pass") -> Tensor:
        """Launch a recorded pass on the inputs of `run`, and leave all that running it would have left."""
        assert self._inputs is not None
        for held, given in zip(self._inputs, (run.x, run.timestep), strict=True):
            held.copy_(given)
        step.recording.launch()
        self.launches += 1
        if run.state.watch is not None:
            for seen in step.seen:
                run.state.watch(*seen)
        if step.selects:
            self._settle(run.state, step.selections)
        return step.out.clone()

    def _first(self, run: "Pass") -> Tensor:
        """Record this pass and launch it; the first one of its kind in this process is compared with running it."""
        state, passes, kind = run.state, run.state.passes, run.kind()
        if reason := _verdicts.get(kind) or why_not_resident(run.dit, run.x.device):
            self._stop(reason)
            return self._run(run)
        try:
            step = self._record(run)
        except Exception as error:  # what a capture refuses has no common type
            line = (str(error).strip() or repr(error)).splitlines()[0]
            reason = f"a step cannot be recorded ({type(error).__name__}: {line})"
            if not isinstance(error, torch.OutOfMemoryError):
                _verdicts[kind] = reason
            self._stop(reason)
            return self._run(run)
        self._steps[step.selects] = step
        out = self._launch(step, run)
        if kind in _verdicts:
            return out
        state.passes = passes
        plain = self._run(run)
        far = float((out - plain).float().norm() / plain.float().norm().clamp_min(1e-12))
        # Written so that NaN is not taken for near.
        reason = None if far <= TOLERANCE else f"a recorded step gave another result than running it ({far:.2g} away)"
        _verdicts[kind] = reason
        if reason is None:
            return out
        self._stop(reason)
        return plain

    def _record(self, run: "Pass") -> "_Step":
        """One pass as a graph; the state is left as the pass would leave it."""
        state, selects = run.state, run.selects
        given = run.x, run.timestep
        if self._inputs is None or not all(map(_alike, self._inputs, given)):
            self._inputs = given[0].clone(), given[1].clone()
        held = replace(run, x=self._inputs[0], timestep=self._inputs[1])
        seen: list[tuple[Any, ...]] = []
        watch, passes, selections = state.watch, state.passes, dict(state.selections)
        state.watch = lambda *one: seen.append(one)
        recording_thread.recording = True
        try:
            recording, out = self._recorder.record(held)
        except BaseException:
            state.passes, state.selections = passes, selections
            raise
        finally:
            recording_thread.recording = False
            state.watch = watch
        self._free_spent()
        return _Step(recording, selects, out, seen, dict(state.selections), _addresses(run.dit))

    def _settle(self, state: "CausalState", made: "dict[int, BlockSelection]") -> None:
        """Bring a pass's selections to where the passes that reuse them look: the chunk's first pass says where."""
        if state.attention.reuse_steps == 1:
            return
        for layer, selection in made.items():
            kept = self._selections.get(layer)
            if kept is None:
                parts = (part.clone(memory_format=torch.contiguous_format) for part in selection)
                self._selections[layer] = type(selection)(*parts)
            elif kept is not selection:
                for target, part in zip(kept, selection, strict=True):
                    target.copy_(part)
        state.selections = dict(self._selections)

    def _stop(self, reason: str) -> None:
        """No graphs any more in this run."""
        self.free()
        self.why_off = reason
        if self._must:
            raise RuntimeError(f"cuda_graph 'on' cannot go on: {reason}; use 'auto' or 'off'")
        self._tell(reason)

    def _free_spent(self) -> None:
        for step in self._spent:
            step.recording.free()
        self._spent.clear()


@dataclass(frozen=True)
class Pass:
    """One call of the forward pass."""

    forward: Forward
    dit: Any
    x: Tensor
    timestep: Tensor
    context: Tensor
    state: "CausalState"

    def __call__(self) -> Tensor:
        return self.forward(self.dit, self.x, self.timestep, self.context, self.state)

    @property
    def selects(self) -> bool:
        """Whether this pass chooses blocks; one that reuses an earlier choice is another graph."""
        return self.state.plan is not None and self.state.passes % self.state.attention.reuse_steps == 0

    def alike(self) -> int:
        """How many passes of the open chunk, this one included, are the same work."""
        done, steps, each = self.state.passes, self.state.steps, self.state.attention.reuse_steps
        if self.state.plan is None:
            return steps - done
        selecting = -(-steps // each) + -done // each
        return selecting if self.selects else steps - done - selecting

    def kind(self) -> tuple[object, ...]:
        """What makes graphs so alike that checking one of them is checking all."""
        state, dit, x, plan = self.state, self.dit, self.x, self.state.plan
        sizes = (type(dit), dit.dim, len(dit.blocks), x.shape, x.dtype, x.device, self.timestep.shape)
        sparse = plan is not None and (self.selects, plan.choose > 0)
        return (*sizes, state.cache.kv(0).k.dtype, state.attention, state.dense_attention, sparse)


class _Step:
    """A recorded pass, where its weights lay, and what a launch fills: out, what a watcher is shown, selections."""

    def __init__(
        self,
        recording: Recording,
        selects: bool,
        out: Tensor,
        seen: list[tuple[Any, ...]],
        selections: "dict[int, BlockSelection]",
        weights: tuple[int, ...],
    ) -> None:
        self.recording, self.selects, self.weights = recording, selects, weights
        self.out, self.seen, self.selections = out, seen, selections

    def let_go(self) -> None:
        """Its tensors go back to the pool, for the next recording to use."""
        self.seen, self.selections = [], {}
        del self.out


def _addresses(tree: nn.Module) -> tuple[int, ...]:
    """Where all weights and buffers lie."""
    return tuple(tensor.data_ptr() for tensor in itertools.chain(tree.parameters(), tree.buffers()))


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
