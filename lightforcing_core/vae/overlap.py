"""Decode beside the sampling: a chunk's frames are made on a second stream while the next chunk is sampled.

Frames come out once they have arrived in host memory, at the latest with the next chunk, always in order; whatever
follows, files and pictures, is that much later. On a CPU every chunk is decoded at once: same calls, same frames.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .streaming import NOT_FINITE


class Arrival(Protocol):
    """Frames on their way into host memory."""

    def is_there(self) -> bool:
        """Whether `frames` would not wait."""

    def frames(self) -> Tensor:
        """Wait for them. Raises ValueError where the latents were not finite, and what the device raises."""


class OverlappedDecoder:
    """Decodes one clip chunk by chunk, beside what the device does otherwise.

    decoder: a `StreamingDecoder`, or with `beside` False anything with its `decode`. device: where it runs; beside:
    whether a second stream may be used there, which holds the memory of a decode and of a sampling step at once.
    """

    def __init__(self, decoder: Any, device: torch.device | str, *, beside: bool = True) -> None:
        device = torch.device(device)
        self._decoder = decoder
        self._stream = SideStream(device) if beside and device.type == "cuda" else None
        self._coming: deque[Arrival] = deque()

    def put(self, latents: Tensor, *, normalised: bool = True) -> list[Tensor]:
        """Decode the clip's next latents [B, 16, f, h, w]; returns the video frames that are ready, oldest first.

        Frames [B, n, 8h, 8w, 3] are those of everything put in before, in host memory; without a second stream they
        are those of these latents, on the decoder's device. Errors as `StreamingDecoder.decode`, those of the values
        with the frames.
        """
        if self._stream is None:
            return [self._decoder.decode(latents, normalised=normalised)]
        earlier = len(self._coming)

        def decode() -> Tensor:
            frames: Tensor = self._decoder.decode(latents, normalised=normalised, trusted=True)
            return frames

        self._coming.append(self._stream.start(decode, latents))
        return [self._coming.popleft().frames() for _ in range(earlier)]

    def arrived(self) -> list[Tensor]:
        """Frames that have arrived since; waits for nothing."""
        frames = []
        while self._coming and self._coming[0].is_there():
            frames.append(self._coming.popleft().frames())
        return frames

    def rest(self) -> list[Tensor]:
        """All frames that are still on their way."""
        return [self._coming.popleft().frames() for _ in range(len(self._coming))]

    def drop(self) -> None:
        """Forget what is on its way; the device is done with it before it goes on with anything else."""
        self._coming.clear()
        if self._stream is not None:
            self._stream.join()


class SideStream:
    """A second stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _second_stream(device)

    def start(self, decode: Callable[[], Tensor], latents: Tensor) -> "_OnItsWay":
        """Ask for the frames that `decode` makes of `latents`, behind all that the device was asked so far."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if latents.is_cuda:
            latents.record_stream(stream)  # its memory is not given away before the decoder has read it
        with torch.cuda.stream(stream):
            # Beside the frames, because looking at the values here would wait for them.
            finite = to_host(torch.isfinite(latents).all())
            frames = to_host(decode())
            done = torch.cuda.Event()
            done.record(stream)
        return _OnItsWay(frames, finite, done)

    def join(self) -> None:
        """What the device is asked from now on comes after all that this stream does."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: the matrix libraries keep a workspace for every stream that they ever met."""
    return torch.cuda.Stream(device)


class _OnItsWay:
    def __init__(self, frames: Tensor, finite: Tensor, done: torch.cuda.Event) -> None:
        self._frames, self._finite, self._done = frames, finite, done

    def is_there(self) -> bool:
        return bool(self._done.query())

    def frames(self) -> Tensor:
        self._done.synchronize()
        if not self._finite:
            raise ValueError(NOT_FINITE)
        return self._frames


def to_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, still on its way: an event recorded behind this tells when it is there."""
    try:
        target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # no more memory that may be pinned; then the copy waits
        return x.cpu()
    return target.copy_(x, non_blocking=True)
