"""Block-sparse attention in plain PyTorch, to test the other backends against."""

import torch
from torch import Tensor

from ..selection import BlockSelection
from .base import Backend, Call

# Elements that the reference may gather at once.
REFERENCE_CHUNK = 1 << 24


class Reference(Backend):
    """Gathers and attends to each query block's keys, a few query blocks at a time."""

    name = "reference"
    automatic = False  # except on a CPU, if nothing else can run

    def why_not(self, call: Call) -> str | None:
        return None

    def workspace(self, call: Call) -> int:
        per_pair = _elements_per_pair(call)
        return 4 * min(REFERENCE_CHUNK, call.q_blocks * call.k_blocks * per_pair)

    def run(self, call: Call) -> Tensor:
        q, q_layout = call.q, call.q_layout
        wide = torch.promote_types(q.dtype, torch.float32)
        blocks, counts = call.blocks_read
        lengths = call.k_layout.block_lengths(call.k_layout.frames(call.k.shape[1]), q.device)
        queries = q_layout.pad(q).unflatten(1, (call.q_blocks, q_layout.block))
        out = torch.zeros_like(queries)
        step = max(1, REFERENCE_CHUNK // (blocks.shape[-1] * _elements_per_pair(call)))
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                for first in range(0, call.q_blocks, step):
                    part = slice(first, first + step)
                    rows = BlockSelection(blocks[b, h, part], counts[b, h, part])
                    mixed = _attend_rows(call, b, h, queries[b, part, :, h].to(wide), rows, lengths)
                    out[b, part, :, h] = mixed.to(q.dtype)
        return q_layout.unpad(out.flatten(1, 2))


def _elements_per_pair(call: Call) -> int:
    """Elements for one query block and one key block: keys, values, scores, weights."""
    return call.k_layout.block * (2 * call.q.shape[-1] + 2 * call.q_layout.block)


def _attend_rows(call: Call, b: int, h: int, q: Tensor, rows: BlockSelection, lengths: Tensor) -> Tensor:
    """Attention of query blocks q [n, block_q, D] of one head; lengths: real tokens per key block, int64 [k_blocks]."""
    block = call.k_layout.block
    within = torch.arange(block, device=q.device)
    ids, counts = rows.blocks.long(), rows.counts
    listed = torch.arange(ids.shape[-1], device=q.device) < counts[..., None]
    real = ((within < lengths[ids, None]) & listed[..., None]).flatten(1)
    starts = lengths.cumsum(0) - lengths
    tokens = (starts[ids, None] + within).flatten(1).masked_fill(~real, 0)

    def gathered(stored: Tensor, scales: Tensor | None) -> Tensor:
        x = stored[b, :, h][tokens].to(q.dtype)
        if scales is not None:
            x = x * scales[b, :, h].to(q.dtype)[ids].repeat_interleave(block, dim=1)[..., None]
        return x.masked_fill(~real[..., None], 0)

    k_scales, v_scales = call.scales or (None, None)
    keys, values = gathered(call.k, k_scales), gathered(call.v, v_scales)
    q = q * call.score_scale
    scores = (q @ keys.mT).masked_fill(~real[:, None], -torch.inf)
    if call.tail is None:
        # A softmax over nothing is NaN; an empty list gives zeros instead.
        return scores.softmax(-1).masked_fill((counts == 0)[:, None, None], 0) @ values
    k_means, v_means = (x[b, :, h].to(q.dtype) for x in call.tail)
    tail_scores = q @ k_means.mT + lengths.to(q.dtype).log()
    tail_scores = tail_scores.masked_fill(rows.to_mask(len(lengths))[:, None], -torch.inf)
    weights = torch.cat([scores, tail_scores], -1).softmax(-1)
    return weights[..., : values.shape[1]] @ values + weights[..., values.shape[1] :] @ v_means
