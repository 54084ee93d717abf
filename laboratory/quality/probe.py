"""The error that sparse attention makes in each layer, on the very queries, keys and values of a dense rollout.

The probe stands where the rollout calls its dense attention: it lets that through and, at the last denoising step of
every chunk, computes what each arm would have given instead.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks, tile_order
from lightforcing.lightforcing_core.attention.dispatch import sparse_attention
from lightforcing.lightforcing_core.attention.quantised import STORED, quantise_blocks
from lightforcing.lightforcing_core.attention.selection import SelectionPlan, sub_block_layout
from lightforcing.lightforcing_core.model.causal import CausalState, forward, sdpa
from lightforcing.lightforcing_core.model.wan import Wan

from .arms import Arm


def is_probed(arm: Arm) -> bool:
    """Whether an arm changes attention itself: not the linear layers, and not only the length of the video."""
    return not arm.is_long and not arm.fp8 and (arm.growth is not None or arm.kv.dtype != "same")


class AttentionProbe:
    """Dense attention that listens. `errors[arm]` holds, chunk by chunk, an error per layer and video.

    dit: the model that runs; grid: rows and columns of a frame's tokens; last_sigma: the noise level of a chunk's last
    step; arms: those that are tried, with the growth of each.
    """

    def __init__(self, dit: Wan, grid: tuple[int, int], last_sigma: float, arms: Iterable[Arm]) -> None:
        self.arms = [arm for arm in arms if is_probed(arm)]
        self.errors: dict[str, list[list[list[float]]]] = {arm.name: [] for arm in self.arms}
        self._dit, self._grid, self._last_sigma = dit, grid, last_sigma
        self._listens, self._in_cross_attention = False, False
        self._chunk_frames, self._chunk = 0, 0

    def denoise(self, x: Tensor, sigma: float, state: CausalState) -> Tensor:
        """The rollout's `denoise`: knows what the calls of attention inside belong to."""
        self._listens = not state.clean and sigma == self._last_sigma
        self._in_cross_attention, self._chunk_frames = False, x.shape[2]
        if self._listens:
            self._chunk = len(next(iter(self.errors.values()), []))
            for chunks in self.errors.values():
                chunks.append([])
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=x.device)
        assert state.text is not None
        return x - sigma * forward(self._dit, x.to(self._dit.dtype), timestep, state.text, state).float()

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rollout's `dense_attention`, [B, L, H, D] in and out; every layer calls it for itself, then for text."""
        y = sdpa(q, k, v)
        if self._listens and not self._in_cross_attention:
            for arm in self.arms:
                found = self._instead(arm, q, k, v)
                flat = ((found - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).tolist()
                self.errors[arm.name][-1].append(flat)
        self._in_cross_attention = not self._in_cross_attention
        return y

    def _instead(self, arm: Arm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `arm` computes from the same tensors, in the order of their tokens."""
        options, sparsity = arm.attention, arm.growth[self._chunk] if arm.growth is not None else 0.0
        tokens = self._grid[0] * self._grid[1]
        if options.tiles:
            order = tile_order(*self._grid, options.block[1]).to(q.device)
            q, k, v = (x.unflatten(1, (-1, tokens)).index_select(2, order).flatten(1, 2) for x in (q, k, v))
        q_layout, k_layout = (FrameBlocks(tokens, size) for size in options.block)
        means = k_layout.block_means(k)
        plan = SelectionPlan.build(
            range(k.shape[1] // tokens),
            self._chunk_frames,
            k_layout,
            sparsity=sparsity,
            keep_frames=options.keep_frames if sparsity else k.shape[1],
            sink_frames=options.sink_frames,
            near_frames=options.near_frames,
            device=q.device,
        )
        selection = plan.select(
            q_layout.block_means(q),
            means,
            k_layout.frame_means(means),
            estimator=options.estimator,
            sub_means=sub_block_layout(k_layout).block_means(k) if options.estimator == "lse" else None,
        )
        tail: Any = (means, k_layout.block_means(v)) if options.tail else None
        scales = None
        if arm.kv.dtype != "same":
            (k, k_scales), (v, v_scales) = (quantise_blocks(x, k_layout, STORED[arm.kv.dtype]) for x in (k, v))
            scales = k_scales, v_scales
        y = sparse_attention(
            q,
            k,
            v,
            selection=selection,
            tokens_per_frame=tokens,
            block=options.block,
            backend=options.backend,
            scales=scales,
            tail=tail,
        )
        if options.tiles:
            y = y.unflatten(1, (-1, tokens)).index_select(2, order.argsort()).flatten(1, 2)
        return y
