"""Rules that read the same key blocks in every layer, head and step: only the places of two blocks matter."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...pinned import to_device
from ..blocks import FrameBlocks, tile_order
from ..selection import BlockSelection, FrameBudget, View, kept_blocks


@dataclass(frozen=True)
class FixedPlan:
    """One selection for a whole chunk."""

    selection: BlockSelection
    kept: int
    density: float | None
    uneven: bool
    tables = ()

    @property
    def kind(self) -> Hashable:
        return "fixed"

    def of_layer(self, layer: int) -> "BlockSelection | FixedPlan":
        return self.selection

    def select(
        self, q_means: Tensor, k_means: Tensor, frame_means: Tensor, sub_means: Tensor | None = None
    ) -> BlockSelection:
        return self.selection


class Static(ABC):
    """A rule about places; every head shares one list of its blocks."""

    needs_means = False
    uses_sparsity = False

    @abstractmethod
    def reads(self, view: View, sparsity: float, budget: FrameBudget) -> Tensor:
        """Whether query blocks read key blocks: bool [current, q_blocks in a frame, frames, k_blocks in a frame].

        The frames of `view` are in the order of time here.
        """

    def plan(self, view: View, sparsity: float, budget: FrameBudget) -> FixedPlan:
        in_time = self.reads(view._replace(slot_frames=sorted(view.slot_frames)), sparsity, budget)
        mask = torch.empty_like(in_time)
        mask[:, :, view.in_time] = in_time
        blocks, counts = BlockSelection.from_mask(mask.view(1, 1, view.q_blocks, view.k_blocks))
        kept, read = int(counts.max()), int(counts.sum())
        listed = BlockSelection(blocks[..., :kept].contiguous(), counts)
        shared = (to_device(x, view.device).expand(view.batch, view.heads, *x.shape[2:]) for x in listed)
        return FixedPlan(BlockSelection(*shared), kept, read / mask.numel(), read < kept * view.q_blocks)


class Window(Static):
    """The chunk's own frames, then the first `budget.sinks` frames, then the newest ones, as far as blocks allow.

    Reads whole frames within ⌊(1 − sparsity) · blocks⌋ key blocks, but never less than the chunk itself.
    Source: StreamingLLM, arXiv 2309.17453.
    """

    uses_sparsity = True

    def reads(self, view: View, sparsity: float, budget: FrameBudget) -> Tensor:
        frames, past = len(view.slot_frames), len(view.slot_frames) - view.current
        most = kept_blocks(sparsity, view.k_blocks) // view.k_layout.per_frame - view.current
        sinks = min(budget.sinks, past)
        by_rank = [*range(sinks), *reversed(range(sinks, past))][: max(0, most)]
        mask = _nothing(view)
        mask[:, :, [*by_rank, *range(past, frames)]] = True
        return mask


@dataclass(frozen=True)
class Radial(Static):
    """Whole frames next to the query's, then bands around it that become narrower and rarer with the distance.

    At a distance of D frames, D > 1, a query's band in a frame is as wide as the tokens of a frame, rounded up to a
    power of two and divided by D rounded up to one, times `decay`, but at least a block. If that quotient is under
    128, only one frame in ⌊128 / quotient⌋ is read. The video's first frame is read whole. Source: Radial Attention,
    arXiv 2506.19852, by the released code; the sparsity of the schedule is not used.
    """

    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.decay <= 0.0:
            raise ValueError(f"decay {self.decay} is not positive; the published one is 0.2")

    def reads(self, view: View, sparsity: float, budget: FrameBudget) -> Tensor:
        tokens, mask = view.k_layout.tokens_per_frame, _nothing(view)
        for row, query_frame in enumerate(view.slot_frames[-view.current :]):
            for column, key_frame in enumerate(view.slot_frames):
                distance = abs(query_frame - key_frame)
                if distance <= 1 or key_frame == 0:
                    mask[row, :, column] = True
                    continue
                reach = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
                if reach >= 128 or distance % int(128 / reach) == 0:
                    width = int(max(view.k_layout.block, reach * self.decay))
                    mask[row, :, column] = _band(view.q_layout, view.k_layout, width)
        return mask


@lru_cache(maxsize=64)
def _band(q_layout: FrameBlocks, k_layout: FrameBlocks, width: int) -> Tensor:
    """Blocks that a band of `width` tokens on both sides covers: bool [q_blocks, k_blocks] of two frames.

    Of the keys that some token of a query block reads, more than 60 % must be read by more than a third of its tokens.
    """
    first, last = _edges(q_layout)
    token = torch.arange(k_layout.tokens_per_frame)
    read = torch.minimum(last[:, None], token + width) - torch.maximum(first[:, None], token - width) + 1
    block = k_layout.block_of_token(1)
    any_read, well_read = (
        torch.zeros(len(first), k_layout.per_frame).index_add_(1, block, x.float())
        for x in (read > 0, read * 3 > (last - first + 1)[:, None])
    )
    return well_read > 0.6 * any_read


@dataclass(frozen=True)
class SlidingTile(Static):
    """The blocks in a box of `frames` × `rows` × `columns` blocks around the query block, shifted inside the video.

    A block's place is the mean place of its tokens, and its sides those of a square of as many tokens: best with
    blocks that are tiles. The chunk's own frames and the first `budget.sinks` frames are read whole too. Even numbers
    act as the next odd one. Source: Sliding Tile Attention, arXiv 2502.04507; the schedule's sparsity is not used.
    """

    frames: int = 5
    rows: int = 3
    columns: int = 3

    def __post_init__(self) -> None:
        if min(self.frames, self.rows, self.columns) < 1:
            raise ValueError(f"a box of {self.frames} × {self.rows} × {self.columns} blocks is empty; use 5 × 3 × 3")

    def box(self, view: View) -> Tensor:
        """The blocks in the box alone, shaped as what `reads` returns."""
        frame, side = torch.arange(len(view.slot_frames)) + 0.5, view.k_layout.block**0.5
        mask = _near(frame[-view.current :], frame, self.frames, 1, len(frame))[:, None, :, None]
        queries, keys = (_middles(view, layout) for layout in (view.q_layout, view.k_layout))
        for axis, blocks in enumerate((self.rows, self.columns)):
            mask = mask & _near(queries[axis], keys[axis], blocks, side, view.grid[axis])[None, :, None, :]
        return mask

    def reads(self, view: View, sparsity: float, budget: FrameBudget) -> Tensor:
        mask = self.box(view)
        mask[:, :, -view.current :] = mask[:, :, : budget.sinks] = True
        return mask


def _near(queries: Tensor, keys: Tensor, window: int, side: float, size: int) -> Tensor:
    """Whether places are in a window of cells around others, which first move into the middle: bool [n, m].

    queries [n], keys [m]: the middles of cells as wide as `side` in [0, size).
    """
    reach = window // 2 * side
    # If the window is wider than the size, the upper bound wins, as in the released code.
    middle = queries.clamp(min=reach + side / 2).clamp(max=size - reach - side / 2)
    return (keys - middle[:, None]).abs() < reach + side / 2


def _middles(view: View, layout: FrameBlocks) -> Tensor:
    """The mean row and column of each block's tokens, with whole numbers at the borders of tokens: [2, blocks]."""
    height, width = view.grid
    order = tile_order(height, width, view.k_layout.block) if view.tiles else torch.arange(height * width)
    places = torch.stack([order // width, order % width]) + 0.5
    sums = torch.zeros(2, layout.per_frame).index_add_(1, layout.block_of_token(1), places)
    return sums / layout.block_lengths(1)


@dataclass(frozen=True)
class SpatialBand(Static):
    """The blocks within `frames` frames of tokens before and after the query block, and the first frame.

    Source: the spatial heads of Sparse VideoGen, arXiv 2502.01776; the schedule's sparsity is not used.
    """

    frames: int = 2

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"a band of {self.frames} frames is empty; the published one is 2")

    def reads(self, view: View, sparsity: float, budget: FrameBudget) -> Tensor:
        tokens, frame = view.k_layout.tokens_per_frame, torch.tensor(view.slot_frames)
        (q_first, q_last), (k_first, k_last) = (
            [frames[:, None] * tokens + edge for edge in _edges(layout)]
            for frames, layout in ((frame[-view.current :], view.q_layout), (frame, view.k_layout))
        )
        before = q_first[:, :, None, None] - k_last
        after = k_first - q_last[:, :, None, None]
        mask = torch.maximum(before, after) <= self.frames * tokens
        mask[:, :, 0] = True
        return mask


def _edges(layout: FrameBlocks) -> tuple[Tensor, Tensor]:
    """The first and the last token of each block of a frame, int64 [blocks] each."""
    first = torch.arange(0, layout.tokens_per_frame, layout.block)
    return first, (first + layout.block).clamp(max=layout.tokens_per_frame) - 1


def _nothing(view: View) -> Tensor:
    return torch.zeros(
        view.current, view.q_layout.per_frame, len(view.slot_frames), view.k_layout.per_frame, dtype=torch.bool
    )
