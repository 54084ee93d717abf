"""Binds the fused launchers' calls for a GPU that is not here and prints how many versions of a kernel they need.

Run as a process of its own, without TRITON_INTERPRET. Everything happens that a launch does but the launch: the
arguments are specialised as on a GPU and the kernel is compiled for sm_90. One JSON row per kernel:
`{"kernel": ..., "versions": ...}`.
"""

import json

import torch
import triton
from triton.runtime import driver

from lightforcing.kernels import modulation, selection, store

from .ahead_of_time import Absent
from .fused_variants import stopped_short

HEADS, HEAD_DIM = 12, 128
# (batch, frames, slots, tokens per frame): a first frame, chunks, a window recomputed at once, another video's ring,
# two samples, another size.
CALLS = [(1, 1, 21, 48), (1, 3, 21, 48), (1, 16, 21, 48), (1, 3, 7, 48), (2, 3, 12, 48), (1, 3, 21, 52)]
KERNELS = (
    store._store,
    modulation._norm_scale_shift,
    modulation._gated_add,
    selection._score,
    selection._score_parts,
    selection._select,
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def store_a_chunk(batch: int, frames: int, slots: int, tokens_per_frame: int) -> None:
    tokens, width, blocks = frames * tokens_per_frame, HEADS * HEAD_DIM, slots * triton.cdiv(tokens_per_frame, 16)
    q, k, v = empty(batch, tokens, 3 * width).chunk(3, -1)
    ring = store.LayerMemory(
        empty(batch, slots * tokens_per_frame, HEADS, HEAD_DIM),
        empty(batch, slots * tokens_per_frame, HEADS, HEAD_DIM),
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
        tokens_per_frame=tokens_per_frame,
        head_dim=HEAD_DIM,
        block=(16, 16),
    )


def select_for_a_chunk(batch: int, frames: int, slots: int, tokens_per_frame: int) -> None:
    per_frame, parts_per_frame = triton.cdiv(tokens_per_frame, 16), triton.cdiv(tokens_per_frame, 4)
    q_means, k_means, frame_means = (
        empty(batch, rows, HEADS, HEAD_DIM) for rows in (frames * per_frame, slots * per_frame, slots)
    )
    parts = selection.Parts(empty(batch, slots * parts_per_frame, HEADS, HEAD_DIM), tokens_per_frame, 4, 4)
    ranks = empty(slots, dtype=torch.int32)
    for how in (None, parts):
        selection.select_blocks(q_means, k_means, frame_means, ranks, choose=frames % 3, kept=slots, parts=how)


def modulate_a_chunk(batch: int, frames: int, slots: int, tokens_per_frame: int) -> None:
    x = empty(batch, frames * tokens_per_frame, 1536)
    shift, scale, gate, *_ = empty(batch, frames, 6, 1536).unbind(2)
    modulation.norm_scale_shift(x, scale, shift, 1e-6)
    modulation.gated_add(x, x, gate)


if __name__ == "__main__":
    driver.set_active(Absent(90))
    with stopped_short():
        for call in CALLS:
            store_a_chunk(*call)
            modulate_a_chunk(*call)
            select_for_a_chunk(*call)
    for kernel in KERNELS:
        versions = sum(len(compiled[0]) for compiled in kernel.device_caches.values())
        print(json.dumps({"kernel": kernel.fn.__name__, "versions": versions}))
