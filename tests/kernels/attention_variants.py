"""The attention kernel's compiled variants: what they are called, and which of them a run on `auto` can come to.

A name is `cc:block_q:block_k:head_dim:dtype:stored:ragged:variant:how`, e.g. `90:128:64:128:bf16:int8:1:tail:tma lse`.
`ragged` is `0`, `1`, or the only side that is, `q` or `k`; `variant` is `sparse`, `tail` or `dense`; `how` may have
`tma`, `cut`, `uneven`, `lse` and a launch that is not the default one, `64x64x4x2`.

What a run can pick follows from the launcher's and the tuner's own rules. Its blocks are those that the nodes offer,
the same for queries and keys, and its heads have 128 dims as in every Wan model. What the front door takes beyond that
from callers of their own (blocks of two sizes or of 256 tokens, other head dims, lists of different lengths, a
log-sum-exp) is only in the covering set, some of each.
"""

import itertools

import torch

from lightforcing.kernels import block_sparse, device, tuning
from lightforcing.kernels.tuning import Kind, Launch
from lightforcing.lightforcing_core.model.wan import HEAD_DIM

CHIPS = (80, 86, 89, 90, 100, 103, 120)
BLOCKS = (16, 32, 64, 128)
DENSE_BLOCK_Q = 128
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
RAGGED = {"0": (False, False), "1": (True, True), "q": (True, False), "k": (False, True)}


def kind_of(block_q: str, block_k: str, head_dim: str, dtype: str, stored: str, ragged: str, variant: str) -> Kind:
    sizes = int(block_q), int(block_k), int(head_dim)
    return Kind(*sizes, DTYPES[dtype], DTYPES[stored], RAGGED[ragged], variant == "tail", variant == "dense")


def launch_of(kind: Kind, how: str) -> Launch:
    """The launch that `how` names, or the default; `tma` reads tiles through descriptors, `cut` has units in parts."""
    words = how.split()
    tiles = [word for word in words if "x" in word]
    launch = Launch(*map(int, tiles[0].split("x"))) if tiles else tuning.default_launch(kind)
    return launch._replace(descriptors="tma" in words, per_sm=int("cut" in words))


def name_of(cc: int, kind: Kind, launch: Launch) -> str:
    names = {value: name for name, value in (DTYPES | RAGGED).items()}
    variant = "tail" if kind.tail else "dense" if kind.dense else "sparse"
    how = ["x".join(map(str, launch[:4])), *["tma"] * launch.descriptors, *["cut"] * launch.per_sm]
    sizes = cc, kind.block_q, kind.block_k, kind.head_dim
    return ":".join(map(str, (*sizes, *map(names.get, (kind.dtype, kind.stored, kind.ragged)), variant, " ".join(how))))


def kinds() -> list[Kind]:
    """Kinds of work. Dense work comes to this kernel only from 8-bit caches, which no other kernel reads."""
    found = []
    for dtype, block, ragged in itertools.product(block_sparse.DTYPES, BLOCKS, (False, True)):
        for stored, tail in itertools.product((dtype, *block_sparse.EIGHT_BIT), (False, True)):
            found.append(Kind(block, block, HEAD_DIM, dtype, stored, (ragged, ragged), tail))
    for dtype, stored, block_k in itertools.product(block_sparse.DTYPES, block_sparse.EIGHT_BIT, BLOCKS):
        frames = {(tokens % DENSE_BLOCK_Q != 0, tokens % block_k != 0) for tokens in range(1, 2 * DENSE_BLOCK_Q)}
        for ragged in sorted(frames):
            found.append(Kind(DENSE_BLOCK_Q, block_k, HEAD_DIM, dtype, stored, ragged, dense=True))
    return found


def runs_on(kind: Kind, cc: int) -> bool:
    return kind.stored != torch.float8_e4m3fn or divmod(cc, 10) >= device.MIN_CAPABILITY_FLOAT8


def launches(kind: Kind, cc: int, shared_kib: int) -> list[Launch]:
    """Untimed, and whatever may win the tuner's rounds: each one's launches, given every winner of those before.

    One and two units at once are the same code, with other numbers.
    """
    found = [tuning.default_launch(kind)]
    descriptors = block_sparse.takes_descriptors(kind, divmod(cc, 10))
    for candidates_after in tuning.rounds(kind, shared_kib * 1024, descriptors=descriptors):
        found = list(dict.fromkeys(found + [x for best in found for x in candidates_after(best)]))
    return list(dict.fromkeys(x._replace(per_sm=min(x.per_sm, 1)) for x in found))


def distance(kind: Kind, launch: Launch) -> int:
    """How far from running untimed: 0 the default, whole or cut; 1 its tiles by TMA; 2 other tiles; 3 these changed."""
    default = tuning.default_launch(kind)
    plain = launch._replace(per_sm=0)
    if plain._replace(descriptors=False, num_stages=default.num_stages) == default:
        return 1 if launch.descriptors else 2 if plain != default else 0
    return 2 if plain == launch and not launch.descriptors else 3


def is_timed(row: dict) -> bool:
    """Whether only the tuner can have picked the launch of a row of `ahead_of_time`: it is not the default's."""
    _, *shape, how = row["variant"].split(":")
    kind = kind_of(*shape)
    return distance(kind, launch_of(kind, how)) > 0
