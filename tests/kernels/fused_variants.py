"""The compiled variants of all other kernels: every one that a run on `auto` can come to, compiled by its launcher.

A name is `cc:kernel:…`, with the launch parameters last:

- `90:store:bf16:int8:64:qkv+means+subs:16x3x128` q's dtype, the ring's, tokens per block, what is stored and pooled
- `90:score:bf16:64x64`, `90:parts:bf16:64:64x64` scores of means, and of parts of blocks of 64 tokens
- `90:select:512:32:1` the row's padded blocks and frames
- `90:norm_scale_shift:1536:bf16:8x2`, `90:gated_add:…`
- `90:bias:64:1560` what prepares a tail, for blocks of 64 tokens in frames of 1,560

Launchers are called with tensors that have no memory, for a chip that is not here: they say what is compiled.
"""

import contextlib
import itertools
from unittest import mock

import torch
import triton

from lightforcing.kernels import block_sparse, device, modulation, selection, store
from lightforcing.lightforcing_core.model.wan import HEAD_DIM

from .attention_variants import BLOCKS, DTYPES

HEADS, FRAMES, SLOTS, TOKENS = 12, 3, 21, 1560
WIDTHS = (256, 1536, 5120)  # the demo model, Wan 1.3B, Wan 14B
FLOATS = ("bf16", "fp16", "fp32")
POOLED = ("", "+means", "+means+values", "+means+subs", "+means+values+subs")
LAUNCHED = (
    (store, "_store"),
    (selection, "_score"),
    (selection, "_score_parts"),
    (selection, "_select"),
    (modulation, "_norm_scale_shift"),
    (modulation, "_gated_add"),
    (block_sparse, "tail_bias"),
)


def names(cc: int) -> list[str]:
    found = [
        f"store:{dtype}:{stored}:{block}:{parts}{pooled}"
        for dtype, block, parts, pooled in itertools.product(FLOATS, BLOCKS, ("qkv", "kv"), POOLED)
        for stored in (dtype, "int8", "fp8")
        if stored != "fp8" or divmod(cc, 10) >= device.MIN_CAPABILITY_FLOAT8
    ]
    found += [f"score:{dtype}" for dtype in FLOATS]
    found += [f"parts:{dtype}:{block}" for dtype, block in itertools.product(FLOATS, BLOCKS)]
    found += [f"select:{columns}:{frames}" for columns, frames in rows()]
    kernels = "norm_scale_shift", "gated_add"
    found += [f"{kernel}:{width}:{dtype}" for kernel, width, dtype in itertools.product(kernels, WIDTHS, FLOATS)]
    found += [f"bias:{block}:{tokens}" for block, tokens in itertools.product(BLOCKS, (1536, 1560))]
    return [f"{cc}:{name}:{launch_of(name)}".removesuffix(":") for name in found]


def rows() -> list[tuple[int, int]]:
    """Every padded length of a row of scores with every padded number of frames that goes with it."""
    found = set()
    for frames in (2**power for power in range(13)):
        for blocks in (2**power for power in range(15)):
            if frames <= min(blocks, selection.MAX_FRAMES) and blocks <= selection.MAX_BLOCKS:
                constants = selection.select_constants(blocks, frames)
                found.add((constants["COLUMNS"], constants["FRAMES"]))
    return sorted(found)


def launch_of(name: str) -> str:
    """What the launcher chooses besides what the name says: tiles, warps, stages."""
    kernel, *rest = name.split(":")
    if kernel == "store":
        block = int(rest[2])
        options = store.launch_options(block, block, DTYPES[rest[0]].itemsize, "subs" in rest[3])
        return "{num_warps}x{STAGES}x{maxnreg}".format(**options)
    if kernel in ("score", "parts"):
        constants = constants_of(kernel, *rest)
        return f"{constants['TILE_Q']}x{constants['TILE_K']}"
    if kernel == "select":
        return str(selection.select_warps(int(rest[0])))
    if kernel == "bias":
        return ""
    options = modulation.launch_options(int(rest[0]))
    return f"{options['num_warps']}x{options['ROWS']}"


def constants_of(kernel: str, dtype: str, block: str = "0") -> dict[str, int]:
    itemsize = DTYPES[dtype].itemsize
    if kernel == "score":
        return selection.score_constants(HEAD_DIM, itemsize)
    return selection.part_constants(HEAD_DIM, itemsize, parts_of(dtype, int(block), 1))


def parts_of(dtype: str, block: int, frames: int) -> selection.Parts:
    size = block // store.SUB_BLOCKS
    return selection.Parts(heads(frames * triton.cdiv(TOKENS, size), DTYPES[dtype]), TOKENS, size, store.SUB_BLOCKS)


def compiled(name: str):
    """The one kernel that a variant is, compiled for the chip that Triton's active driver says is there."""
    _, kernel, *rest = name.split(":")
    call = {
        "store": call_store,
        "score": call_score,
        "parts": call_parts,
        "select": call_select,
        "norm_scale_shift": call_norm_scale_shift,
        "gated_add": call_gated_add,
        "bias": call_bias,
    }[kernel]
    with stopped_short() as found:
        call(*rest)
    (one,) = found
    return one


@contextlib.contextmanager
def stopped_short():
    """Launches compile and go no further; gives the list that what is compiled comes to."""
    found = []
    with contextlib.ExitStack() as stack:
        for room, launched in LAUNCHED:
            bound = Bound(getattr(room, launched), found)
            stack.enter_context(mock.patch.object(room, launched, bound))
        for room in (store, selection, modulation):
            stack.enter_context(mock.patch.object(room, "why_not", return_value=None))
        yield found


class Bound:
    """A kernel of which launches compile what they would run."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.found.append(self.kernel.warmup(*arguments, grid=grid, **options))


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(tokens, dtype):
    return empty(1, tokens, HEADS, HEAD_DIM, dtype=dtype)


def call_store(dtype, stored, block, parts, launch):
    dtype, stored, block = DTYPES[dtype], DTYPES[stored], int(block)
    what, *pooled = parts.split("+")
    per_frame, per_frame_parts = triton.cdiv(TOKENS, block), triton.cdiv(TOKENS, block // store.SUB_BLOCKS)
    scales = (
        [empty(1, SLOTS * per_frame, HEADS, dtype=torch.float32) for _ in range(2)] if stored != dtype else [None] * 2
    )
    ring = store.LayerMemory(
        heads(SLOTS * TOKENS, stored),
        heads(SLOTS * TOKENS, stored),
        *scales,
        key_means=heads(SLOTS * per_frame, dtype) if "means" in pooled else None,
        frame_means=heads(SLOTS, dtype) if "means" in pooled else None,
        arrivals=empty(1, SLOTS, HEADS, dtype=torch.int32) if "means" in pooled else None,
        value_means=heads(SLOTS * per_frame, dtype) if "values" in pooled else None,
        sub_means=heads(SLOTS * per_frame_parts, dtype) if "subs" in pooled else None,
    )
    q, k, v = (empty(1, FRAMES * TOKENS, HEADS * HEAD_DIM, dtype=dtype) for _ in range(3))
    cos, sin = (empty(FRAMES * TOKENS, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2))
    weight = empty(HEADS * HEAD_DIM, dtype=dtype)
    store.fused_store(
        q if what == "qkv" else None,
        k,
        v,
        q_weight=weight if what == "qkv" else None,
        k_weight=weight,
        eps=1e-6,
        cos=cos,
        sin=sin,
        ring=ring,
        slots=empty(FRAMES, dtype=torch.int32),
        tokens_per_frame=TOKENS,
        head_dim=HEAD_DIM,
        block=(block, block),
    )


def call_score(dtype, launch):
    means = heads(75, DTYPES[dtype])
    scores = empty(1, HEADS, 75, 150, dtype=torch.float32)
    selection.score_means(means, means, means, scores, with_frames=True)


def call_parts(dtype, block, launch):
    per_frame = triton.cdiv(TOKENS, int(block))
    scores = empty(1, HEADS, 75, SLOTS * (per_frame + 1), dtype=torch.float32)
    selection.score_parts(heads(75, DTYPES[dtype]), parts_of(dtype, int(block), SLOTS), scores, per_frame)


def call_select(columns, frames, launch):
    """Rows as long as they get, with means that nothing scores."""
    blocks, frames = int(columns), int(frames)
    means = heads(75, torch.bfloat16), heads(blocks, torch.bfloat16), heads(frames, torch.bfloat16)
    with mock.patch.object(selection, "score_means"):
        selection.select_blocks(*means, empty(frames, dtype=torch.int32), choose=2, kept=2)


def call_norm_scale_shift(width, dtype, launch):
    x = empty(1, FRAMES * TOKENS, int(width), dtype=DTYPES[dtype])
    scale, shift = empty(1, FRAMES, 6, int(width), dtype=DTYPES[dtype]).unbind(2)[:2]
    modulation.norm_scale_shift(x, scale, shift, 1e-6)


def call_gated_add(width, dtype, launch):
    x = empty(1, FRAMES * TOKENS, int(width), dtype=DTYPES[dtype])
    modulation.gated_add(x, x, empty(1, FRAMES, 6, int(width), dtype=DTYPES[dtype])[:, :, 2])


def call_bias(block, tokens):
    """As `block_sparse` prepares a tail; the attention itself is compiled with its own variants."""
    frames, block, tokens = FRAMES, int(block), int(tokens)
    per_frame = triton.cdiv(tokens, block)
    q, k = heads(frames * tokens, torch.bfloat16), heads(SLOTS * tokens, torch.bfloat16)
    means = heads(SLOTS * per_frame, torch.bfloat16)
    lists = (
        empty(1, HEADS, frames * per_frame, 60, dtype=torch.int32),
        empty(1, HEADS, frames * per_frame, dtype=torch.int32),
    )
    options = {"tokens_per_frame": tokens, "block_q": block, "block_k": block, "tail": (means, means)}
    with mock.patch.multiple(block_sparse, why_not=lambda *_: None, prepared=lambda *_: []):
        block_sparse.block_sparse_attention(q, k, k, *lists, **options)
