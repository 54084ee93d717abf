"""Shares of tokens and heads: what is split and joined again is whole."""

import pytest
import torch

from lightforcing.lightforcing_core.parallel.shares import Split, shares_of
from lightforcing.lightforcing_core.refusal import Refusal

from ...support.ranks import Table, each_rank


@pytest.mark.parametrize("tokens", [13, 42])
@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("size", [2, 3, 5, 8, 12])
def test_what_is_shared_and_joined_again_is_whole(size, heads, tokens):
    frames = 3
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, frames * tokens, heads, 4, generator=generator)
    own_heads = q.tensor_split([sum(_parts(heads, size)[:n]) for n in range(1, size)], dim=2)

    def work(exchange):
        shares = shares_of(exchange, heads, tokens)
        own = [shares.own_tokens(x) for x in (q, k)]
        first, second = shares.to_heads(*own)
        assert torch.equal(first, own_heads[exchange.rank])
        assert torch.equal(shares.all_heads(second.transpose(1, 2)), k.transpose(1, 2))
        assert torch.equal(shares.own_heads(k.transpose(1, 2)), second.transpose(1, 2))
        assert torch.equal(shares.to_tokens(second), own[1])
        assert torch.equal(shares.all_tokens(own[0].flatten(2)), q.flatten(2))
        assert shares.heads_of(heads) == first.shape[2] >= 1
        return not shares.agree(exchange.rank > 0) and shares.agree(True)

    assert all(each_rank(size, work))


def _parts(many, size):
    return [len(part) for part in torch.arange(many).tensor_split(size)]


@pytest.mark.parametrize(("heads", "tokens", "what"), [(3, 24, "3 heads"), (8, 2, "2 tokens")])
def test_a_rank_without_a_share_is_refused(heads, tokens, what):
    with pytest.raises(Refusal, match=f"has 4 ranks, and the model {what}"):
        shares_of(Table(4).rank(0), heads, tokens)
    assert isinstance(shares_of(Table(2).rank(0), heads, tokens), Split)
