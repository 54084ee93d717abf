"""The parts of an attention policy: its rules, and the plan that its selection rule makes for each chunk."""

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, Protocol

from torch import Tensor

from ..selection import BlockSelection, FrameBudget, View
from .rolling import RollingSink

Standing = Literal["published", "untrained", "baseline", "experimental"]


class Plan(Protocol):
    """The part of a chunk's selection that is known before the first step. It never waits on the device."""

    @property
    def kept(self) -> int:
        """Key blocks that a query block reads at most."""

    @property
    def density(self) -> float | None:
        """The share of visible key blocks that query blocks read on average; None if queries and keys decide."""

    @property
    def uneven(self) -> bool:
        """Whether query blocks may read different numbers of key blocks."""

    @property
    def kind(self) -> Hashable:
        """Equal for plans of one policy whose `select` does the same work."""

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What `select` reads from the device in the place of numbers, see `SelectionPlan.steady`; usually nothing."""

    def of_layer(self, layer: int) -> "BlockSelection | Plan":
        """The selection of a layer in every step if no query and no key changes it, else the plan that selects."""

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        """The key blocks that one layer reads in one step, from block means, [B, blocks, H, D] each.

        frame_means: [B, frames, H, D]. sub_means: means of parts of key blocks, to score blocks with instead. With
        `tables` the means are those of every slot of the cache.
        """


class SelectionRule(Protocol):
    """Decides which key blocks each query block reads."""

    @property
    def needs_means(self) -> bool:
        """Whether its plans read block and frame means, which the cache must then keep."""

    @property
    def uses_sparsity(self) -> bool:
        """Whether the schedule's sparsity says how much is read; if not, it only makes chunks dense or sparse."""

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> Plan:
        """The plan of a chunk that skips the share `sparsity` of key blocks, in (0, 1), and has a past."""


@dataclass(frozen=True)
class Policy:
    """How a video's chunks attend to their past.

    selection: chooses key blocks; None reads all of them.
    cache: chooses the frames that the KV cache shows; None keeps sinks and the newest.
    joint: as many chunks as there are steps are denoised at once, one level of noise apart, and the first one finished.
    standing: "published" with checkpoints that were trained with it, "untrained" for those that were not, a "baseline"
        to compare with, or "experimental".
    """

    selection: SelectionRule | None
    cache: RollingSink | None = None
    standing: Standing = "baseline"
    joint: bool = False

    @property
    def settings(self) -> dict[str, float]:
        """The settings of its rules with their defaults."""
        rules = [rule for rule in (self.selection, self.cache) if is_dataclass(rule)]
        return {one.name: getattr(rule, one.name) for rule in rules for one in fields(rule)}
