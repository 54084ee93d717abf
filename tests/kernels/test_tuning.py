"""Launch parameters: the candidates, and how units are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import tuning
from lightforcing.kernels.tuning import Kind, Launch, candidates, cut, default_launch, rounds


def kind(block_q=64, block_k=64, head_dim=128, dtype=torch.bfloat16, stored=None, **rest):
    return Kind(block_q, block_k, head_dim, dtype, stored or dtype, (False, False), **rest)


KINDS = [
    kind(block_q, block_k, dim, dtype, stored, tail=tail)
    for block_q in (16, 64, 128, 256)
    for block_k in (16, 64, 128)
    for dim in (24, 64, 128)
    for dtype, stored in ((torch.bfloat16, None), (torch.float16, torch.int8), (torch.float32, None))
    for tail in (False, True)
]


CHIPS = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("chip", CHIPS)
def test_candidates_are_few_divide_the_blocks_and_leave_out_tiles_that_spill(chip):
    for each in KINDS:
        launches = candidates(each, chip, wide=chip[0] in (9, 10))
        assert launches[0] == default_launch(each, chip)
        assert len(set(launches)) == len(launches) <= 6
        for launch in launches:
            assert each.block_q % launch.tile_q == each.block_k % launch.tile_k == 0
            assert launch.num_warps * 32 >= launch.tile_q  # 128 rows on 4 warps spill
            assert each.dtype != torch.float32 or (launch.tile_q <= 32 and launch.tile_k <= 32)
            assert launch.tile_k <= 64 or (chip[0] in (9, 10) and each.stored == each.dtype and not each.tail)
            rows_of_halves = launch.tile_q == 64 or (launch.tile_q > 64 and each.stored != each.dtype)
            assert launch.halves == (chip[0] in (8, 12) and rows_of_halves and each.head_dim == 128)
            assert not launch.halves or launch.tile_k <= 32
    assert any(x.tile_k == 128 for x in candidates(kind(128, 128), chip)) == (chip[0] in (9, 10))


@pytest.mark.parametrize(
    "small", [kind(dtype=torch.float32), kind(block_q=32), kind(block_k=16), kind(head_dim=32), kind(head_dim=96)]
)
def test_what_is_not_worth_a_users_compilations_is_only_cut(small):
    first, last = rounds(small, (9, 0), descriptors=True)
    assert [Launch(**change) for change in first] == [default_launch(small, (9, 0))]
    assert last == [{"per_sm": 1}, {"per_sm": 2}]


def test_rounds_end_with_tma_and_8_bit_products_if_there_are_any_and_with_cuts():
    tma = [{"descriptors": True, "num_stages": 2}, {"descriptors": True, "num_stages": 3}]
    narrow, cuts = [{"narrow": True}], [{"per_sm": 1}, {"per_sm": 2}]
    int8, fp8 = kind(stored=torch.int8), kind(stored=torch.float8_e4m3fn)
    for each, chip, descriptors, want in [
        (kind(), (9, 0), True, [tma, cuts]),
        (kind(), (9, 0), False, [cuts]),
        (kind(head_dim=24), (9, 0), True, [cuts]),
        (int8, (12, 0), False, [narrow, cuts]),
        (int8, (9, 0), True, [tma, narrow, cuts]),
        (int8, (10, 0), False, [cuts]),
        (fp8, (12, 0), False, [narrow, cuts]),
        (fp8, (10, 0), True, [tma, narrow, cuts]),
        (fp8, (9, 0), True, [tma, cuts]),
    ]:
        first, *others = rounds(each, chip, descriptors=descriptors)
        assert [Launch(**change) for change in first] == candidates(each, chip, wide=descriptors)
        assert others == want


@given(units=st.integers(1, 2000), at_once=st.integers(0, 400), blocks=st.integers(1, 600))
def test_cuts_fill_the_last_wave_and_no_more(units, at_once, blocks):
    whole, parts = cut(units, at_once, blocks)
    assert parts >= 1
    if parts == 1:
        assert whole == units
        rest = units % at_once if at_once else 0
        assert not rest or 2 * rest > at_once or blocks < 2 * tuning.MIN_BLOCKS  # what else could be cut
    else:
        rest = units - whole
        assert whole % at_once == 0
        assert 0 < rest < at_once
        assert rest * parts <= at_once
        assert blocks // parts >= tuning.MIN_BLOCKS


def test_the_published_shape_is_cut_as_the_arithmetic_says():
    assert cut(864, 264, 60) == (792, 3)
    assert cut(864, 132, 60) == (864, 1)  # 72 of 132: no two parts of each fit into one wave
    assert cut(432, 132, 60) == (396, 3)
    assert cut(864, 0, 60) == (864, 1)
