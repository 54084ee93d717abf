"""The block-sparse kernel compiled for every supported chip, without a GPU: shared memory, spills, recompilation."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .resources import SHARED_KIB

pytest.importorskip("triton")

FP8_FROM = 89
# Stack bytes per thread, all of them register spills: none in 16 bits; seen with 8-bit keys 8, in float32 32, and
# 8 through descriptors with units cut on sm_100 and sm_103, where the compiler stops at 168 registers.
MAX_STACK = {"16-bit": 0, "16-bit tma cut": 8, "8-bit": 16, "fp32": 64}
MAX_STACK_WIDE = 144  # key tiles of 128 on sm_100: only where they are measured to be faster all the same


def covering_set():
    """Every chip with the published shape, and every kind of work and launch on one chip of each generation at least.

    Compiled code of sm_103 and sm_121 differs from that of sm_100 and sm_120 by its label: one shape of theirs does.
    """
    published = "64:64:128:bf16:bf16:1:sparse:"
    quantised, tail = "64:64:128:bf16:int8:1:sparse:", "64:64:128:bf16:bf16:1:tail:"
    per_generation = [
        "128:128:128:bf16:bf16:0:sparse:",
        "128:64:128:bf16:bf16:1:dense:",
        "128:64:128:bf16:int8:1:dense:",
        "128:128:128:bf16:int8:1:tail:",
    ]
    single = [
        *(f"{cc}:64:64:128:bf16:fp8:1:sparse:" for cc in (89, 90, 100, 120)),
        *(f"{cc}:64:64:128:fp32:fp32:1:sparse:" for cc in (86, 90, 120)),
        "80:64:128:128:fp16:fp16:1:sparse:",
        "90:128:64:64:fp16:int8:1:sparse:",
        "120:128:128:64:bf16:bf16:1:tail:",
        *(f"{cc}:{published}cut" for cc in (80, 86, 89)),
        *(f"{cc}:{published}tma cut" for cc in (90, 100, 120)),
        *(f"{cc}:{shape}tma cut" for cc in (90, 100) for shape in (tail, quantised)),
        f"120:{tail}cut",
        "90:128:128:128:bf16:bf16:0:sparse:tma",
    ]
    variants = [f"{cc}:{published}" for cc in SHARED_KIB]
    variants += [f"{cc}:{shape}" for cc in SHARED_KIB if cc not in (103, 121) for shape in (quantised, tail)]
    variants += [f"{cc}:{shape}" for cc in (80, 90, 100, 120) for shape in per_generation]
    return variants + single


def exhaustive_set():
    """Everything `auto` can pick with blocks of 64 and 128, the tuner's other tiles apart: an hour on two cores."""
    dtypes = ["bf16:bf16", "bf16:int8", "bf16:fp8", "fp16:fp16", "fp16:int8", "fp16:fp8", "fp32:fp32", "fp32:int8"]
    shapes = itertools.product(
        SHARED_KIB, (64, 128), (64, 128), (64, 128), dtypes, (0, 1), ("sparse", "tail", "dense"), ("", "tma cut")
    )
    return [
        ":".join(map(str, shape)) for shape in shapes if can_be_picked(shape[0], shape[4].split(":")[1], *shape[6:])
    ]


def can_be_picked(cc, stored, variant, how):
    plain = stored not in ("int8", "fp8") and variant != "tail"
    if stored == "fp8" and cc < FP8_FROM:
        return False
    return "tma" not in how or (cc >= 90 and (plain or cc < 120))


def compile_all(arguments, cache):
    """One row per argument; two processes share the work."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(share):
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("ahead_of_time.py"), *share],
            env=environment | {"TRITON_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            timeout=7200,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(run, (arguments[::2], arguments[1::2])) for row in rows]


def test_every_variant_fits_every_chip_without_spills(tmp_path, capsys):
    variants = exhaustive_set() if os.environ.get("LIGHTFORCING_COMPILE_ALL") else covering_set()
    rows = compile_all(variants, tmp_path)
    assert sorted(row["variant"] for row in rows) == sorted(variants)
    with capsys.disabled():
        print(
            "\n  sm  q×k block ×dim   q       kv    frames  variant launch   tile    warps stages  shared KiB  "
            "registers  stack"
        )
        for row in rows:
            cc, block_q, block_k, dim, dtype, stored, ragged, variant, how = row["variant"].split(":")
            print(
                f"{cc:>4s} {block_q:>4s}×{block_k:<4s} {dim:>6s}   {dtype:6s}  {stored:5s} "
                f"{'ragged' if ragged == '1' else 'whole':7s} {variant:7s} {how:8s} "
                f"{row['tile_q']:>3d}×{row['tile_k']:<4d} {row['num_warps']:5d} {row['num_stages']:6d} "
                f"{row['shared'] / 1024:11.1f} "
                f"{row.get('registers', '?'):>10} {row.get('stack', '?'):>6}"
            )
    for row in rows:
        _, _, _, _, dtype, stored, _, _, how = row["variant"].split(":")
        kind = "fp32" if dtype == "fp32" else "8-bit" if stored in ("int8", "fp8") else "16-bit"
        if kind == "16-bit" and row["cc"] // 10 == 10 and how == "tma cut":
            kind = "16-bit tma cut"
        assert row["shared"] <= SHARED_KIB[row["cc"]] * 1024, row
        assert row["shared"] <= row["estimate"], row  # what the choice of launch parameters goes by
        assert row.get("stack", 0) <= MAX_STACK[kind], row
        assert (row["tensor_maps"] > 0) == ("tma" in how), row  # copies by TMA exactly where they were asked for


def test_tuners_other_tiles_fit_and_hardly_spill(tmp_path):
    """What a measurement on the card may prefer to the default, on a chip of each generation."""
    published, wide = "64:64:128:bf16:bf16:1:sparse", "128:128:128:bf16:bf16:1:sparse"
    chips = [f"{cc}:{published}" for cc in (80, 90, 100, 120)] + [f"{cc}:{wide}" for cc in (90, 100)]
    rows = compile_all([f"tiles:{chip}" for chip in (*chips, "120:64:64:128:bf16:int8:1:sparse")], tmp_path)
    assert len(rows) > 20
    for row in rows:
        assert row["shared"] <= min(row["estimate"], SHARED_KIB[row["cc"]] * 1024), row
        spills = row["cc"] == 100 and row["tile_k"] == 128
        assert row.get("stack", 0) <= (MAX_STACK_WIDE if spills else MAX_STACK["8-bit"]), row


def test_one_compilation_serves_every_chunk_of_a_video(tmp_path):
    (row,) = compile_all(["chunks:90"], tmp_path)
    assert row == {"sparse bf16": 1, "tail bf16": 1, "dense bf16": 1, "sparse int8": 1, "sparse bf16 tma cut": 2}
