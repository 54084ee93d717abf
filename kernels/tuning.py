"""Launch parameters of the attention kernel: defaults, candidates, the fastest.

The tests compile the defaults for every chip and allow no register spills in 16 bits. On a GPU the core verifies and
times the candidates once per kind of work.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Major capabilities of chips whose warps multiply on their own, by mma.sync. Tensor descriptors take 20 barriers per 64
# keys there, pointers 4.
MMA_SYNC = (8, 12)
# Those on which Triton makes no fast products of a cache's own numbers.
NO_NARROW = {torch.int8: (10, 11), torch.float8_e4m3fn: (9,)}
# Key blocks that a part of a unit walks at least.
MIN_BLOCKS = 4

# The work that is chosen, with a round and a kind of it.
WORK = "attention launch, round {} of {}"


class Launch(NamedTuple):
    """How work is cut and run: rows and columns of a step, warps, load stages.

    descriptors: key and value tiles come through tensor descriptors. per_sm: units that one multiprocessor is taken
    to work on at once; those of an unfilled last wave are cut into parts, see `cut`. 0 cuts none. halves: values and
    sums are taken in two halves of their dims. narrow: with int8 keys queries are rounded to int8 too, with a scale per
    row; with float8_e4m3fn values the weights are rounded to it too.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    per_sm: int = 0
    halves: bool = False
    narrow: bool = False


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


def default_launch(kind: Kind, capability: tuple[int, int]) -> Launch:
    """The launch without timing: it fits every chip of that capability and stays in registers.

    128 query rows with a pooled tail spill and are cut in two. float32 takes three products for one and a quarter of
    the tile, an eighth with an 8-bit cache and a tail.
    """
    if kind.dtype == torch.float32:
        tile_q = 16 if kind.tail and kind.stored != kind.dtype else 32
        return Launch(min(kind.block_q, tile_q), min(kind.block_k, 32), 4, 2)
    return _launch(kind, min(kind.block_q, 64 if kind.tail else 128), capability)


def _launch(kind: Kind, tile_q: int, capability: tuple[int, int]) -> Launch:
    """The launch for so many rows. Key tiles of 128 spill; 128 query rows need 8 warps to stay in registers.

    The next tile's copies are only on their way while one is computed if there are three stages. On chips that multiply
    by mma.sync, 64 rows take halves, in which key tiles of 64 spill; two programs then fit in 100 KiB of shared memory.
    """
    halves = capability[0] in MMA_SYNC and tile_q >= 64 and padded(kind.head_dim) == 128
    halves = halves and (tile_q == 64 or kind.stored != kind.dtype)
    return Launch(tile_q, min(kind.block_k, 32 if halves else 64), 8 if tile_q >= 128 else 4, 3, halves=halves)


def rounds(kind: Kind, capability: tuple[int, int], *, descriptors: bool) -> list[list[dict[str, Any]]]:
    """Changes of the best launch so far to time, each round starting from the winner of the one before.

    Tiles come first, then how tiles are read and units are cut. A launch that the chip has too little shared memory for
    fails when it is tried.
    """
    found = [[launch._asdict() for launch in candidates(kind, capability, wide=descriptors)]]
    if descriptors and is_tuned(kind):  # with few stages: the copies take no registers
        found.append([{"descriptors": True, "num_stages": stages} for stages in (2, 3)])
    if kind.stored in NO_NARROW and is_tuned(kind) and capability[0] not in NO_NARROW[kind.stored]:
        found.append([{"narrow": True}])
    return [*found, [{"per_sm": units} for units in (1, 2)]]


def is_tuned(kind: Kind) -> bool:
    """Whether tiles are worth timing: large models' blocks in 16 bits.

    Every tile costs a compilation. Blocks under 64 belong to models that run in a moment. float32, which no model uses
    on a GPU, has no tiles but the default's that stay in registers.
    """
    large = min(kind.block_q, kind.block_k, kind.head_dim) >= 64
    return large and padded(kind.head_dim) == kind.head_dim and kind.dtype != torch.float32


def candidates(kind: Kind, capability: tuple[int, int], *, wide: bool = True) -> list[Launch]:
    """The launches worth timing, the default first.

    Fewer query rows per program fill the last wave better, which dense work hardly has, more read each key tile for
    more rows. Launches that were seen to spill are left out: 128 rows with a tail, and with an 8-bit cache other
    stages than the default's. wide: include key tiles of 128, for 128 rows; only chips with TMA have the registers.
    """
    default = default_launch(kind, capability)
    found = [default]
    if is_tuned(kind):
        for tile_q in {default.tile_q, default.tile_q if kind.dense else min(kind.block_q, 64)}:
            launch = _launch(kind, tile_q, capability)
            found.append(launch)
            if kind.stored == kind.dtype:
                found += [launch._replace(num_stages=stages) for stages in ((2, 4) if launch.halves else (2,))]
                if wide and tile_q == 128 and kind.block_k >= 128 and capability[0] not in MMA_SYNC:
                    found.append(launch._replace(tile_k=128, num_stages=2))
    return list(dict.fromkeys(found))


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
