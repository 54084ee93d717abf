"""A stand-in for CUDA graphs on a CPU: every operation noted with the tensors it read and wrote, and run again.

Like a graph it only records: whatever recording wrote is taken back, and what it made is filled with rubbish.
"""

import threading
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter


def tensors(tree):
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def under(tensor):
    """The tensor that does the work of one on a stand-in for a GPU."""
    return getattr(tensor, "held", tensor)


def storage(tensor):
    return under(tensor).untyped_storage()._cdata


def as_bytes(tensor):
    """The whole storage below a tensor, as uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(under(tensor).untyped_storage())


def written(func, args, kwargs):
    """The tensors that an operation writes into."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[place] if place < len(args) else kwargs.get(argument.name))


class Tape(TorchDispatchMode):
    """Notes operations while it is entered; `opaque` notes whole functions that do more than call operations."""

    of_thread = threading.local()

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, {}

    def __enter__(self):
        self.of_thread.tape = self
        return super().__enter__()

    def __exit__(self, *error):
        self.of_thread.tape = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.note(func, args, kwargs or {}, written(func, args, kwargs or {}))

    def note(self, func, args, kwargs, writes):
        for tensor in writes:
            if storage(tensor) not in self.made and storage(tensor) not in self.before:
                self.before[storage(tensor)] = (tensor, as_bytes(tensor).clone())
        out = func(*args, **kwargs)
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        fresh = [tensor for tensor in tensors(out) if storage(tensor) not in given]
        self.made |= {storage(tensor): tensor for tensor in fresh}
        self.calls.append((func, args, kwargs, out, bool(fresh)))
        return out

    def take_back(self):
        for tensor, content in self.before.values():
            as_bytes(tensor).copy_(content)
        for tensor in self.made.values():
            as_bytes(tensor).fill_(0xFF)

    def run(self):
        for func, args, kwargs, out, is_fresh in self.calls:
            again = func(*args, **kwargs)
            if is_fresh:
                for held, new in zip(tensors(out), tensors(again), strict=True):
                    if under(held).data_ptr() != under(new).data_ptr():
                        held.copy_(new)


def opaque(function, writes):
    """`function` as one entry of the tape that is being recorded; writes(args, kwargs) are the tensors it changes."""

    def called(*args, **kwargs):
        tape = getattr(Tape.of_thread, "tape", None)
        if tape is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            return tape.note(function, args, kwargs, writes(args, kwargs))

    return called


class TapeRecorder:
    """The recorder of `cuda_graph`, with tapes. `events` tells what was done with which recording."""

    events: ClassVar = []
    spoil = staticmethod(lambda out: None)  # what a broken replay would do to the result

    @staticmethod
    def why_not(device):
        return None

    def __init__(self, device, *, lane="steps"):
        self.count = 0

    def record(self, work):
        tape = Tape()
        with tape:
            out = work()
        tape.take_back()
        self.count += 1
        self.events.append(("record", self.count))
        return TapeRecording(tape, self.events, self.count, out), out


class TapeRecording:
    def __init__(self, tape, events, number, out):
        self.tape, self.events, self.number, self.out = tape, events, number, out

    def launch(self):
        self.events.append(("launch", self.number))
        self.tape.run()
        TapeRecorder.spoil(self.out)

    def free(self):
        self.events.append(("free", self.number))
        self.tape = None
