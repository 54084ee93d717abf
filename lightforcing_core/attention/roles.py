"""Roles of attention heads: the frames that a head attends to most decide which ones it keeps reading.

Sources: Forcing-KV, arXiv 2605.09681; Dummy Forcing, arXiv 2601.20499.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files.json import listing, mapping, read_json

# For each layer the role of each head; the numbers are a policy's.
Roles = tuple[tuple[int, ...], ...]
STATIC, DYNAMIC = 0, 1  # of Forcing-KV
FIRST, NEAR, LAST = 0, 1, 2  # of Dummy Forcing: the past frames that are read


def read_roles(text: str) -> Roles:
    """Forcing-KV's roles from JSON: for each layer the numbers of its static heads and of its dynamic heads.

    A list of {"static_head": [...], "dynamic_head": [...]}, or an object that has such a list as "layers". Raises
    ValueError unless each layer names every head once and all have as many.
    """
    remedy = 'use [{"static_head": [0, …], "dynamic_head": [1, …]}, …]'
    try:
        data = read_json(text)
    except ValueError as error:
        raise ValueError(f"the roles are no JSON ({error}); {remedy}") from error
    layers = listing(mapping(data).get("layers", data))
    roles = tuple(_roles_of(number, mapping(layer)) for number, layer in enumerate(layers))
    if len({len(layer) for layer in roles}) != 1:
        raise ValueError(f"the roles are no list of layers of equally many heads; {remedy}")
    return roles


def _roles_of(number: int, layer: Mapping[str, Any]) -> tuple[int, ...]:
    static, dynamic = (listing(layer.get(f"{kind}_head")) for kind in ("static", "dynamic"))
    heads = [*static, *dynamic]
    if not heads or any(type(head) is not int for head in heads) or sorted(heads) != list(range(len(heads))):
        raise ValueError(f"layer {number} of the roles does not name each head from 0 on once, as static or dynamic")
    return tuple(DYNAMIC if head in dynamic else STATIC for head in range(len(heads)))


def group_masses(q: Tensor, k: Tensor, sizes: Sequence[int], rows: int = 512) -> Tensor:
    """The share of attention that each group of keys gets, mean over queries: float32 [H, groups].

    q, k: [L, H, D] of one video. sizes: the keys of each group, one group after another. At most `rows` queries at
    equal distances are asked, so that the same input gives the same result.
    """
    queries = q[:: -(-len(q) // rows)].float().transpose(0, 1) * q.shape[-1] ** -0.5
    sums = [(queries @ keys.float().permute(1, 2, 0)).logsumexp(-1) for keys in k.split(list(sizes))]
    return torch.stack(sums, dim=-1).softmax(-1).mean(1)


def forcing_kv_roles(masses: Tensor, *, sinks: int = 1, recent: int = 4, threshold: float = 0.8) -> Roles:
    """STATIC for heads whose attention stays with the newest frames, DYNAMIC for others.

    masses: [layers, H, frames] in the order of time, the chunk's own last. A head is static if the `recent` newest
    frames get at least `threshold` of the attention to all but the first `sinks` frames.
    """
    share = masses[..., -recent:].sum(-1) / masses[..., sinks:].sum(-1)
    return _as_roles((share < threshold).int())


def dummy_forcing_roles(masses: Tensor, dummies: int) -> Roles:
    """LAST for the `dummies` heads that attend least to the past; FIRST or NEAR, whichever is larger, for others.

    masses: [layers, H, 3] of the first frame, the other past frames and the chunk's own, which is not used. A head
    counts by its shares of what all heads give to the first frame and to the others. Of equal heads the first ones are
    dummies.
    """
    past = masses[..., :2].double()
    first, near = (past / past.sum((0, 1)).clamp(min=torch.finfo(past.dtype).tiny)).unbind(-1)
    costs, roles = torch.maximum(first, near), torch.where(near > first, NEAR, FIRST)
    roles.view(-1)[costs.flatten().argsort(stable=True)[:dummies]] = LAST
    return _as_roles(roles)


def _as_roles(table: Tensor) -> Roles:
    return tuple(tuple(row) for row in table.tolist())
