"""The block-sparse kernel compiled for every supported chip, without a GPU: shared memory, spills, recompilation."""

import pytest

pytest.importorskip("triton")

from .attention_variants import kind_of, launches, name_of
from .compiling import compile_all
from .resource_bounds import check
from .resources import SHARED_KIB


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


def test_what_the_tuner_may_prefer_fits_and_hardly_spills(tmp_path):
    """On a chip of each generation; `test_every_variant` says where all of it is held."""
    shapes = "64:64:128:bf16:bf16:1:sparse", "128:128:128:bf16:bf16:1:sparse"
    published, wide = (kind_of(*shape.split(":")) for shape in shapes)
    asked = [(cc, published, x) for cc in (80, 90, 100, 120) for x in launches(published, cc, SHARED_KIB[cc])]
    asked += [(cc, wide, x) for cc in (90, 100) for x in launches(wide, cc, SHARED_KIB[cc]) if x.tile_k == 128]
    names = [name_of(cc, kind, launch) for cc, kind, launch in asked if not launch.per_sm]
    rows = compile_all(names, tmp_path)
    assert len(rows) > 15
    for row in rows:
        check(row)


def test_one_compilation_serves_every_chunk_of_a_video(tmp_path):
    (row,) = compile_all(["chunks:90"], tmp_path)
    assert row == {"sparse bf16": 1, "tail bf16": 1, "dense int8": 1, "sparse int8": 1, "sparse bf16 tma cut": 2}
