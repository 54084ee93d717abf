"""Launch parameters of the attention kernel: defaults, candidates, the fastest.

The tests compile the defaults for every chip and allow no register spills in 16 bits. On a GPU the core verifies and
times the candidates once per kind of work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# The smallest supported chips (sm_86, sm_89, sm_120) give one program 99 KiB of shared memory.
SMALLEST_SHARED = 99 * 1024
# What the compiler adds to the tiles: barriers and scratch for reductions.
SCRATCH = 3 * 1024
# Key blocks that a part of a unit walks at least.
MIN_BLOCKS = 4

# The core's `machine`, which chooses between launches; without it the defaults run.
machine: Any = None


class Launch(NamedTuple):
    """How work is cut and run: rows and columns of a step, warps, load stages.

    descriptors: key and value tiles come through tensor descriptors. per_sm: units that one multiprocessor is taken
    to work on at once; those of an unfilled last wave are cut into parts, see `cut`. 0 cuts none.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    per_sm: int = 0


# Launches to time, given the best one so far.
Round = Callable[[Launch], list[Launch]]


@dataclass(frozen=True)
class Kind:
    """The properties that need separate code. stored: of keys. ragged: of q and k."""

    block_q: int
    block_k: int
    head_dim: int
    dtype: torch.dtype
    stored: torch.dtype
    ragged: tuple[bool, bool]
    tail: bool = False
    dense: bool = False


def padded(head_dim: int) -> int:
    """The head dim as the kernel's tiles hold it: a power of two from 16 on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_bytes(kind: Kind, launch: Launch) -> int:
    """Shared memory that the tiles of `launch` take at most, on any chip.

    One tile of queries, keys and values once per stage, an 8-bit tile widened (two of them in float32); the tail's two
    stages come after, and so do the float32 sums of a part of a unit.
    """
    dim = padded(kind.head_dim)
    column = launch.tile_k * dim
    loop = launch.num_stages * 2 * column * kind.stored.itemsize
    if kind.stored != kind.dtype:
        loop += column * kind.dtype.itemsize * (2 if kind.dtype == torch.float32 else 1)
    tail = 2 * 2 * column * kind.dtype.itemsize if kind.tail else 0
    rows = launch.tile_q * dim
    left = 4 * rows if launch.per_sm else 0
    return max(rows * kind.dtype.itemsize + max(loop, tail), left) + SCRATCH


def default_launch(kind: Kind) -> Launch:
    """The launch without timing: it fits every supported chip and stays in registers.

    Key tiles of 128 spill, and so do 128 query rows with a pooled tail: both are cut in two. float32 takes three
    products for one and a quarter of the tile, an eighth with an 8-bit cache and a tail.
    """
    if kind.dtype == torch.float32:
        tile_q = 16 if kind.tail and kind.stored != kind.dtype else 32
        return _staged(kind, min(kind.block_q, tile_q), min(kind.block_k, 32))
    return _staged(kind, min(kind.block_q, 64 if kind.tail else 128), min(kind.block_k, 64))


def rounds(kind: Kind, shared_limit: int, *, descriptors: bool) -> list[Round]:
    """Launches to time, each round given the winner so far: tiles first, then how tiles are read and units are cut."""

    def through_descriptors(best: Launch) -> list[Launch]:  # with few stages: the copies take no registers
        found = [best._replace(descriptors=True, num_stages=stages) for stages in (2, 3)]
        return [x for x in found if shared_bytes(kind, x) <= shared_limit]

    found: list[Round] = [lambda _: candidates(kind, shared_limit, wide=descriptors)]
    found += [through_descriptors] if descriptors and is_tuned(kind) else []
    return [*found, lambda best: [best._replace(per_sm=units) for units in (1, 2)]]


def is_tuned(kind: Kind) -> bool:
    """Whether tiles are worth timing: large models' blocks in 16 bits.

    Every tile costs a compilation. Blocks under 64 belong to models that run in a moment. float32, which no model uses
    on a GPU, has no tiles but the default's that stay in registers.
    """
    large = min(kind.block_q, kind.block_k, kind.head_dim) >= 64
    return large and padded(kind.head_dim) == kind.head_dim and kind.dtype != torch.float32


def candidates(kind: Kind, shared_limit: int, *, wide: bool = True) -> list[Launch]:
    """The launches worth timing that fit `shared_limit` bytes, the default first.

    Fewer query rows per program fill the last wave better, which dense work hardly has, more read each key tile for
    more rows. Launches that were seen to spill are left out: 128 rows with a tail, and with an 8-bit cache other
    stages than the default's. wide: include key tiles of 128, for 128 rows; only chips with TMA have the registers.
    """
    default = default_launch(kind)
    found = [default]
    if is_tuned(kind):
        plain = kind.stored == kind.dtype
        for tile_q in sorted({default.tile_q, default.tile_q if kind.dense else min(kind.block_q, 64)}):
            found.append(_staged(kind, tile_q, 64))
            if plain:
                found += [_launch(tile_q, 64, stages) for stages in (2, 3)]
            if plain and wide and tile_q == 128 and kind.block_k >= 128:
                found.append(_launch(tile_q, 128, 2))
    return [x for x in dict.fromkeys(found) if x == default or shared_bytes(kind, x) <= shared_limit]


def cut(units: int, at_once: int, blocks: int) -> tuple[int, int]:
    """The number of units that run whole, and of parts of each other unit.

    at_once: units that the chip works on at once, 0 for no cut; blocks: the key blocks that a unit walks. 864 units on
    132 multiprocessors of two units each are 3.27 waves and take the time of 4; with the last 72 units cut in three
    they take that of 3.33. It costs one more launch and, here, writing and reading 7 MB, so it is timed like
    everything else. Each part must keep a few blocks, or loading its queries does not pay.
    """
    rest = units % at_once if at_once else 0
    parts = min(at_once // rest, blocks // MIN_BLOCKS) if rest else 1
    return (units - rest, parts) if parts > 1 else (units, 1)


def _staged(kind: Kind, tile_q: int, tile_k: int) -> Launch:
    """As many stages, up to three, as fit on the smallest chip."""
    fits = [_launch(tile_q, tile_k, stages) for stages in (3, 2, 1)]
    return next((x for x in fits if shared_bytes(kind, x) <= SMALLEST_SHARED), fits[-1])


def _launch(tile_q: int, tile_k: int, stages: int) -> Launch:
    """128 query rows need 8 warps to stay in registers."""
    return Launch(tile_q, tile_k, 8 if tile_q >= 128 else 4, stages)
