"""Kernels compiled by their own launchers for GPUs that are not here, and what the machine code takes of a chip.

An interpreted kernel cannot be compiled, so this module also runs as a process of its own, without TRITON_INTERPRET.
A case is a dict: `call` (a name in `CALLS`) and the options of that call. Calls are made with tensors that have no
memory, and their launches compile and go no further.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightforcing.kernels import block_sparse, channel_norm, modulation, quantise, selection, store, tuning
from lightforcing.kernels import device as gpu

# Shared memory that one program may use, in KiB, by chip.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MULTIPROCESSORS = 10_000  # so many that every unit is cut if units are cut at all
HEADS, DIM = 12, 128
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LAUNCHED = (
    (block_sparse, "forward"),
    (block_sparse, "combine"),
    (block_sparse, "tail_bias"),
    (store, "_store"),
    (selection, "_score"),
    (selection, "_score_parts"),
    (selection, "_select"),
    (modulation, "_add_norm"),
    (channel_norm, "_norm_silu"),
    (quantise, "_quantise_rows"),
    (quantise, "_scale_product"),
)


def compile_all(chip, cases, cache):
    """For each case what each kernel takes, see `row_of`. `cache` is Triton's folder."""
    return _in_a_process({"chip": chip, "cases": cases}, cache)


def versions_of(chip, cases, cache):
    """How often each kernel is compiled if these calls are made in one process, with tensors in memory."""
    (versions,) = _in_a_process({"chip": chip, "versions": cases}, cache)
    return versions


def _in_a_process(asked, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Line numbers change no code, and without them it is made faster.
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled", json.dumps(asked)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Absent:
    """As much of a CUDA driver as compiling needs, for a chip that is not here."""

    def __init__(self, chip):
        self.chip = chip

    def get_current_device(self):
        return self.chip

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.chip, 32)


def compiled(case, device="meta"):
    """(compiled kernel, its constants) of each launch of a case."""
    options = dict(case)
    found = []

    class Launched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **constants):
            found.append((self.kernel.warmup(*arguments, grid=(1,), **constants), constants))

    with contextlib.ExitStack() as stack, torch.device(device):
        for module, name in LAUNCHED:
            stack.enter_context(mock.patch.object(module, name, Launched(getattr(module, name))))
        stack.enter_context(mock.patch.object(gpu, "why_not", return_value=None))
        CALLS[options.pop("call")](**options)
    return found


def empty(*shape, dtype="bf16"):
    return torch.empty(shape, dtype=DTYPES.get(dtype, dtype))


def call_attention(
    block=(64, 64),
    ways="",
    dim=DIM,
    heads=HEADS,
    dtype="bf16",
    stored=None,
    tokens=1560,
    frames=21,
    first_slot=0,
    width=60,
    launch=None,
):
    """A chunk of 3 frames that sees `frames` slots of a cache, from `first_slot` on.

    ways: words of dense, tail and uneven; of tma, tiles through descriptors, and cut, units in parts.
    launch: tiles, warps and stages if not the default's.
    """
    ways, (block_q, block_k) = ways.split(), block
    q_blocks, k_blocks = 3 * triton.cdiv(tokens, block_q), frames * triton.cdiv(tokens, block_k)
    q = empty(1, 3 * tokens, heads, dim, dtype=dtype)
    cache = empty(1, (first_slot + frames) * tokens, heads, dim, dtype=stored or dtype)[:, first_slot * tokens :]
    options = {"tokens_per_frame": tokens, "block_q": block_q, "block_k": block_k}
    if stored:
        options["scales"] = (empty(1, k_blocks + 1, heads, dtype=torch.float32)[:, 1:],) * 2
    if "tail" in ways:
        options["tail"] = (empty(1, k_blocks, heads, dim, dtype=dtype),) * 2

    def chosen(kind, *_):
        found = tuning.Launch(*launch) if launch else tuning.default_launch(kind, divmod(driver.active.chip, 10))
        return found._replace(descriptors="tma" in ways, per_sm=int("cut" in ways), narrow="narrow" in ways)

    few = mock.patch.object(gpu, "multiprocessors", return_value=MULTIPROCESSORS)
    with few, mock.patch.object(block_sparse, "_launch_for", chosen):
        lists = [None, None]
        if "dense" not in ways:
            lists = [empty(1, heads, q_blocks, *last, dtype=torch.int32) for last in ((width,), ())]
        block_sparse.block_sparse_attention(q, cache, cache, *lists, uneven="uneven" in ways, **options)


def call_store(
    block=64,
    batch=1,
    dtype="bf16",
    stored=None,
    tokens=1560,
    frames=3,
    slots=21,
    with_q=True,
    means=True,
    values=False,
    subs=False,
):
    """`means`, `values` and `subs`: what is pooled besides the store."""

    def heads(rows, dtype=dtype):
        return empty(batch, rows, HEADS, DIM, dtype=dtype)

    per_frame, parts_per_frame = triton.cdiv(tokens, block), triton.cdiv(tokens, block // store.SUB_BLOCKS)
    scales = [empty(batch, slots * per_frame, HEADS, dtype=torch.float32) if stored else None] * 2
    ring = store.LayerMemory(
        heads(slots * tokens, stored or dtype),
        heads(slots * tokens, stored or dtype),
        *scales,
        key_means=heads(slots * per_frame) if means else None,
        frame_means=heads(slots) if means else None,
        arrivals=empty(batch, slots, HEADS, dtype=torch.int32) if means else None,
        value_means=heads(slots * per_frame) if values else None,
        sub_means=heads(slots * parts_per_frame) if subs else None,
        key_mean=empty(batch, HEADS, DIM, dtype=torch.float32) if stored else None,
    )
    q, k, v = empty(batch, frames * tokens, 3 * HEADS * DIM, dtype=dtype).chunk(3, -1)
    weight, angles = empty(HEADS * DIM, dtype=dtype), empty(frames * tokens, DIM // 2, dtype=torch.float32)
    store.fused_store(
        q if with_q else None,
        k,
        v,
        q_weight=weight if with_q else None,
        k_weight=weight,
        eps=1e-6,
        cos=angles,
        sin=angles,
        ring=ring,
        slots=empty(frames, dtype=torch.int32),
        tokens_per_frame=tokens,
        head_dim=DIM,
        block=(block, block),
    )


def call_select(
    block=64, batch=1, dtype="bf16", tokens=1560, frames=21, blocks=None, q_blocks=75, choose=2, kept=2, parts=False
):
    """Selection among `frames` frames of `tokens` tokens, or of so many that there are `blocks` blocks."""
    blocks = blocks or frames * triton.cdiv(tokens, block)
    means = [empty(batch, rows, HEADS, DIM, dtype=dtype) for rows in (q_blocks, blocks, frames)]
    if parts:
        size = block // store.SUB_BLOCKS
        rows = empty(batch, frames * triton.cdiv(tokens, size), HEADS, DIM, dtype=dtype)
        parts = selection.Parts(rows, tokens, size, store.SUB_BLOCKS)
    ranks = empty(frames, dtype=torch.int32)
    selection.select_blocks(*means, ranks, choose=choose, kept=kept, parts=parts or None)


def call_modulation(width=1536, batch=1, dtype="bf16", tokens=1560, frames=3):
    x = empty(batch, frames * tokens, width, dtype=dtype)
    shift, scale, gate, *_ = empty(batch, frames, 6, width, dtype=dtype).unbind(2)
    modulation.add_norm(x, None, None, scale, shift, 1e-6)
    modulation.add_norm(x, x, gate, scale, shift, 1e-6)
    modulation.add_norm(x, x, gate, *empty(2, width, dtype=dtype), 1e-6)
    modulation.add_norm(x, x, None, scale, shift, 1e-6)
    modulation.add_norm(x, None, None, scale[0, 0], None, 1e-6)


def call_channel_norm(channels=24, batch=1, dtype="bf16", frames=12, height=480, width=832):
    x, past = (empty(batch, channels, n, height, width, dtype=dtype) for n in (frames, 2))
    past = past.contiguous(memory_format=channel_norm.LAYOUT)
    channel_norm.norm_silu_behind(past, x, empty(channels, 1, 1, 1, dtype=dtype), channels**0.5, 1e-12)


def call_fp8(width=1536, batch=1, dtype="bf16", tokens=1560, frames=3):
    """The FP8 forms of the norms, and what else a layer in FP8 launches."""
    x = empty(batch, frames * tokens, width, dtype=dtype)
    shift, scale, gate, *_ = empty(6, batch, frames, width, dtype=dtype).unbind()
    modulation.add_norm(x, x, gate, scale, shift, 1e-6, fp8=True)
    rows = x.flatten(0, 1)
    _, scales = quantise.quantise_rows(rows)
    quantise.quantise_rows(rows, gelu=True)
    quantise.scale_product(rows, scales, scales[:1].expand(width, 1).contiguous(), scale[0, 0], rows)


CALLS = {
    "attention": call_attention,
    "store": call_store,
    "select": call_select,
    "modulation": call_modulation,
    "channel_norm": call_channel_norm,
    "fp8": call_fp8,
}


def row_of(kernel, constants):
    """What a compiled kernel takes: bytes of shared memory and, if cuobjdump is there, registers and stack bytes.

    Of the attention's main loop: `barriers` and `shuffles` per 64 keys; `warps` that share rows and columns; `ahead`,
    the copies that may still be on their way when a tile's own have arrived; `slow`, counts of slow conversions and of
    single bytes read.
    """
    ptx = kernel.asm["ptx"]
    row = {
        "kernel": kernel.name,
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "tensor_maps": ptx.count("cp.async.bulk.tensor"),
        "counts_in_order": counts_in_order(ptx),
    }
    found = re.search(r"REG:(\d+) STACK:(\d+)", _dump(kernel, "-res-usage"))
    if found:
        row |= {"registers": int(found[1]), "stack": int(found[2])}
        if kernel.name == "forward":
            counts = in_main_loop(_dump(kernel, "-sass"), r"\bBAR\.", r"\bSHFL\.")
            row["barriers"], row["shuffles"] = (count * 64 / constants["TILE_K"] for count in counts)
            row["slow"] = in_main_loop(_dump(kernel, "-sass"), r"\bF2F\.BF16", r"\bLDS\.U8")
    if kernel.name == "forward":
        _, loop = kernel.asm["ttgir"].split("scf.for", 1)
        waits = re.findall(r"async_wait .*num = (\d+)", loop.split("scf.yield")[0])
        row["ahead"] = int(waits[0]) if waits else 0
        row["warps"] = re.findall(r"nvidia_mma<.*warpsPerCTA = \[(\d+, \d+)\]", kernel.asm["ttgir"])
    return row


def _dump(kernel, option):
    """What the cuobjdump in Triton's wheel says of a kernel's machine code; nothing if the wheel has none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def in_main_loop(sass, *instructions):
    """How often each of these patterns names an instruction of the first loop that multiplies matrices."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    loops = []
    for at, text in code:
        branch = re.search(r"BRA\S* .*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            body = [line for place, line in code if int(branch[1], 16) <= place <= at]
            if any("MMA" in line for line in body):
                loops.append((at, body))
    _, body = min(loops)
    return [sum(bool(re.search(name, line)) for line in body) for name in instructions]


def counts_in_order(ptx):
    """Whether all threads meet between their last store and the one atomic count, which releases to the GPU."""
    steps = re.findall(r"bar\.sync|st\.global|atom\.\S+", ptx)
    counts = [index for index, step in enumerate(steps) if step.startswith("atom")]
    if len(counts) != 1 or not {"acq_rel", "gpu"} <= set(steps[counts[0]].split(".")):
        return False
    return steps[counts[0] - 1] == "bar.sync"


def _versions(cases):
    for case in cases:
        compiled(case, device="cpu")
    kernels = (getattr(module, name) for module, name in LAUNCHED)
    counts = {k.fn.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels}
    return {name: count for name, count in counts.items() if count}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    driver.set_active(Absent(asked["chip"]))
    if "versions" in asked:
        print(json.dumps(_versions(asked["versions"])))
    for case in asked.get("cases", ()):
        print(json.dumps([row_of(*launch) for launch in compiled(case)]), flush=True)
