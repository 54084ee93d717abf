"""Triton kernels launched on a card that is not there: all that a launch does but the launch.

The arguments are bound and specialised as on a GPU, and the kernel's code is read with them: names, types, shapes and
what is None. Generating machine code is left to the ahead-of-time tests, except where it is asked for.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from fake_card import Card
from stream_order import Impossible
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import compile, make_backend
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

GRID_LIMITS = (2**31 - 1, 65535, 65535)
_read: dict[str, Any] = {}  # across modes, which forget what was compiled
# What the kernels call the memory that they write to.
WRITTEN = {"out", "q_out", "keys", "values", "key_scales", "value_scales", "arrivals", "lse"}
WRITTEN |= {"q_means", "key_means", "value_means", "frame_means", "sub_means"}
WRITTEN |= {"scores", "blocks", "counts", "bias", "totals", "maxima", "sums"}


class Launches:
    """Takes launches in the place of the GPU while it is entered.

    whole: generate machine code too. fastest: which of the launches that the tuner times wins, by their order.
    """

    def __init__(self, card: Card) -> None:
        self.card, self.whole, self.fastest = card, False, "first"
        self._timed = 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        driver.set_active(self)
        run = JITFunction.run

        def launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return self._launch(kernel, run, args, grid, options)

        with mock.patch.object(JITFunction, "run", launch), mock.patch.object(triton.testing, "do_bench", self._time):
            yield

    # What Triton asks of a driver.

    @property
    def utils(self) -> SimpleNamespace:
        kilobytes = 227 if self.card.capability[0] == 9 else 99
        return SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": kilobytes * 1024})

    def get_current_device(self) -> int:
        return self.card.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        major, minor = self.card.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def _time(self, function: Callable[[], object], **_: Any) -> float:
        """`triton.testing.do_bench`, which waits for the card."""
        self.card.wait("a kernel is timed", even_busy=True)
        function()
        self._timed += 1
        return float(self._timed if self.fastest == "first" else -self._timed)

    def _launch(self, kernel: Any, run: Any, args: Any, grid: Any, options: Any) -> Any:
        name = kernel.fn.__name__
        given = [
            (x.base if isinstance(x, TensorDescriptor) else x, name)
            for x, name in zip(args, kernel.arg_names, strict=False)
        ]
        uses = [(x, name.removesuffix("_ptr") in WRITTEN) for x, name in given if isinstance(x, Tensor)]
        for x, _ in uses:
            if (x.device.type, x.device.index) != ("cuda", self.card.current):
                raise Impossible(f"{name} gets a tensor on {x.device} while cuda:{self.card.current} is current")
        for size, limit in zip(grid, GRID_LIMITS, strict=False):
            if not (isinstance(size, int) and 1 <= size <= limit):
                raise Impossible(f"{name} is launched on a grid of {grid}")
        known = kernel.device_caches[self.card.current][0]
        kernel.compile, before = compile if self.whole else read, len(known)
        try:
            found = run(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            raise Impossible(f"{name} cannot be launched: {type(error).__name__}: {error}") from error
        if len(known) > before and self.card.recording is not None:
            raise Impossible(f"{name} is compiled while a graph is recorded")
        self.card.launched.append(name)
        self.card.do(self.card.stream().name, name, uses)
        return found


def read(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Any:
    """Compile no further than to Triton's own representation, where types and shapes are checked."""
    key = f"{source.hash()} {target} {sorted(map(str, options.items()))}"
    if key not in _read:
        _read[key] = _read_anew(source, target, options)
    return _read[key]


def _read_anew(source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generate = backend.get_codegen_implementation(parsed)
    return source.make_ir(target, parsed, generate, backend.get_module_map(), context)
