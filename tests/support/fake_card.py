"""A CUDA card that is not there: tensors without data on "cuda", streams, events and graphs that only keep the order.

Everything that a run asks of a card is looked at as it is asked: copies that make the host wait, tensors of the host
among those of the card, work on one stream that does not wait for another's, memory that is given back too early,
and what a CUDA graph cannot record. What a card would refuse raises `Impossible`; where the host merely waits is
noted in `Card.waits`, and inside `Card.busy` it is refused as well.
"""

import contextlib
import ctypes
import itertools
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fake_streams import Event, Graph, Stream
from stream_order import HOST, Impossible, Order
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lightforcing

aten = torch.ops.aten
PACK = Path(lightforcing.__file__).resolve().parent
CUDA, META = 1, 14  # numbers of device types in c10


def let_cuda_be_guarded() -> None:
    """Give C++ something to switch CUDA devices with, as a build without CUDA lacks it: meta's, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]


class Card(TorchDispatchMode):
    """Stands in for `torch.cuda` while it is entered. Tensors are made on "cuda:0" and higher, by number.

    waits: where in the pack the host waited for the card, and for what; launched: names of kernels; woken: devices that
    were asked for anything.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__()
        self.capability = capability
        self.multiprocessors = 4  # so few that all work fills them, and is worth timing
        self.order = Order()
        self.waits: list[str] = []
        self.launched: list[str] = []
        self.woken: set[int] = set()  # devices that were asked for anything
        self.current = 0  # the device
        self.recording: Graph | None = None
        self._busy = False
        self._streams = {}  # the current one of each device
        self._pinned: set[int] = set()
        self._names: dict[int, int] = {}  # of memory, by the address of its storage
        self._addresses: dict[int, int] = {}
        self._numbers = itertools.count(1)

    def __enter__(self) -> "Card":
        self._stack = contextlib.ExitStack()
        for target, name, stand_in in self._stand_ins():
            self._stack.enter_context(mock.patch.object(target, name, stand_in))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """In here the host must not wait."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    # ------------------------------------------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if func is aten._pin_memory.default:
            return self._made_pinned(args[0], torch.empty_like(args[0]))
        if func is aten.is_pinned.default:
            return self.memory(args[0]) in self._pinned
        out = func(*args, **kwargs)
        if func is aten.empty.memory_format and kwargs.get("pin_memory"):
            self._made_pinned(None, out)
        elif not _only_looks(func):
            self._account(func, args, kwargs, out)
        return out

    def _account(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        written = [x for x in tree_iter(_written(func, args, kwargs)) if isinstance(x, Tensor)] or made
        device = next((x.device for x in (*written, *given) if x.device.type == "cuda"), None)
        agent, waits = HOST, False
        if device is not None:
            agent = self.stream(device).name
            if func in (aten.copy_.default, aten._to_copy.default):
                waits = self._waits_for_copy(func, args, kwargs, written[0])
            else:
                waits = self._waits_for_values(func, given)
        for x in made:
            if not any(x is other for other in written) or self._name(x) is None:
                self._allocate(x, agent if x.device.type == "cuda" else HOST)
        self.do(agent, str(func), [(x, False) for x in given] + [(x, True) for x in written])
        if waits:
            self._know(agent)

    def do(self, agent: str, what: str, uses: list[tuple[Tensor, bool]]) -> None:
        """A piece of work of one stream or the host, and the memory that it reads (False) or writes (True)."""
        if self.recording is not None and agent != HOST:
            for x, write in uses:
                self.recording.use(self.memory(x), write=write)
            return
        self.order.ask(agent)
        for x, write in uses:
            # A number in host memory is read as the work is asked for.
            if agent != HOST and x.device.type == "cpu" and not x.ndim and not write:
                continue
            self.order.use(agent, self.memory(x), what, write=write)

    def _waits_for_values(self, func: Any, given: list[Tensor]) -> bool:
        """Numbers in host memory go along with a kernel; indices and values to put are copied first."""
        copied = func in (aten.index_put_.default, aten.index_put.default)
        waits = any(x.device.type == "cpu" and (x.ndim or copied) for x in given)
        if waits:
            self.wait(f"{func} copies from the host")
        return waits

    def _waits_for_copy(self, func: Any, args: Any, kwargs: Any, target: Tensor) -> bool:
        """Whether the host waits for a copy, of which one side may be its own memory."""
        source = args[1] if func is aten.copy_.default else args[0]
        if source.device == target.device:
            return False
        beside = kwargs.get("non_blocking", len(args) > 2 and args[2])
        host, direct = source if source.device.type == "cpu" else target, source.dtype == target.dtype
        direct &= source.is_contiguous() and target.is_contiguous() and source.shape == target.shape
        pinned = self.memory(host) in self._pinned or (beside and func is aten._to_copy.default and host is target)
        if beside and pinned and direct:
            return False
        how = "waits by itself" if not beside else "is not of pinned memory" if not pinned else "needs a detour"
        self.wait(f"a copy from {source.device} to {target.device} {how}")
        return True

    def _read(self, x: Tensor) -> Any:
        """A number out of a tensor: on the card the host waits for it, in host memory it must have arrived."""
        if x.device.type == "cuda":
            self.wait("a number is read")
            self._know(self.stream(x.device).name)
        else:
            self.do(HOST, "reading a number", [(x, False)])
        return True if x.dtype is torch.bool else 0.0 if x.is_floating_point() else 0

    def wait(self, why: str, *, even_busy: bool = False) -> None:
        """The host waits for the card."""
        if self.recording is not None:
            raise Impossible(f"cannot be recorded: {why}")
        where = _place_in_pack()
        if self._busy and not even_busy:
            raise Impossible(f"the host waits in {where}: {why}")
        self.waits.append(f"{where}: {why}")

    def _know(self, stream: str) -> None:
        self.order.wait(HOST, self.order.mark(stream))

    # ---------------------------------------------------------------------------------------------------- memory

    def memory(self, x: Tensor) -> int:
        """The name of the memory that a tensor lies in."""
        name = self._name(x)
        if name is None:
            self._allocate(x, self.stream(x.device).name if x.device.type == "cuda" else HOST)
            name = self._name(x)
            assert name is not None
        return name

    def _name(self, x: Tensor) -> int | None:
        return self._names.get(x.untyped_storage()._cdata)

    def _allocate(self, x: Tensor, home: str, *, pinned: bool = False) -> None:
        if self._name(x) is not None:
            return
        storage = x.untyped_storage()
        name, key, own = next(self._numbers), storage._cdata, self.recording
        self._names[key] = name
        self.order.made(name, home, kept_by_allocator=pinned)
        if own is not None:
            own.own.add(name)

        def gone() -> None:
            del self._names[key]
            self._pinned.discard(name)
            self.order.gone(name, whatever_uses_it=own is not None)

        weakref.finalize(storage, gone).atexit = False

    def _made_pinned(self, source: Tensor | None, target: Tensor) -> Tensor:
        if self.recording is not None:
            raise Impossible("cannot be recorded: memory is pinned")
        self._allocate(target, HOST, pinned=True)
        self._pinned.add(self.memory(target))
        if source is not None:
            self.do(HOST, "pinning", [(source, False), (target, True)])
        return target

    def address(self, x: Tensor) -> int:
        """Where a tensor would lie: allocations are aligned, and none is like another."""
        base = self._addresses.setdefault(self.memory(x), (1 + len(self._addresses)) << 32)
        return base + x.storage_offset() * x.element_size()

    def pin(self, address: int, nbytes: int, flags: int) -> int:
        """`cudaHostRegister`, through the current device."""
        self.woken.add(self.current)
        self._pinned |= {name for name, base in self._addresses.items() if base == address}
        return 0

    def unpin(self, address: int) -> int:
        """`cudaHostUnregister`: what is copied to and from there must be done."""
        self.woken.add(self.current)
        for name in [name for name, base in self._addresses.items() if base == address]:
            self._pinned.discard(name)
            self.order.ask(HOST)
            self.order.use(HOST, name, "unpinning", write=True)
        return 0

    # ----------------------------------------------------------------------------------------------- torch.cuda

    def stream(self, device: Any = None) -> Stream:
        """The current stream of a device."""
        index = self.index(device)
        self.woken.add(index)
        if index not in self._streams:
            self._streams[index] = Stream(self, torch.device("cuda", index), f"stream 0 of cuda:{index}")
        return self._streams[index]

    def index(self, device: Any) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        """`torch.cuda.device`."""
        before = self.current
        if device != -1:
            self.current = self.index(device)
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`, which also makes the stream's device the current one."""
        index, before = stream.device.index, self.stream(stream.device)
        with self.on_device(index):
            self._streams[index] = stream
            try:
                yield
            finally:
                self._streams[index] = before

    def properties(self, device: Any = None) -> SimpleNamespace:
        major, minor = self.capability
        name = f"a card of compute capability {major}.{minor}"
        return SimpleNamespace(name=name, multi_processor_count=self.multiprocessors, major=major, minor=minor)

    def _new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        number, index = next(self._numbers), self.index(device)
        self.woken.add(index)
        return Stream(self, torch.device("cuda", index), f"stream {number} of cuda:{index}")

    def _stand_ins(self) -> list[tuple[Any, str, Any]]:
        cudart = SimpleNamespace(cudaHostRegister=self.pin, cudaHostUnregister=self.unpin)
        names = {
            "is_available": lambda: False,
            "current_device": lambda: self.current,
            "device": self.on_device,
            "stream": self.on_stream,
            "current_stream": self.stream,
            "Stream": self._new_stream,
            "Event": type("Event", (Event,), {"card": self}),
            "CUDAGraph": lambda: Graph(self),
            "graph_pool_handle": lambda: (0, next(self._numbers)),
            "is_current_stream_capturing": lambda: self.recording is not None,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": self.properties,
            "cudart": lambda: cudart,
        }
        found = [(torch.cuda, name, stand_in) for name, stand_in in names.items()]

        def record_stream(x: Tensor, stream: Stream) -> None:
            self.order.lend(self.memory(x), stream.name)

        return [*found, (Tensor, "record_stream", record_stream), (FakeTensor, "data_ptr", lambda x: self.address(x))]


def _only_looks(func: Any) -> bool:
    """Whether an operation gives a view or a fact, and reads no memory."""
    if func.namespace == "prim" or func in (aten.detach.default, aten.lift_fresh.default):
        return True
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return written


def _place_in_pack() -> str:
    """The innermost function of the pack that is running."""
    frame = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename).resolve()
        if {PACK / "lightforcing_core", PACK / "kernels"} & set(file.parents):
            return f"{file.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the pack"
