"""The block-sparse kernel compiled for every supported chip, without a GPU: shared memory, spills, recompilation.

`LIGHTFORCING_COMPILE_ALL=FILE pytest` also compiles everything that a run can pick, which takes hours of one core; rows
are kept in FILE, where an interrupted run goes on.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lightforcing.kernels import tuning

from .attention_variants import CHIPS, is_timed, kind_of, kinds, launch_of, launches, name_of, runs_on
from .resource_table import by_chip
from .resources import SHARED_KIB

EVERYTHING = "LIGHTFORCING_COMPILE_ALL"
TENSOR_MEMORY = 512  # columns of sm_100
# Stack bytes per thread, all of them register spills, of the default's tiles: none in 16 bits; seen in 8 bits 24 and 32
# with units cut (fp8 in blocks of 128 on sm_120), in float32 56, and 8 through descriptors with units cut on sm_100 and
# sm_103, where the compiler stops at 168 registers.
MAX_STACK = {"16-bit": 0, "16-bit tma cut": 8, "8-bit": 32, "fp32": 64}
MAX_STACK_WIDE = 144  # key tiles of 128 on sm_100: only where they are measured to be faster all the same


def covering_set():
    """Every chip with the published shape, and every kind of work and launch on one chip of each generation at least.

    PTX of sm_103 and sm_121 differs from that of sm_100 and sm_120 by its label: one shape of theirs does.
    """
    published = "64:64:128:bf16:bf16:1:sparse:"
    quantised, tail = "64:64:128:bf16:int8:1:sparse:", "64:64:128:bf16:bf16:1:tail:"
    per_generation = [
        "128:128:128:bf16:bf16:0:sparse:",
        "128:64:128:bf16:int8:1:dense:",
        "128:128:128:bf16:int8:1:tail:",
        "16:16:128:bf16:bf16:1:tail:",
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
        "90:128:64:128:bf16:bf16:q:sparse:cut",
        "100:64:128:128:bf16:bf16:k:sparse:",
        "120:256:256:128:bf16:bf16:1:sparse:",
        "80:32:32:96:bf16:bf16:1:sparse:uneven",
        *(f"{cc}:{published}lse" for cc in (80, 86, 90, 100, 120)),
        f"90:{published}tma cut uneven lse",
        *(f"{cc}:{tail}cut lse" for cc in (80, 100, 120)),
        *(f"{cc}:{quantised}lse" for cc in (80, 90, 120)),
        "80:128:64:128:bf16:int8:1:dense:cut lse",
    ]
    variants = [f"{cc}:{published}" for cc in SHARED_KIB]
    variants += [f"{cc}:{shape}" for cc in SHARED_KIB if cc not in (103, 121) for shape in (quantised, tail)]
    variants += [f"{cc}:{shape}" for cc in (80, 90, 100, 120) for shape in per_generation]
    return variants + single


def in_a_process(script, *arguments, cache, timeout=600):
    """Run a script of this folder where kernels are compiled and not interpreted; its rows, if it prints any."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Line numbers change no code, and without them it is made faster.
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_all(arguments, cache):
    """One row per argument; two processes share the work."""
    with ThreadPoolExecutor(2) as pool:
        shares = (arguments[::2], arguments[1::2])
        rows = pool.map(lambda share: in_a_process("ahead_of_time.py", *share, cache=cache), shares)
        return [row for share in rows for row in share]


def check(row):
    """A row of the default launch, or of that cut or by TMA: it fits its chip and stays in registers."""
    kind = in_bits(row)
    if kind == "16-bit" and row["cc"] // 10 == 10 and row["descriptors"] and row["per_sm"]:
        kind = "16-bit tma cut"
    check_fits(row)
    assert row.get("stack", 0) <= MAX_STACK[kind], row


def in_bits(row):
    _, _, _, _, dtype, stored, *_ = row["variant"].split(":")
    return "fp32" if dtype == "fp32" else "8-bit" if stored in ("int8", "fp8") else "16-bit"


def check_fits(row):
    _, *shape, how = row["variant"].split(":")
    kind = kind_of(*shape)
    estimate = tuning.shared_bytes(kind, launch_of(kind, how))  # what the choice of launch parameters goes by
    assert row["shared"] <= min(estimate, SHARED_KIB[row["cc"]] * 1024), (row, estimate)
    assert (row["tensor_memory"] or 0) <= TENSOR_MEMORY, row
    assert (row["tensor_maps"] > 0) == row["descriptors"], row  # copies by TMA exactly where they were asked for


def test_every_variant_fits_every_chip_without_spills(tmp_path, capsys):
    variants = covering_set()
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
        check(row)


@pytest.mark.skipif(not os.environ.get(EVERYTHING), reason=f"takes hours; {EVERYTHING}=FILE keeps its rows in FILE")
def test_everything_that_a_run_can_pick_fits_every_chip(tmp_path, capsys):
    file = Path(os.environ[EVERYTHING])
    in_a_process("every_variant.py", str(file), cache=tmp_path, timeout=None)
    found = {row["variant"]: row for row in map(json.loads, file.read_text().splitlines())}
    rows = [
        found[name_of(cc, kind, launch)]
        for kind in kinds()
        for cc in CHIPS
        if runs_on(kind, cc)
        for launch in launches(kind, cc, SHARED_KIB[cc])
    ]
    with capsys.disabled():
        print("", *by_chip(rows, is_timed, SHARED_KIB), sep="\n")
    for row in rows:
        check_fits(row) if is_timed(row) else check(row)


def test_tuners_other_tiles_fit_and_hardly_spill(tmp_path):
    """What a measurement on the card may prefer to the default, on a chip of each generation."""
    published, wide = "64:64:128:bf16:bf16:1:sparse", "128:128:128:bf16:bf16:1:sparse"
    chips = [f"{cc}:{published}" for cc in (80, 90, 100, 120)] + [f"{cc}:{wide}" for cc in (90, 100)]
    chips += ["120:64:64:128:bf16:int8:1:sparse", "100:128:128:128:fp32:fp32:1:sparse"]
    rows = compile_all([f"tiles:{chip}" for chip in chips], tmp_path)
    assert len(rows) > 20
    for row in rows:
        check_fits(row)
        spills = row["cc"] == 100 and row["tile_k"] == 128
        assert row.get("stack", 0) <= (MAX_STACK_WIDE if spills else MAX_STACK[in_bits(row)]), row


def test_the_kernel_that_prepares_a_tail_fits_every_chip(tmp_path):
    names = [f"bias:{cc}:{block_k}:{tokens}" for cc in CHIPS for block_k, tokens in ((16, 1536), (64, 1560))]
    rows = in_a_process("ahead_of_time.py", *names, cache=tmp_path)
    assert len(rows) == len(names)
    for row in rows:
        assert row["shared"] <= 1024, row
        assert row.get("stack", 0) == 0, row


def test_one_compilation_serves_every_chunk_of_a_video(tmp_path):
    (row,) = compile_all(["chunks:90"], tmp_path)
    assert row == {"sparse bf16": 1, "tail bf16": 1, "dense int8": 1, "sparse int8": 1, "sparse bf16 tma cut": 2}


def test_chips_of_one_family_are_given_the_same_ptx(tmp_path):
    """What compiling everything relies on: PTX is made once per family, and only its label is changed."""
    names = ["ptx:80 86 89:128:128:128:bf16:int8:1:tail:cut", "ptx:100 103:64:64:128:bf16:bf16:1:sparse:tma cut"]
    for row in compile_all(names, tmp_path):
        assert len(row) >= 2
        assert len(set(row.values())) == 1, row
