"""Binds the fused launchers' calls for a GPU that is not here and prints how many versions of a kernel they need.

Run as a process of its own, without TRITON_INTERPRET. Everything happens that a launch does but the launch: the
arguments are specialised as on a GPU and the kernel is compiled for sm_90. One JSON row per kernel:
`{"kernel": ..., "calls": ..., "versions": ...}`.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from lightforcing.kernels import modulation, store
from lightforcing.kernels.store import Ring

TOKENS, HEADS, HEAD_DIM = 48, 12, 128
# (batch, frames, slots): a first frame, chunks, a window recomputed at once, another video's ring, two samples.
CALLS = [(1, 1, 21), (1, 3, 21), (1, 16, 21), (1, 3, 7), (2, 3, 12)]


class AbsentGpu:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Bound:
    """A kernel whose launches stop short of the GPU."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)

    @property
    def versions(self) -> int:
        return sum(len(compiled[0]) for compiled in self.kernel.device_caches.values())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def store_a_chunk(batch: int, frames: int, slots: int) -> None:
    tokens, width, blocks = frames * TOKENS, HEADS * HEAD_DIM, slots * 3
    q, k, v = empty(batch, tokens, 3 * width).chunk(3, -1)
    ring = Ring(
        empty(batch, slots * TOKENS, HEADS, HEAD_DIM),
        empty(batch, slots * TOKENS, HEADS, HEAD_DIM),
        key_means=empty(batch, blocks, HEADS, HEAD_DIM),
        frame_means=empty(batch, slots, HEADS, HEAD_DIM),
        arrivals=empty(batch, slots, HEADS, dtype=torch.int32),
    )
    store.fused_store(
        q,
        k,
        v,
        q_weight=empty(width),
        k_weight=empty(width),
        eps=1e-6,
        cos=empty(tokens, HEAD_DIM // 2, dtype=torch.float32),
        sin=empty(tokens, HEAD_DIM // 2, dtype=torch.float32),
        ring=ring,
        slots=empty(frames, dtype=torch.int32),
        tokens_per_frame=TOKENS,
        head_dim=HEAD_DIM,
        block=(16, 16),
    )


def modulate_a_chunk(batch: int, frames: int, slots: int) -> None:
    x = empty(batch, frames * TOKENS, 1536)
    shift, scale, gate, *_ = empty(batch, frames, 6, 1536).unbind(2)
    modulation.norm_scale_shift(x, scale, shift, 1e-6)
    modulation.gated_add(x, x, gate)


if __name__ == "__main__":
    driver.set_active(AbsentGpu())
    store.why_not = modulation.why_not = lambda *arguments: None
    kernels = {
        (room, name): Bound(getattr(room, name))
        for room, name in ((store, "_store"), (modulation, "_norm_scale_shift"), (modulation, "_gated_add"))
    }
    for (room, name), bound in kernels.items():
        setattr(room, name, bound)
    for call in CALLS:
        store_a_chunk(*call)
        modulate_a_chunk(*call)
    for (_, name), bound in kernels.items():
        print(json.dumps({"kernel": name, "calls": len(CALLS), "versions": bound.versions}))
