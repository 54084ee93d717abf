"""Compiles kernels for GPUs that are not here, from the very arguments that their launchers would pass.

Run as a process of its own, without TRITON_INTERPRET: an interpreted kernel cannot be compiled. Arguments, one JSON
row printed for each:

- a variant's name, see `attention_variants` and `fused_variants`. Prints what the compiled code takes.
- `ptx:` and a name with several chips, `80 86 89`: a digest of each one's PTX without its label.
- `chunks:cc`: prepares launches for every chunk of a video and prints how many kernels they compile.
"""

import functools
import hashlib
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightforcing.kernels import block_sparse

from . import fused_variants
from .attention_variants import kind_of, launch_of
from .resources import resource_usage

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


def prepare(
    cc, kind, launch, tokens_per_frame, frames, width, *, slots=21, heads=12, device="meta", first_slot=0, asked=()
):
    """Compile what the launcher would launch for a chunk of 3 frames that sees `frames` slots of a cache.

    asked: "uneven" for lists that are begun longest first, "lse" for a log-sum-exp.
    """
    driver.set_active(Absent(cc))

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    per_frame = triton.cdiv(tokens_per_frame, kind.block_k)
    q_blocks, k_blocks = 3 * triton.cdiv(tokens_per_frame, kind.block_q), frames * per_frame
    q, out = (empty(1, 3 * tokens_per_frame, heads, kind.head_dim, dtype=kind.dtype) for _ in range(2))
    cache = empty(1, (slots + first_slot) * tokens_per_frame, heads, kind.head_dim, dtype=kind.stored)
    kv = cache[:, first_slot * tokens_per_frame :][:, : frames * tokens_per_frame]
    lists = scales = tail = order = lse = None
    if not kind.dense:
        lists = [empty(1, heads, q_blocks, *last, dtype=torch.int32) for last in ((width,), ())]
    if kind.stored != kind.dtype:
        scales = [empty(1, k_blocks + 1, heads, dtype=torch.float32)[:, 1:]] * 2
    if kind.tail:
        means = empty(1, k_blocks, heads, kind.head_dim, dtype=kind.dtype)
        tail = means, means, empty(1, heads, q_blocks, k_blocks, dtype=torch.float32)
    if "uneven" in asked:
        order = empty(heads * q_blocks, dtype=torch.int32)
    if "lse" in asked:
        lse = empty(*q.shape[:-1], dtype=torch.float32)
    work = block_sparse.Work(kind, tokens_per_frame, 0.1, q, kv, kv, out, lists, order, scales, tail, lse)
    launches = block_sparse.prepared(work, launch, MULTIPROCESSORS)
    return [kernel.warmup(*arguments, grid=grid, **constants) for kernel, grid, arguments, constants in launches]


def compile_variant(text):
    """Shared memory in bytes, and registers and stack bytes per thread where cuobjdump is, of one variant."""
    cc, *shape, how = text.split(":")
    if not shape[0].isdigit():
        kernel = fused_kernel(int(cc), text)
        return fused_row(int(cc), text, kernel, kernel.asm["cubin"])
    kind = kind_of(*shape)
    return compiled(int(cc), kind, launch_of(kind, how), text, asked=how.split())


def compiled(cc, kind, launch, text, *, asked=()):
    kernel, *others = prepare(cc, kind, launch, 1560 if any(kind.ragged) else 1536, 21, 60, asked=asked)
    assert bool(others) == bool(launch.per_sm)
    return row_of(cc, launch, text, kernel, others, [x.asm["cubin"] for x in (kernel, *others)])


def digests(text):
    """By chip, what tells apart the PTX that each is given."""
    chips, *shape, how = text.split(":")
    found = {}
    for cc in chips.split():
        if shape[0].isdigit():
            kind = kind_of(*shape)
            kernels = prepare(int(cc), kind, launch_of(kind, how), 1560 if any(kind.ragged) else 1536, 21, 60)
        else:
            kernels = [fused_kernel(int(cc), text)]
        ptx = "".join(re.sub(r"\.target sm_\d+", "", kernel.asm["ptx"]) for kernel in kernels)
        found[cc] = hashlib.sha256(ptx.encode()).hexdigest()
    return found


def row_of(cc, launch, text, kernel, others, cubins):
    """What the machine code `cubins` of a kernel and of what adds its parts up takes on sm_`cc`."""
    row = {"variant": text, "cc": cc, "shared": kernel.metadata.shared, **launch._asdict()}
    row |= {
        "tensor_maps": kernel.asm["ptx"].count("cp.async.bulk.tensor"),
        "tensor_memory": kernel.metadata.tmem_size,
        "combine": [other.metadata.shared for other in others],
    }
    usage, *rest = map(usage_of, cubins)
    row |= usage
    if rest and "stack" in row:
        row["stack"] = max(row["stack"], *(each["stack"] for each in rest))
    return row


def fused_kernel(cc, text):
    driver.set_active(Absent(cc))
    return fused_variants.compiled(text)


def fused_row(cc, text, kernel, cubin):
    row = {"variant": text, "cc": cc, "shared": kernel.metadata.shared, "tensor_memory": 0}
    if ":store:" in text:
        row["counts_in_order"] = counts_in_order(kernel.asm["ptx"])
    return row | usage_of(cubin)


def counts_in_order(ptx):
    """Whether all threads meet between their last store and the one atomic count, which releases to the GPU."""
    steps = re.findall(r"bar\.sync|st\.global|atom\.\S+", ptx)
    counts = [index for index, step in enumerate(steps) if step.startswith("atom")]
    if len(counts) != 1 or not {"acq_rel", "gpu"} <= set(steps[counts[0]].split(".")):
        return False
    return steps[counts[0] - 1] == "bar.sync"


usage_of = functools.lru_cache(resource_usage)  # many kernels add their parts up with the same code


def count_kernels(cc):
    """How many kernels the chunks of one 81-frame video compile, for each kind of work."""
    found = {}
    for variant, stored, how in (
        ("sparse", "bf16", ""),
        ("tail", "bf16", ""),
        ("dense", "int8", ""),
        ("sparse", "int8", ""),
        ("sparse", "bf16", "tma cut"),
    ):
        kind = kind_of("64", "64", "128", "bf16", stored, "1", variant)
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


def rows_of(argument):
    task, _, rest = argument.partition(":")
    if task == "ptx":
        return [digests(rest)]
    if task == "chunks":
        return [count_kernels(int(rest))]
    return [compile_variant(argument)]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for row in rows_of(argument):
            print(json.dumps(row), flush=True)
