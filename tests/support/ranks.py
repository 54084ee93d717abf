"""Ranks that are threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Table:
    """Exchanges of ranks that are threads: each lays down its parts, and takes what the others laid down for it."""

    def __init__(self, size):
        self.parts, self.barrier = [None] * size, threading.Barrier(size, timeout=10)

    def rank(self, number):
        return _Rank(self, number, len(self.parts))


class _Rank:
    def __init__(self, table, rank, size):
        self._table, self.rank, self.size = table, rank, size

    def all_to_all(self, sent, give, take):
        table = self._table
        table.parts[self.rank] = sent.split(give)
        table.barrier.wait()
        got = torch.cat([parts[self.rank] for parts in table.parts])
        table.barrier.wait()
        assert len(got) == sum(take)
        return got

    def agree(self, yes):
        ones = [1] * self.size
        return bool(self.all_to_all(torch.full((self.size,), yes), ones, ones).all())


def each_rank(size, work):
    """The results of `work`, called with the exchange of each of `size` ranks at once."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda number: work(table.rank(number)), range(size)))
