"""The parts of an attention policy: its rules, and the plan that its selection rule makes for each chunk."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..blocks import FrameBlocks
from ..selection import BlockSelection


class FrameBudget(NamedTuple):
    """Past latent frames that a rule may favour: how many it keeps, of which the first and the nearest ones."""

    keep: int
    sinks: int
    near: int


class View(NamedTuple):
    """The frames that an open chunk can see, and how they are cut into blocks.

    slot_frames: the latent frames in the cache, in memory order.
    current: how many of them, the newest, are the chunk's own.
    q_layout, k_layout: how a frame is cut into query and key blocks.
    batch, heads: of the model.
    """

    slot_frames: Sequence[int]
    current: int
    q_layout: FrameBlocks
    k_layout: FrameBlocks
    batch: int
    heads: int
    device: torch.device | str | None = None

    @property
    def q_blocks(self) -> int:
        """Query blocks per head."""
        return self.current * self.q_layout.per_frame

    @property
    def k_blocks(self) -> int:
        """Key blocks per head."""
        return len(self.slot_frames) * self.k_layout.per_frame


class Plan(Protocol):
    """One chunk's selection, as far as it is known before the first step. Nothing in it waits on the device."""

    @property
    def kept(self) -> int:
        """Key blocks that each query block reads."""

    @property
    def kind(self) -> Hashable:
        """Equal for plans of one policy whose `select` does the same work."""

    @property
    def fixed(self) -> BlockSelection | None:
        """The selection of every layer and step, if no query and no key changes it."""

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        """The key blocks that one layer reads in one step, from block means, [B, blocks, H, D] each.

        frame_means: [B, frames, H, D]. sub_means: means of parts of key blocks, to score blocks by instead.
        """


class SelectionRule(Protocol):
    """Decides which key blocks each query block reads."""

    @property
    def needs_means(self) -> bool:
        """Whether its plans read block and frame means, which the cache must then keep."""

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> Plan:
        """The plan of a chunk that skips the share `sparsity` of key blocks, in (0, 1), and has a past."""


@dataclass(frozen=True)
class Policy:
    """How a video's chunks attend to their past.

    selection: which key blocks a query block reads; None reads all of them.
    """

    selection: SelectionRule | None
