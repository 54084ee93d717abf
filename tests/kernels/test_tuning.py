"""Launch parameters: the candidates, and how units are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import tuning
from lightforcing.kernels.tuning import Kind, Launch, candidates, cut, default_launch, rounds, shared_bytes


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


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_candidates_are_few_divide_the_blocks_and_fit(shared_kib):
    for each in KINDS:
        launches = candidates(each, shared_kib * 1024)
        assert launches[0] == default_launch(each)
        assert len(set(launches)) == len(launches) <= 7
        for launch in launches:
            assert each.block_q % launch.tile_q == each.block_k % launch.tile_k == 0
            assert shared_bytes(each, launch) <= shared_kib * 1024
            assert launch.num_warps * 32 >= launch.tile_q  # 128 rows on 4 warps spill


def test_tiles_that_are_known_to_spill_are_not_timed():
    for each in KINDS:
        for descriptors in (False, True):
            for launch in rounds(each, 227 * 1024, descriptors=descriptors)[0](default_launch(each)):
                assert each.dtype != torch.float32 or (launch.tile_q <= 32 and launch.tile_k <= 32)
                assert launch.tile_k <= 64 or (descriptors and each.stored == each.dtype and not each.tail)
    wide = kind(block_q=128, block_k=128)
    assert any(launch.tile_k == 128 for launch in rounds(wide, 227 * 1024, descriptors=True)[0](default_launch(wide)))


@pytest.mark.parametrize(
    "small", [kind(dtype=torch.float32), kind(block_q=32), kind(block_k=16), kind(head_dim=32), kind(head_dim=96)]
)
def test_what_is_not_worth_a_users_compilations_is_only_cut(small):
    default = default_launch(small)
    first, last = rounds(small, 227 * 1024, descriptors=True)
    assert first(default) == [default]
    assert last(default) == [default._replace(per_sm=1), default._replace(per_sm=2)]


def test_rounds_end_with_tma_where_there_is_any_and_with_cuts():
    best = Launch(64, 64, 4, 4)
    for each, descriptors, tma in [
        (kind(), True, [best._replace(descriptors=True, num_stages=stages) for stages in (2, 3)]),
        (kind(), False, None),
        (kind(head_dim=24), True, None),
    ]:
        first, *others = rounds(each, 227 * 1024, descriptors=descriptors)
        assert first(best) == candidates(each, 227 * 1024)
        assert [after(best) for after in others] == [
            *([tma] if tma else []),
            [best._replace(per_sm=1), best._replace(per_sm=2)],
        ]
    (_, through, _) = rounds(kind(), 99 * 1024, descriptors=True)
    assert through(best) == [best._replace(descriptors=True, num_stages=2)]  # three stages do not fit the chip


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
