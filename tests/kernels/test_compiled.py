"""All kernels compiled for the supported chips, without a GPU: shared memory, spills, barriers, recompilation."""

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels import tuning

from ..support.compiled import SHARED_KIB, compile_all, versions_of

TENSOR_MEMORY = 512  # columns of sm_100
WIDE = {"block_q": 128, "block_k": 128, "tokens": 1536}
DENSE = {"block_q": 128, "stored": "int8", "dense": True}
CUT_BY_TMA = {"tma": True, "cut": True}
# The attention: by chip the most barriers and shuffles of the main loop per 64 keys, and the options of the call.
ATTENTION = [
    ({80: (9, 40), 86: (9, 40), 89: (9, 40), 90: (2, 8), 100: (5, 2), 120: (9, 40)}, {}),
    ({80: (9, 40), 86: (9, 40), 90: (2, 8), 100: (5, 2), 120: (9, 40)}, {"tail": True}),
    ({80: (8, 40), 90: (4, 8), 100: (6, 2), 120: (8, 40)}, {"stored": "int8"}),
    ({89: (8, 40), 100: (6, 2)}, {"stored": "fp8"}),
    ({120: (2, 24)}, {"stored": "fp8", "block_q": 128, "block_k": 128, "cut": True}),
    ({86: (16, 40), 120: (16, 40)}, {"dtype": "fp32"}),
    ({80: (2, 8), 90: (2, 8), 100: (6, 2), 120: (2, 8)}, WIDE),
    ({80: (8, 40), 90: (4, 8), 100: (6, 2), 120: (8, 40)}, WIDE | {"stored": "int8", "tail": True}),
    ({80: (36, 40), 100: (36, 40)}, {"block_q": 16, "block_k": 16, "tail": True}),
    ({90: (4, 8), 100: (7, 2), 120: (2, 24)}, DENSE),
    ({80: (2, 24)}, DENSE | {"cut": True}),
    ({80: (9, 40), 100: (5, 2), 120: (9, 40)}, {"tail": True, "cut": True}),
    ({100: (5, 2), 120: (9, 18)}, CUT_BY_TMA),
    ({90: (3, 8)}, CUT_BY_TMA | {"uneven": True}),
    ({90: (6, 8), 100: (8, 2)}, CUT_BY_TMA | {"stored": "int8"}),
    ({90: (3, 8)}, CUT_BY_TMA | {"tail": True}),
    ({90: (3, 8)}, WIDE | {"tma": True}),
    # What callers of their own may ask for.
    ({80: (9, 40)}, {"block_k": 128, "dtype": "fp16"}),
    ({80: (18, 40)}, {"block_q": 32, "block_k": 32, "dim": 96, "uneven": True}),
    ({90: (4, 8)}, {"block_q": 128, "dim": 64, "dtype": "fp16", "stored": "int8"}),
    ({90: (2, 8)}, {"block_q": 128, "tokens": 1600, "cut": True}),
    ({100: (5, 2)}, {"block_k": 128, "tokens": 1600}),
    ({120: (2, 8)}, {"block_q": 128, "block_k": 128, "dim": 64, "tail": True}),
    ({120: (2, 8)}, {"block_q": 256, "block_k": 256}),
]
# Most stack bytes per thread, all of them spills: none in 16 bits.
MAX_STACK = {"int8": 32, "fp8": 32, "fp32": 64}
# The other kernels: chips, call, options, most stack bytes.
OTHERS = [
    ((80, 86, 89, 90, 100, 120), "store", {}, 64),
    ((86,), "store", {"subs": True}, 64),
    ((86,), "store", {"stored": "int8", "block": 128}, 64),
    ((90,), "store", {"stored": "fp8", "block": 128, "values": True, "subs": True}, 64),
    ((90,), "store", {"dtype": "fp32", "with_q": False, "means": False}, 96),
    ((120,), "store", {"stored": "fp8", "block": 128, "with_q": False, "values": True, "subs": True}, 64),
    ((80, 90, 100, 120), "select", {"blocks": 512, "frames": 32}, 0),
    ((80, 90, 100, 120), "select", {"blocks": 8192, "frames": 256, "parts": False}, 16),
    ((120,), "select", {"blocks": 16384, "frames": 256}, 40),
    ((86,), "select", {"dtype": "fp32"}, 16),
    ((80, 90, 100, 120), "select", {"parts": True}, 0),
    ((90,), "select", {"parts": True, "dtype": "fp32"}, 16),
    ((80, 90, 100, 120), "modulation", {"width": 5120}, 0),
    ((90,), "modulation", {"width": 1536, "dtype": "fp32"}, 0),
    ((100,), "modulation", {"width": 256, "dtype": "fp16"}, 0),
]


def fits(row):
    """Assert that a kernel fits its chip, and the estimate that the choice of a launch goes by."""
    case = row["case"]
    assert row["shared"] <= SHARED_KIB[case["chip"]] * 1024, row
    assert row["tensor_memory"] <= TENSOR_MEMORY, row
    if row["kernel"] == "forward":
        assert row["shared"] <= row["counted"], row
        assert (row["tensor_maps"] > 0) == case.get("tma", False), row  # TMA copies exactly if they are asked for


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


def test_the_attention_fits_every_chip_and_waits_no_more_than_it_did(cache):
    most = {}
    for loops, options in ATTENTION:
        for chip, loop in loops.items():
            case = {"chip": chip, "call": "attention", **options}
            most[str(case)] = case, loop
    rows = compile_all([case for case, _ in most.values()], cache)
    assert {str(row["case"]) for row in rows if row["kernel"] == "forward"} == set(most)
    for row in rows:
        fits(row)
        case, (barriers, shuffles) = most[str(row["case"])]
        sixteen_bits = 8 if case["chip"] == 100 and case.get("tma") else 0  # the compiler stops at 168 registers
        assert row.get("stack", 0) <= MAX_STACK.get(case.get("stored") or case.get("dtype"), sixteen_bits), row
        assert row.get("barriers", 0) <= barriers, row
        assert row.get("shuffles", 0) <= shuffles, row


def test_the_other_kernels_fit_every_chip_and_stay_in_registers(cache):
    most = {}
    for chips, call, options, stack in OTHERS:
        for chip in chips:
            case = {"chip": chip, "call": call, **options}
            most[str(case)] = case, stack
    for row in compile_all([case for case, _ in most.values()], cache):
        fits(row)
        case, stack = most[str(row["case"])]
        assert row.get("stack", 0) <= stack, row
        if case["call"] == "modulation":
            assert row.get("registers", 0) <= 64, row
        if case["call"] == "store":  # a frame is pooled by the program that counts its last block
            assert row["counts_in_order"] == case.get("means", True), row


def test_what_the_tuner_may_prefer_fits_and_hardly_spills(cache):
    """On a chip of each generation. On sm_100 the compiler stops at 168 registers and spills a little."""
    asked = []
    for chip, block in ((80, 64), (90, 64), (100, 64), (120, 64), (90, 128), (100, 128)):
        kind = tuning.Kind(block, block, 128, torch.bfloat16, torch.bfloat16, (True, True))
        limit, tma = SHARED_KIB[chip] * 1024, chip >= 90
        default = tuning.default_launch(kind)
        first, *later = tuning.rounds(kind, limit, descriptors=tma)
        tiles = first(default)
        launches = tiles + (later[0](default) if tma else [])
        for launch in launches:
            if launch != default and (block == 64 or launch.tile_k == 128):
                options = {"block_q": block, "block_k": block, "launch": launch[:4], "tma": launch.descriptors}
                asked.append({"chip": chip, "call": "attention", **options})
    assert len(asked) >= 10
    for row in compile_all(asked, cache):
        fits(row)
        wide = row["case"]["launch"][1] == 128
        assert row.get("stack", 0) <= (128 if wide else 8) * (row["case"]["chip"] == 100), row


def test_one_compilation_serves_every_chunk_slot_and_length(cache):
    """Widths of every divisibility, caches and lists that begin anywhere, other batches, rings and frame sizes."""
    works = [{}, {"tail": True}, {"dense": True, "stored": "int8"}, {"stored": "int8"}, {"tma": True, "cut": True}]
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
        ]
        for parts in (False, True):
            choice = {"q_blocks": 3 * frames, "choose": frames % 3, "kept": slots, "parts": parts}
            cases.append({"call": "select", "block": 16, "frames": slots} | size | choice)
    once = "tail_bias", "combine", "_store", "_score", "_score_parts", "_select", "_norm_scale_shift", "_gated_add"
    versions = versions_of([{"chip": 90} | case for case in cases], cache)
    assert versions == dict.fromkeys(once, 1) | {"forward": len(works)}
