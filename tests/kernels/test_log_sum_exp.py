"""The block-sparse kernel's log-sum-exp: every variant against float64, and what it is for: adding parts up."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import block_sparse, tuning
from lightforcing.kernels.block_sparse import block_sparse_attention, dense_attention

from .attention_cases import (
    CASES,
    DEVICE,
    EIGHT_BIT,
    HOW,
    Case,
    brute_force_and_lse,
    every_query_block_reads,
    launched,
    poisoned,
)

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) is −inf, as it should be


def check(case, got, want):
    """Scores are of float32 sums over exact products in every dtype, so one bound serves all."""
    (out, lse), (want_out, want_lse) = got, want
    case.check(out, want_out)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)


@given(case=CASES, with_tail=st.booleans(), uneven=st.booleans(), how=HOW)
def test_every_variant_equals_brute_force(case, with_tail, uneven, how):
    means = case.means if with_tail else None
    want = brute_force_and_lse(case.q, *case.exact, case.mask, case.tokens_per_frame, case.block, means)
    options = case.options() | {"tail": means, "uneven": uneven}
    with launched(**how), poisoned():
        got = block_sparse_attention(case.q, *case.stored, case.blocks, case.counts, return_lse=True, **options)
        alone = block_sparse_attention(case.q, *case.stored, case.blocks, case.counts, **options)
    check(case, got, want)
    assert torch.equal(got[0], alone)  # asking for more changes nothing of the rest


@given(case=CASES, how=HOW)
def test_dense_mode_equals_brute_force(case, how):
    want = brute_force_and_lse(case.q, *case.exact, torch.ones_like(case.mask), case.tokens_per_frame, case.block)
    with launched(**how), poisoned():
        got = dense_attention(case.q, *case.stored, return_lse=True, **case.options())
    check(case, got, want)


# Blocks of 128 in tiles of 64: ragged ends in the first and in the second tile, tiles of nothing but padding.
@pytest.mark.parametrize("tokens_per_frame", [128, 180, 250])
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("with_tail", [False, True])
def test_units_cut_into_parts_and_blocks_larger_than_a_tile_equal_brute_force(tokens_per_frame, stored, with_tail):
    case = Case(tokens_per_frame, (128, 128), 2, 1, 1, 2, 16, torch.float16, stored, seed=tokens_per_frame)
    means = case.means if with_tail else None
    want = brute_force_and_lse(case.q, *case.exact, case.mask, tokens_per_frame, case.block, means)
    units = case.counts.numel() * (2 if with_tail else 1)  # beside a tail a tile has 64 rows
    for per_sm in (0, units - 1, 2 * units + 1):  # none, one unit or every unit into parts
        with launched(per_sm=per_sm) as calls, poisoned():
            got = block_sparse_attention(
                case.q, *case.stored, case.blocks, case.counts, tail=means, return_lse=True, **case.options()
            )
        check(case, got, want)
        assert len(calls[0]) == (2 if per_sm else 1)


def test_parts_that_find_no_key_change_nothing():
    """Of 6 parts one gets the only listed block; the tail leaves parts without a mean, or with listed ones only."""
    case = Case(16, (16, 16), 1, 5, 1, 1, 32, torch.float32, None, seed=0)
    blocks, counts = every_query_block_reads([4], 1, 1, 1)
    mask = torch.zeros_like(case.mask)
    mask[..., 4] = True
    for means in (None, case.means):
        want = brute_force_and_lse(case.q, *case.exact, mask, 16, case.block, means)
        with launched(per_sm=6), poisoned(), mock.patch.object(tuning, "cut", return_value=(0, 6)):
            got = block_sparse_attention(
                case.q, *case.stored, blocks, counts, tail=means, return_lse=True, **case.options()
            )
        check(case, got, want)


@pytest.mark.parametrize("parts", [1, 6])
def test_empty_lists_give_zeros_and_minus_infinity(parts):
    case = Case(16, (16, 16), 1, 5, 1, 1, 32, torch.float32, None, seed=0)
    blocks, counts = every_query_block_reads([4], 1, 1, 1)
    with launched(), poisoned(), mock.patch.object(tuning, "cut", return_value=(0, parts)):
        out, lse = block_sparse_attention(
            case.q, *case.stored, blocks, torch.zeros_like(counts), return_lse=True, **case.options()
        )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_large_scores_do_not_overflow():
    q, k, v = (torch.randn(1, 32, 1, 64, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
    q, k = q * 40, k * 40  # scores in the thousands
    blocks, counts = every_query_block_reads([0, 1], 1, 1, 2)
    _, lse = block_sparse_attention(
        q, k, v, blocks, counts, tokens_per_frame=32, block_q=16, block_k=16, return_lse=True
    )
    want = torch.einsum("blhd,bmhd->blhm", q.double(), k.double()).div(8).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, atol=0, rtol=1e-6)


@pytest.mark.parametrize("stored", [None, *EIGHT_BIT])
@pytest.mark.parametrize("with_tail", [False, True])
def test_parts_of_the_keys_add_up_to_all_of_them(stored, with_tail):
    """Two calls that each have some frames of one cache; some query blocks read keys of one of them, or of none."""
    case = Case(50, (32, 16), 1, 3, 2, 2, 32, torch.float32, stored, seed=5)
    want = brute_force_and_lse(case.q, *case.exact, case.mask, 50, case.block, case.means if with_tail else None)
    parts = []
    for tokens, blocks in ((slice(0, 50), slice(0, 4)), (slice(50, 200), slice(4, 16))):
        mask = case.mask[..., blocks]
        ids = torch.where(mask, torch.arange(mask.shape[-1]), 10**6).sort(-1).values.int().to(DEVICE)
        beside = {"scales": case.scales and tuple(x[:, blocks] for x in case.scales)}
        beside["tail"] = tuple(x[:, blocks] for x in case.means) if with_tail else None
        options = case.options() | beside | {"return_lse": True}
        kv = (x[:, tokens] for x in case.stored)
        parts.append(block_sparse_attention(case.q, *kv, ids, mask.sum(-1, dtype=torch.int32).to(DEVICE), **options))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    shares = (lses - lse).exp().nan_to_num(0)  # of nothing, nothing
    check(case, ((shares[..., None] * outs).sum(0), lse), want)


def test_nothing_more_is_allocated_or_passed_unless_asked():
    case = Case(40, (16, 32), 1, 1, 1, 1, 16, torch.float32, None, seed=4)
    with launched() as calls:
        for asked in (False, True):
            block_sparse_attention(case.q, *case.stored, case.blocks, case.counts, return_lse=asked, **case.options())
    off, on = (dict(zip(block_sparse.forward.arg_names, call[0][2], strict=False)) for call in calls)
    assert off["lse_ptr"] is None
    assert on["lse_ptr"].shape == (1, 40, 1)
