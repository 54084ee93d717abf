"""Copies to a GPU without waiting, pinned CPU memory of an exact size, and weights that stay in place.

PyTorch rounds pinned memory up to a power of two and keeps it after it is freed: too much for a long video's cache.
"""

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 256  # tensors start at multiples of this many bytes
ROWS_LAYOUT = "LightForcingRowwiseFP8Layout"  # of ComfyUI's quantised tensors the kind that this pack defines

_log = logging.getLogger(__name__)


def to_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy x to `device`, or return x itself if None; a copy from the CPU to a GPU does not wait for the GPU."""
    if device is None:
        return x
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    # Pinned first, since a copy from pageable memory waits for all earlier work on the stream.
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as tensors on it have it: "cuda" becomes "cuda:0"."""
    return torch.empty(0, device=device).device


def parts_of(weight: Any) -> tuple[Tensor, ...]:
    """The ordinary tensors that a weight consists of: itself, or FP8 values and scales; () for any other kind."""
    if type(weight) in (nn.Parameter, Tensor):
        return (weight,)
    is_ours = getattr(weight, "_layout_cls", None) == ROWS_LAYOUT
    return (weight._qdata, weight._params.scale) if is_ours else ()


def why_not_resident(tree: nn.Module, device: torch.device, kept: Container[nn.Module] = ()) -> str | None:
    """The reason why the weights of a module tree do not stay on `device` as they are, or None.

    A CUDA graph or a second stream must not use weights that are moved, patched or unpacked while in use. A weight that
    ComfyUI casts stays where it is, and the cast is recorded.
    kept: modules whose weights somebody else keeps on the device.
    """
    device = indexed(device)
    for name, module in tree.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        changed = getattr(module, "weight_function", ()) or getattr(module, "bias_function", ())
        if module in kept and not changed:
            continue
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for key, tensor in own:
            parts = parts_of(tensor)
            away = any(part.device != device for part in parts or (tensor,))
            if changed or (away and getattr(module, "comfy_cast_weights", False)):
                return f"ComfyUI moves or patches the weights of {name} while they are used"
            if not parts:
                return f"{name}.{key} is a {type(tensor).__name__}, which is unpacked while it is used"
            if away:
                return f"{name}.{key} is on {tensor.device}, not on {device}"
    return None


class Weights:
    """A module tree's weights for work that reads them by address, such as a CUDA graph or a second stream's.

    These are ordinary tensors. A subclass can keep others in place; of its `kept` modules nothing is checked here.
    """

    def __init__(self, tree: nn.Module, device: torch.device) -> None:
        self.tree, self.device = tree, device
        self.kept: set[nn.Module] = set()
        self._places: list[tuple[Mapping[str, Tensor | None], str]] = []

    def hold(self) -> str | None:
        """Keep the weights in place until `release`; the reason if that is not possible."""
        modules = [module for module in self.tree.modules() if module not in self.kept]
        tables: list[Mapping[str, Tensor | None]] = [m._parameters for m in modules] + [m._buffers for m in modules]
        self._places = [(table, name) for table in tables for name in table]
        return why_not_resident(self.tree, self.device, self.kept)

    def release(self) -> None:
        """End `hold`, whether or not it succeeded."""

    def are_ready(self) -> bool:
        """Whether work that reads the held weights can be recorded now."""
        return why_not_resident(self.tree, self.device, self.kept) is None

    def signature(self) -> Hashable:
        """Equal as long as the weights held lie where they lay."""
        return tuple(part.data_ptr() for table, name in self._places for part in parts_of(table[name]))


def bytes_of(tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of tensors with these shapes and dtypes, including the gaps between them."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


class CpuMemory:
    """`nbytes` of CPU memory for several tensors, returned to the system by `free`.

    gpu: the device to pin the memory for; None does not pin it. If pinning fails, a warning is logged and copies take
        longer.
    wait: called before the memory is unpinned; returns when no copy is running.
    device: another device for the buffer, such as "meta".
    """

    def __init__(
        self,
        nbytes: int,
        gpu: torch.device | None = None,
        wait: Callable[[], object] = lambda: None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        self._buffer: Tensor | None = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._used = 0
        self._unpin: weakref.finalize[..., CpuMemory] | None = None
        if gpu is not None and nbytes > 0 and _pinned(self._buffer, gpu):
            self._unpin = weakref.finalize(self, _unpin, self._buffer.data_ptr(), gpu, wait)
            self._unpin.atexit = False  # the driver may be closed by then, and the process frees the memory
        self.pinned = self._unpin is not None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, uninitialised. Raises RuntimeError if not enough bytes are left."""
        assert self._buffer is not None
        nbytes = math.prod(shape) * dtype.itemsize
        piece = self._buffer[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNED) * ALIGNED
        return piece.view(dtype).view(shape)

    def free(self) -> None:
        """Free the memory; tensors taken from it must not be used any more."""
        if self._unpin is not None:
            self._unpin()
        self._buffer = None


def _pinned(buffer: Tensor, gpu: torch.device) -> bool:
    """Pin the buffer; returns False and logs a warning if the driver refuses."""
    with _current(gpu):
        status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status == 0:
        return True
    with contextlib.suppress(RuntimeError):  # the CUDA error is sticky: the next call reports it once more
        torch.zeros(1, device=gpu).add_(1)
    _log.warning(
        "[Light Forcing] %.1f GB of CPU memory cannot be pinned (CUDA error %d); copies of the KV cache take longer",
        buffer.nbytes / 1e9,
        status,
    )
    return False


def _unpin(address: int, gpu: torch.device, wait: Callable[[], object]) -> None:
    wait()
    with _current(gpu):
        torch.cuda.cudart().cudaHostUnregister(address)


def _current(gpu: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `gpu` the current device: without it a context of hundreds of megabytes is created on another GPU."""
    return torch.cuda.device(gpu if gpu.type == "cuda" else -1)
