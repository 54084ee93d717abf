"""Shares of one video's tokens and heads, one for each rank.

Between attentions a rank computes its tokens of every frame, whose norms, modulations and products need no other
rank's. In attention it computes its heads of all tokens, so that the KV cache is split by heads and every selection of
blocks is made by one rank alone. Source: DeepSpeed-Ulysses, arXiv 2309.14509, with the tokens split inside frames.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..refusal import Refusal


class Exchange(Protocol):
    """What carries data between ranks: torch.distributed, see `group`, or threads in tests."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, sent: Tensor, give: list[int], take: list[int]) -> Tensor:
        """Give each rank its part of `sent` [n], and return their parts for this one: so many elements each."""

    def agree(self, yes: bool) -> bool:
        """Whether all ranks say yes. Waits for them."""


class Shares:
    """The shares of a video that is computed by one rank: everything. `Split` has the same methods for several."""

    size = 1

    def heads_of(self, heads: int) -> int:
        """How many of all heads this rank has."""
        return heads

    def own_roles(self, roles: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """This rank's heads of each layer's."""
        return roles

    def own_heads(self, x: Tensor) -> Tensor:
        """This rank's heads: [n, H, …] → [n, own heads, …]."""
        return x

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens: [B, F · tokens, …] → [B, F · own tokens, …]."""
        return x

    def to_heads(self, *parts: Tensor) -> Sequence[Tensor]:
        """All tokens of this rank's heads: [B, F · own tokens, H, D] → [B, F · tokens, own heads, D] each."""
        return parts

    def to_tokens(self, x: Tensor) -> Tensor:
        """The reverse: [B, F · tokens, own heads, D] → [B, F · own tokens, H, D]."""
        return x

    def all_tokens(self, x: Tensor) -> Tensor:
        """The reverse of `own_tokens`, on every rank: [B, F · own tokens, C] → [B, F · tokens, C]."""
        return x

    def all_heads(self, x: Tensor) -> Tensor:
        """The reverse of `own_heads`, on every rank: [n, own heads, …] → [n, H, …]."""
        return x

    def agree(self, yes: bool) -> bool:
        """Whether all ranks say yes."""
        return yes


WHOLE = Shares()


class Split(Shares):
    """This rank's shares of `heads` heads and of the `tokens` tokens of a frame; sizes differ by one at most."""

    def __init__(self, exchange: Exchange, heads: int, tokens: int) -> None:
        self.exchange, self.rank, self.size = exchange, exchange.rank, exchange.size
        self.heads, self.tokens = parts_of(heads, self.size), parts_of(tokens, self.size)
        first_head, first_token = (sum(parts[: self.rank]) for parts in (self.heads, self.tokens))
        self._of_heads = slice(first_head, first_head + self.heads[self.rank])
        self._of_tokens = slice(first_token, first_token + self.tokens[self.rank])

    def heads_of(self, heads: int) -> int:
        return self.heads[self.rank]

    def own_roles(self, roles: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(layer[self._of_heads] for layer in roles)

    def own_heads(self, x: Tensor) -> Tensor:
        return x[:, self._of_heads]

    def own_tokens(self, x: Tensor) -> Tensor:
        framed: Tensor = x.unflatten(1, (-1, sum(self.tokens)))
        return framed[:, :, self._of_tokens].flatten(1, 2)

    def to_heads(self, *parts: Tensor) -> Sequence[Tensor]:
        sent = torch.stack(parts, 2).unflatten(1, (-1, self.tokens[self.rank]))  # [B, F, own tokens, parts, H, D]
        return self._exchanged(sent, 4, self.heads, 2, self.tokens).flatten(1, 2).unbind(2)

    def to_tokens(self, x: Tensor) -> Tensor:
        sent = x.unflatten(1, (-1, sum(self.tokens)))
        return self._exchanged(sent, 2, self.tokens, 3, self.heads).flatten(1, 2)

    def all_tokens(self, x: Tensor) -> Tensor:
        return self._gathered(x.unflatten(1, (-1, self.tokens[self.rank])), 2, self.tokens).flatten(1, 2)

    def all_heads(self, x: Tensor) -> Tensor:
        return self._gathered(x, 1, self.heads)

    def agree(self, yes: bool) -> bool:
        return self.exchange.agree(yes)

    def _exchanged(self, x: Tensor, given: int, give: Sequence[int], taken: int, take: Sequence[int]) -> Tensor:
        """x split by `give` along dimension `given`, and what the ranks give of it joined along `taken`."""
        shapes = [_of_size(x, {given: give[self.rank], taken: size}) for size in take]
        return self._joined(x.split(list(give), given), shapes, taken)

    def _gathered(self, x: Tensor, dim: int, take: Sequence[int]) -> Tensor:
        return self._joined([x] * self.size, [_of_size(x, {dim: size}) for size in take], dim)

    def _joined(self, sent: Sequence[Tensor], shapes: Sequence[list[int]], dim: int) -> Tensor:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([part.flatten() for part in sent])
        got = self.exchange.all_to_all(flat, [part.numel() for part in sent], sizes)
        return torch.cat([part.view(shape) for part, shape in zip(got.split(sizes), shapes, strict=True)], dim)


def shares_of(exchange: Exchange | None, heads: int, tokens: int) -> Shares:
    """This rank's shares of all heads and of a frame's tokens; Refusal if some rank would have none."""
    if exchange is None or exchange.size == 1:
        return WHOLE
    for what, many in (("heads", heads), ("tokens per frame", tokens)):
        if exchange.size > many:
            raise Refusal("exchange", f"has {exchange.size} ranks, and the model {many} {what}", f"use {many} at most")
    return Split(exchange, heads, tokens)


def parts_of(many: int, ranks: int) -> list[int]:
    """How many of `many` each of the ranks has; the first ones have more if they do not divide."""
    return [many // ranks + (rank < many % ranks) for rank in range(ranks)]


def _of_size(x: Tensor, sizes: dict[int, int]) -> list[int]:
    """x's shape with other sizes in some dimensions."""
    return [sizes.get(dim, size) for dim, size in enumerate(x.shape)]
