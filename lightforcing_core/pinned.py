"""Host memory that a GPU copies to and from at the bus's full speed, beside its work: small tensors and large pieces.

PyTorch's own pinned memory is rounded up to powers of two and kept after it is freed; a long video's cache is many
gigabytes, which must be neither. So its memory is one piece of exactly the bytes asked for.
"""

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Where a tensor may start.
ALIGNED = 256

_log = logging.getLogger(__name__)


def sent(x: Tensor, device: torch.device | str | None) -> Tensor:
    """x on `device`, None: where it lies; from host memory to a GPU without waiting for what the GPU is doing.

    A copy from memory that is not pinned waits for all that was asked of the stream before.
    """
    if device is None:
        return x
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def bytes_of(tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes that tensors of these shapes and dtypes take, the gaps between them included."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


class HostMemory:
    """`nbytes` of host memory, handed out tensor by tensor and returned to the system by `free`.

    gpu: the device that copies, for which the memory is pinned; None pins nothing. Where pinning is refused, as
    systems do that limit it, one warning says so and copies take longer. wait: called before the memory is unpinned,
    until no copy is under way. device: another place for the bytes, such as "meta".
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
        self._unpin: weakref.finalize | None = None
        if gpu is not None and nbytes > 0 and _pinned(self._buffer, gpu):
            self._unpin = weakref.finalize(self, _unpin, self._buffer.data_ptr(), gpu, wait)
            self._unpin.atexit = False  # the driver may be gone by then, and the memory goes with the process
        self.pinned = self._unpin is not None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, its values whatever lies there. RuntimeError where it is more than is left."""
        assert self._buffer is not None
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > len(self._buffer):
            raise RuntimeError(f"{shape} {dtype} are {nbytes} bytes, and {len(self._buffer) - self._used} are left")
        piece = self._buffer[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNED) * ALIGNED
        return piece.view(dtype).view(shape)

    def free(self) -> None:
        """Let go of the memory; tensors taken from it must not be used any more."""
        if self._unpin is not None:
            self._unpin()
        self._buffer = None


def _pinned(buffer: Tensor, gpu: torch.device) -> bool:
    """Whether the driver has locked the buffer's pages in memory."""
    with _current(gpu):
        status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status == 0:
        return True
    with contextlib.suppress(RuntimeError):  # the refusal lies in wait for whatever the device is told next
        torch.zeros(1, device=gpu).add_(1)
    _log.warning(
        "[Light Forcing] %.1f GB of host memory cannot be pinned (CUDA error %d); copies of the KV cache take longer",
        buffer.nbytes / 1e9,
        status,
    )
    return False


def _unpin(address: int, gpu: torch.device, wait: Callable[[], object]) -> None:
    wait()
    with _current(gpu):
        torch.cuda.cudart().cudaHostUnregister(address)


def _current(gpu: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `gpu` the current one: what is asked of another one makes a context there, of hundreds of megabytes."""
    return torch.cuda.device(gpu if gpu.type == "cuda" else -1)
