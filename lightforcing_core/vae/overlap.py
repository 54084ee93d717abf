"""Decode on a second CUDA stream while sampling continues; on a CPU the same calls decode at once."""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class OverlappedDecoder:
    """Decode one clip chunk by chunk, concurrently with other work on the device.

    decoder: a `StreamingDecoder`; if `concurrent` is False, anything with its `decode`.
    device: the device that decodes.
    concurrent: whether to use a second CUDA stream, which needs the memory of a decode and of a sampling step at once.
    """

    def __init__(self, decoder: Any, device: torch.device | str, *, concurrent: bool = True) -> None:
        device = torch.device(device)
        self._decoder = decoder
        self._stream = SideStream(device) if concurrent and device.type == "cuda" else None
        self._coming: deque[Pending] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether a decode may be running."""
        return bool(self._coming)

    def put(self, latents: Tensor, *, normalised: bool = True, beside: bool = True) -> list[Tensor]:
        """Decode the clip's next latents [B, 16, f, h, w]; returns frames that are ready.

        With a second stream, and `beside`, returns the frames [B, n, 8h, 8w, 3] of all earlier calls, in CPU memory;
        otherwise those and the frames of these latents, on the decoder's device. Raises what `StreamingDecoder.decode`
        raises; frames that are not finite are reported when they are ready.
        """
        if self._stream is None or not beside:
            return [*self.rest(), self._decoder.decode(latents, normalised=normalised)]
        earlier = len(self._coming)

        def decode() -> tuple[Tensor, Tensor]:
            frames = self._decoder.decode(latents, normalised=normalised, trusted=True)
            return frames, self._decoder.extremes

        self._coming.append(self._stream.start(decode, latents))
        return [self._next() for _ in range(earlier)]

    def arrived(self) -> list[Tensor]:
        """Return the frames that are ready, without waiting."""
        frames = []
        while self._coming and self._coming[0].is_there():
            frames.append(self._next())
        return frames

    def rest(self) -> list[Tensor]:
        return [self._next() for _ in range(len(self._coming))]

    def _next(self) -> Tensor:
        frames, extremes = self._coming.popleft().wait()
        self._decoder.check(extremes)
        return frames

    def drop(self) -> None:
        """Discard pending frames; later work on the device waits for their decode."""
        self._coming.clear()
        if self._stream is not None:
            self._stream.join()


class SideStream:
    """A second stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _second_stream(device)

    def start(self, decode: Callable[[], tuple[Tensor, Tensor]], latents: Tensor) -> "Pending":
        """Queue `decode`, which returns frames and their extremes, after all earlier work; `latents` is its input."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if latents.is_cuda:
            latents.record_stream(stream)  # keep its memory until the decoder has read it
        with torch.cuda.stream(stream):
            frames, extremes = map(to_cpu, decode())
            done = torch.cuda.Event()
            done.record(stream)
        return Pending(frames, extremes, done)

    def join(self) -> None:
        """Make later work on the current stream wait for this one."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per process, because cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class Pending:
    """Frames and their extremes being copied to the CPU; valid after `done`."""

    frames: Tensor
    extremes: Tensor
    done: torch.cuda.Event

    def is_there(self) -> bool:
        return bool(self.done.query())

    def wait(self) -> tuple[Tensor, Tensor]:
        self.done.synchronize()
        return self.frames, self.extremes


def to_cpu(x: Tensor) -> Tensor:
    """Start a copy of x to CPU memory, which an event recorded afterwards completes."""
    try:
        target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # no memory left that may be pinned: copy synchronously
        return x.cpu()
    return target.copy_(x, non_blocking=True)
