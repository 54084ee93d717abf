"""All kernels compiled for the supported chips, without a GPU: shared memory, spills, barriers, recompilation."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton

from lightforcing.kernels import block_sparse, tuning

from ..support.compiled import SHARED_KIB, compile_all, versions_of

TENSOR_MEMORY = 512  # columns of sm_100
MMA_SYNC = (80, 86, 89, 120)
# More stack bytes that an older Triton may take, whose loops are only bounded for mma.sync.
OLDER = 512 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0
WIDE = {"block": (128, 128), "tokens": 1536}
# The most barriers and shuffles of the attention's main loop per 64 keys, by chip.
LOOPS = dict.fromkeys(MMA_SYNC, (4, 16)) | {90: (4, 8), 100: (6, 2)}
# The attention: chips, options of the call, and such bounds if they are others.
ATTENTION = [
    (SHARED_KIB, {}, None),
    (SHARED_KIB, {"ways": "tail cut"}, None),
    (MMA_SYNC, {"tokens": 1536}, None),
    ((80, 90, 100, 120), {"stored": "int8"}, None),
    ((86,), {"stored": "int8", "ways": "tail cut"}, None),
    ((89, 90, 100, 120), {"stored": "fp8"}, None),
    ((80, 89, 90, 120), {"stored": "int8", "ways": "narrow"}, (6, 16)),
    ((120,), {"stored": "int8", "ways": "tail narrow"}, (6, 16)),
    ((89, 120), {"stored": "fp8", "ways": "narrow"}, (4, 48)),
    ((100,), {"stored": "fp8", "ways": "narrow"}, None),
    ((89, 120), {"stored": "fp8", "ways": "tail cut narrow"}, (4, 48)),
    ((86, 120), {"dtype": "fp32"}, (16, 40)),
    ((80, 90, 100, 120), WIDE, None),
    ((90, 100), WIDE | {"stored": "int8", "ways": "tail"}, None),
    ((120,), {"stored": "fp8", "block": (128, 128), "ways": "cut"}, (4, 40)),
    ((80,), {"block": (16, 16), "ways": "tail"}, (36, 40)),
    ((80, 90), {"block": (128, 64), "stored": "int8", "ways": "dense cut"}, (4, 40)),
    ((100,), {"ways": "tma cut"}, (6, 2)),
    ((90,), {"ways": "tma cut uneven"}, None),
    ((90, 100), {"ways": "tma cut", "stored": "int8"}, (8, 8)),
    ((90,), {"ways": "tma tail"}, None),
    # What callers of their own may ask for.
    ((80,), {"block": (64, 128), "dtype": "fp16"}, None),
    ((80,), {"block": (32, 32), "dim": 96, "ways": "uneven"}, (18, 40)),
    ((90,), {"block": (128, 64), "dim": 64, "dtype": "fp16", "stored": "int8"}, None),
    ((120,), {"block": (256, 256), "dim": 64, "ways": "tail"}, (4, 40)),
]
# Most stack bytes per thread, all of them spills: none in 16 bits.
MAX_STACK = {"int8": 32, "fp8": 32, "fp32": 64}
# The other kernels: chips, call, options, most stack bytes.
OTHERS = [
    ((80, 86, 89, 90, 100, 120), "store", {}, 0),
    ((86,), "store", {"subs": True}, 0),
    ((86,), "store", {"stored": "int8", "block": 128}, 0),
    ((90,), "store", {"stored": "fp8", "block": 128, "values": True, "subs": True}, 8),
    ((90,), "store", {"dtype": "fp32", "with_q": False, "means": False}, 0),
    ((120,), "store", {"stored": "fp8", "block": 128, "with_q": False, "values": True, "subs": True}, 64),
    ((80, 90, 100, 120), "select", {"blocks": 512, "frames": 32}, 0),
    ((80, 90, 100, 120), "select", {"blocks": 8192, "frames": 256}, 16),
    ((120,), "select", {"blocks": 16384, "frames": 256}, 32),
    ((86,), "select", {"dtype": "fp32"}, 8),
    ((80, 90, 100, 120), "select", {"parts": True}, 0),
    ((90,), "select", {"parts": True, "dtype": "fp32"}, 0),
    ((80, 86, 89, 90, 100, 120), "channel_norm", {}, 0),
    ((80, 90, 100, 120), "channel_norm", {"channels": 384, "frames": 3, "height": 60, "width": 104}, 0),
    ((90,), "channel_norm", {"channels": 96, "dtype": "fp32"}, 0),
    ((80, 90, 100, 120), "modulation", {"width": 5120}, 0),
    ((90,), "modulation", {"width": 1536, "dtype": "fp32"}, 0),
    ((100,), "modulation", {"width": 256, "dtype": "fp16"}, 0),
    ((89, 90, 100, 120), "fp8", {"width": 8192}, 8),
    ((120,), "fp8", {"width": 1536, "dtype": "fp16"}, 8),
]


# Chips and blocks for which the launches that the tuner may prefer are compiled: one of each generation.
TUNED = [(80, 64), (90, 64), (100, 64), (120, 64), (90, 128), (100, 128)]


def cases_of(chip):
    """Calls for a chip with their bounds: stack bytes, barriers, shuffles."""
    for chips, options, loop in ATTENTION:
        if chip in chips and (block_sparse.TensorDescriptor or "tma" not in options.get("ways", "")):
            # On sm_100 the compiler stops at 168 registers and spills a little.
            sixteen_bits = 8 if chip == 100 and "tma" in options.get("ways", "") else 0
            stack = MAX_STACK.get(options.get("stored") or options.get("dtype"), sixteen_bits)
            bounds = (math.inf, math.inf) if OLDER and chip not in MMA_SYNC else loop or LOOPS[chip]
            yield {"call": "attention"} | options, (stack, *bounds)
    for chips, call, options, stack in OTHERS:
        if chip in chips:
            yield {"call": call} | options, (stack, 0, 0)
    for block in (block for tuned, block in TUNED if tuned == chip):
        default, launches = tuned_launches(chip, block)
        for launch in launches:
            if launch != default and (block == 64 or launch.tile_k == 128):
                options = {"block": (block, block), "launch": launch, "ways": "tma" * launch.descriptors}
                stack = (128 if launch.tile_k == 128 else 8) * (chip == 100)
                yield {"call": "attention"} | options, (stack, math.inf, math.inf)


def tuned_launches(chip, block):
    """The default launch, and those that the tuner times for tiles and, where there is TMA, for descriptors."""
    kind = tuning.Kind(block, block, 128, torch.bfloat16, torch.bfloat16, (True, True))
    capability = divmod(chip, 10)
    default = tuning.default_launch(kind, capability)
    descriptors = chip in (90, 100) and block_sparse.TensorDescriptor is not None
    first, *later = tuning.rounds(kind, capability, descriptors=descriptors)
    return default, [default._replace(**change) for change in first + (later[0] if descriptors else [])]


@pytest.mark.parametrize("chip", SHARED_KIB)
def test_kernels_fit_the_chip_stay_in_registers_and_wait_no_more_than_they_did(chip, tmp_path):
    cases, bounds = zip(*cases_of(chip), strict=True)
    for case, (stack, barriers, shuffles), found in zip(cases, bounds, compile_all(chip, cases, tmp_path), strict=True):
        assert found
        for row in found:
            known = "launch" not in case  # a launch that the tuner tries may not fit
            assert row["shared"] <= SHARED_KIB[chip] * 1024 or not known, case
            assert row["tensor_memory"] <= TENSOR_MEMORY, case
            assert row.get("stack", 0) <= stack + OLDER, case
            assert row.get("barriers", 0) <= barriers, case
            assert row.get("shuffles", 0) <= shuffles, case
            if row["kernel"] == "forward":
                assert (row["tensor_maps"] > 0) == ("tma" in case.get("ways", "")), case
                # No slow conversion of fp8, and no values that are read byte by byte.
                assert not any(row.get("slow", ())) or barriers == math.inf, case
            if row["kernel"] == "forward" and known and chip in MMA_SYNC and not case.keys() & {"block", "dtype"}:
                # Two programs fit on a multiprocessor, warps have rows of their own, and a whole tile is on its way.
                assert 2 * (row["shared"] + 1024) <= (SHARED_KIB[chip] + 1) * 1024, case
                assert set(row["warps"]) == {"4, 1"}, case
                assert row["ahead"] >= 2, case
            if case["call"] in ("modulation", "channel_norm", "fp8"):
                assert row.get("registers", 0) <= 64, case
            if case["call"] == "store":  # a frame is pooled by the program that counts its last block
                assert row["counts_in_order"] == case.get("means", True), case


@pytest.mark.skipif(block_sparse.TensorDescriptor is None, reason="Triton before 3.4 has no tensor descriptors")
def test_one_compilation_serves_every_chunk_slot_and_length(tmp_path):
    """Widths of every divisibility, caches and lists that begin anywhere, other batches, rings and frame sizes."""
    works = [{}, {"ways": "tail"}, {"ways": "dense", "stored": "int8"}, {"stored": "int8"}, {"ways": "tma cut"}]
    cases = [
        {"call": "attention", "heads": 2, "frames": 3 * chunk, "width": 8 * chunk + chunk % 3, "first_slot": chunk % 2}
        | work
        for work in works
        for chunk in range(1, 8)
    ]
    for batch, frames, slots, tokens in (
        (1, 1, 21, 48),
        (1, 3, 21, 48),
        (1, 16, 21, 48),
        (1, 3, 7, 48),
        (2, 3, 12, 48),
        (1, 3, 21, 52),
    ):
        size = {"batch": batch, "tokens": tokens}
        cases += [
            {"call": "store", "block": 16, "frames": frames, "slots": slots} | size,
            {"call": "modulation", "frames": frames} | size,
            {"call": "channel_norm", "batch": batch, "frames": frames, "height": tokens, "width": 4 * slots},
        ]
        for parts in (False, True):
            choice = {"q_blocks": 3 * frames, "choose": frames % 3, "kept": slots, "parts": parts}
            cases.append({"call": "select", "block": 16, "frames": slots} | size | choice)
    once = "tail_bias", "combine", "_store", "_score", "_score_parts", "_select", "_norm_silu"
    versions = versions_of(90, cases, tmp_path)
    kinds = {"forward": len(works), "_add_norm": 5}  # two norms, and three kinds of sums
    assert versions == dict.fromkeys(once, 1) | kinds
