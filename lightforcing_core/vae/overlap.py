"""Decode on a second CUDA stream while sampling continues; on a CPU the same calls decode at once."""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pinned import Weights


class OverlappedDecoder:
    """Decode one clip chunk by chunk, concurrently with other work on the device.

    decoder: a `StreamingDecoder`, or without `weights` anything with its `decode`.
    weights: the decoder's, held for recorded and concurrent decodes; None if neither is wanted.
    concurrent: whether to use a second CUDA stream, which needs the memory of a decode and of a sampling step at once.
    """

    def __init__(self, decoder: Any, weights: Weights | None, *, concurrent: bool = True) -> None:
        self._decoder, self._weights = decoder, weights
        self._stream = side_stream(weights.device) if weights and concurrent else None
        self._coming: deque[Pending] = deque()
        self._read: list[Tensor] = []

    def put(self, latents: Tensor, *, normalised: bool = True) -> list[Tensor]:
        """Decode the clip's next latents [B, 16, f, h, w]; returns frames that are ready.

        With a second stream, and weights that can be held, returns the frames [B, n, 8h, 8w, 3] of all earlier calls,
        in CPU memory; otherwise those and the frames of these latents, on the decoder's device. Raises what
        `StreamingDecoder.decode` raises; frames that are not finite are reported when they are ready.
        """
        weights = self._weights
        are_held = weights is not None and weights.hold() is None
        try:
            if weights is None or self._stream is None or not are_held:
                return [*self._next(len(self._coming)), self._decoder.decode(latents, normalised=normalised)]
            earlier = len(self._coming)

            def decode() -> tuple[Tensor, Tensor]:
                frames = self._decoder.decode(latents, normalised=normalised, trusted=True)
                return frames, self._decoder.extremes

            self._coming.append(self._stream.start(decode, latents))
            # If others are put in their place meanwhile, their memory must not be used again yet.
            self._read = [weight.data for weight in weights.tree.parameters()]
            return self._next(earlier)
        finally:
            self._release()

    def arrived(self) -> list[Tensor]:
        """Return the frames that are ready, without waiting."""
        frames = []
        while self._coming and self._coming[0].is_there():
            frames += self._next(1)
        self._release()
        return frames

    def rest(self) -> list[Tensor]:
        try:
            return self._next(len(self._coming))
        finally:
            self._release()

    def drop(self) -> None:
        """Discard pending frames; later work on the device waits for their decode."""
        self._coming.clear()
        if self._stream is not None:
            self._stream.join()
        self._release()

    def _next(self, count: int) -> list[Tensor]:
        made = []
        for _ in range(count):
            frames, extremes = self._coming.popleft().wait()
            self._decoder.check(extremes)
            made.append(frames)
        return made

    def _release(self) -> None:
        """Let the weights move again, unless a decode that is not finished reads them."""
        if self._weights is not None and not self._coming:
            self._read = []
            self._weights.release()


@functools.cache
def side_stream(device: torch.device) -> "SideStream | None":
    """The second stream of a CUDA device: one per process, because cuBLAS keeps a workspace for every stream."""
    return SideStream(device) if device.type == "cuda" else None


class SideStream:
    """A second stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

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


class Pending(NamedTuple):
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
