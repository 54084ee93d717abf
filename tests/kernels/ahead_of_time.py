"""Compiles the block-sparse kernel for GPUs that are not here, from the very arguments its launcher would pass.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled. Arguments, one JSON
row printed for each:

- `cc:block_q:block_k:head_dim:dtype:stored:ragged:variant:how`, e.g. `90:128:64:128:bf16:int8:1:tail:tma`; `variant`
  is `sparse`, `tail` or `dense`, `how` empty, `tma`, `cut` or `tma cut`. Prints what the compiled code takes.
- `tiles:` and the same up to `variant`: the tuner's other tiles, a row each.
- `chunks:cc`: prepares launches for every chunk of a video and prints how many kernels they compile.
"""

import json
import sys

import torch
import triton
from resources import SHARED_KIB, resource_usage
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightforcing.kernels import block_sparse, tuning

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


MULTIPROCESSORS = 10_000  # so many that every unit is cut where units are cut


class Absent:
    """As much of a CUDA driver as compiling needs, for a GPU of compute capability `cc` that is not here."""

    def __init__(self, cc):
        self.cc = cc

    def get_current_device(self):
        return self.cc

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.cc, 32)


def prepare(cc, kind, launch, tokens_per_frame, frames, width, *, slots=21, heads=12, device="meta", first_slot=0):
    """Compile what the launcher would launch for a chunk of 3 frames that sees `frames` slots of a cache."""
    driver.set_active(Absent(cc))

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    per_frame = triton.cdiv(tokens_per_frame, kind.block_k)
    q_blocks, k_blocks = 3 * triton.cdiv(tokens_per_frame, kind.block_q), frames * per_frame
    q, out = (empty(1, 3 * tokens_per_frame, heads, kind.head_dim, dtype=kind.dtype) for _ in range(2))
    cache = empty(1, (slots + first_slot) * tokens_per_frame, heads, kind.head_dim, dtype=kind.stored)
    kv = cache[:, first_slot * tokens_per_frame :][:, : frames * tokens_per_frame]
    lists = scales = tail = None
    if not kind.dense:
        lists = [empty(1, heads, q_blocks, *last, dtype=torch.int32) for last in ((width,), ())]
    if kind.stored != kind.dtype:
        scales = [empty(1, k_blocks + 1, heads, dtype=torch.float32)[:, 1:]] * 2
    if kind.tail:
        means = empty(1, k_blocks, heads, kind.head_dim, dtype=kind.dtype)
        tail = means, means, empty(1, heads, q_blocks, k_blocks, dtype=torch.float32)
    work = block_sparse.Work(kind, tokens_per_frame, 0.1, q, kv, kv, out, lists, None, scales, tail)
    launches = block_sparse.prepared(work, launch, MULTIPROCESSORS)
    return [kernel.warmup(*arguments, grid=grid, **constants) for kernel, grid, arguments, constants in launches]


def kind_of(block_q, block_k, head_dim, dtype, stored, ragged, variant):
    return tuning.Kind(
        block_q=block_q,
        block_k=block_k,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        stored=DTYPES[stored],
        ragged=(ragged, ragged),
        tail=variant == "tail",
        dense=variant == "dense",
    )


def launch_of(kind, how):
    """The default launch, or what the tuner would make of it: `tma` through descriptors, `cut` with units in parts."""
    launch = tuning.default_launch(kind)
    if "tma" in how:
        launch = launch._replace(descriptors=True)
    return launch._replace(per_sm=2) if "cut" in how else launch


def compile_variant(text):
    """Shared memory in bytes, and registers and stack bytes per thread where cuobjdump is, of one variant."""
    cc, *shape, how = text.split(":")
    kind = kind_named(*shape)
    return compiled(int(cc), kind, launch_of(kind, how), text)


def compile_tiles(text):
    """The same of each launch that the tuner times besides the default one; `text` without how it is launched."""
    cc, *shape = text.split(":")
    kind = kind_named(*shape)
    for launch in tuning.candidates(kind, SHARED_KIB[int(cc)] * 1024)[1:]:
        yield compiled(int(cc), kind, launch, text)


def kind_named(block_q, block_k, head_dim, dtype, stored, ragged, variant):
    return kind_of(int(block_q), int(block_k), int(head_dim), dtype, stored, ragged == "1", variant)


def compiled(cc, kind, launch, text):
    kernel, *others = prepare(cc, kind, launch, 1560 if kind.ragged[0] else 1536, 21, 60)
    assert bool(others) == bool(launch.per_sm)
    row = {"variant": text, "cc": cc, "shared": kernel.metadata.shared, **launch._asdict()}
    row |= {
        "tensor_maps": kernel.asm["ptx"].count("cp.async.bulk.tensor"),
        "estimate": tuning.shared_bytes(kind, launch),
    }
    row |= resource_usage(kernel.asm["cubin"])
    row["combine"] = [other.metadata.shared for other in others]
    if others and "stack" in row:
        row["stack"] = max(row["stack"], *(resource_usage(other.asm["cubin"])["stack"] for other in others))
    return row


def count_kernels(cc):
    """How many kernels the chunks of one 81-frame video compile, for each kind of work."""
    found = {}
    for variant, stored, how in (
        ("sparse", "bf16", ""),
        ("tail", "bf16", ""),
        ("dense", "bf16", ""),
        ("sparse", "int8", ""),
        ("sparse", "bf16", "tma cut"),
    ):
        kind = kind_of(64, 64, 128, "bf16", stored, True, variant)
        kernels = block_sparse.forward, block_sparse.combine
        for kernel in kernels:
            kernel.device_caches.clear()
        for chunk in range(1, 8):
            # Widths of every divisibility, caches and lists that begin anywhere.
            sizes = 1560, 3 * chunk, 8 * chunk + chunk % 3
            prepare(cc, kind, launch_of(kind, how), *sizes, heads=2, device="cpu", first_slot=chunk % 2)
        compiled = sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
        found[" ".join(filter(None, (variant, stored, how)))] = compiled
    return found


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        task, _, rest = argument.partition(":")
        if task == "tiles":
            found = compile_tiles(rest)
        else:
            found = [count_kernels(int(rest)) if task == "chunks" else compile_variant(argument)]
        for row in found:
            print(json.dumps(row), flush=True)
