"""Ranks as processes of torch.distributed, which `torchrun` or `lightforcing render` starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 60.0  # for the answer of a rank, which is late by what it computes more slowly than others


class RankLost(RuntimeError):
    """Another rank has ended, or has not answered in time."""


class Group:
    """The ranks of a process group, None the whole world's, as an `Exchange`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def all_to_all(self, sent: Tensor, give: list[int], take: list[int]) -> Tensor:
        got = sent.new_empty(sum(take))
        try:
            dist.all_to_all_single(got, sent, take, give, group=self._group)
        except RuntimeError as error:
            problem = f"another of the {self.size} ranks of this video has ended or does not answer"
            raise RankLost(f"{problem} ({error!s:.200}); start them again with the finished chunks") from error
        return got

    def agree(self, yes: bool) -> bool:
        device, ones = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu", [1] * self.size
        sent = torch.full((self.size,), yes, dtype=torch.uint8, device=device)
        return bool(self.all_to_all(sent, ones, ones).all())


@contextmanager
def process_group(
    where: str = "env://",
    rank: int = -1,
    size: int = -1,
    *,
    device: torch.device | None = None,
    seconds: float = SECONDS,
) -> Iterator[Group]:
    """This process as one of the ranks that meet at `where`: a file:// or tcp:// address, or what `torchrun` has set.

    device: of this rank; None is the CPU. seconds: to wait for the others.
    """
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, where, timedelta(seconds=seconds), rank=rank, world_size=size)
    try:
        yield Group()
    finally:
        dist.destroy_process_group()
