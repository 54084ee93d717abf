"""The error that sparse attention makes in each layer, on the very queries, keys and values of a dense rollout.

The probe replaces the rollout's dense attention: it computes that and, at the last denoising step of every chunk, also
the result of each arm.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightforcing.benchmarks.layer import LayerAttention
from lightforcing.lightforcing_core.attention.backends.dense import sdpa
from lightforcing.lightforcing_core.attention.blocks import tile_order
from lightforcing.lightforcing_core.model.causal import Pass
from lightforcing.lightforcing_core.model.wan import Wan

from .arms import Arm


def is_probed(arm: Arm) -> bool:
    """Whether an arm changes attention itself, without roles of heads, which whole runs decide."""
    if arm.attention.head_rule is not None:
        return False
    return not arm.is_long and not arm.fp8 and (arm.growth is not None or arm.kv.dtype != "same")


class AttentionProbe:
    """Dense attention that also measures. `errors[arm]` holds, chunk by chunk and layer by layer, an error per video.

    dit: the model that runs. grid: rows and columns of a frame's tokens. last_sigma: the noise level of a chunk's last
    step. arms: those to be measured, with the growth of each.
    """

    def __init__(self, dit: Wan, grid: tuple[int, int], last_sigma: float, arms: Iterable[Arm]) -> None:
        self.arms = [arm for arm in arms if is_probed(arm)]
        self.errors: dict[str, list[list[list[float]]]] = {arm.name: [] for arm in self.arms}
        self._dit, self._grid, self._last_sigma = dit, grid, last_sigma
        self._measures, self._in_cross_attention, self._chunk = False, False, -1

    def denoise(self, x: Tensor, sigma: float, passes: Sequence[Pass]) -> Tensor:
        """The rollout's `denoise`, which knows the step that the calls of `attention` inside belong to."""
        self._measures, self._in_cross_attention = not passes[0].commits and sigma == self._last_sigma, False
        if self._measures:
            self._chunk += 1
            for chunks in self.errors.values():
                chunks.append([])
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=x.device)
        return x - sigma * passes[0](self._dit, x.to(self._dit.dtype), timestep).float()

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rollout's `dense_attention`, [B, L, H, D] in and out. Every layer calls it for itself, then for text."""
        y = sdpa(q, k, v)
        if self._measures and not self._in_cross_attention:
            for arm in self.arms:
                difference = self._of_arm(arm, q, k, v) - y
                self.errors[arm.name][-1].append(
                    (difference.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).tolist()
                )
        self._in_cross_attention = not self._in_cross_attention
        return y

    def _of_arm(self, arm: Arm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of `arm` over the same tensors, in the order of their tokens."""
        options = arm.attention
        if options.tiles:
            order = tile_order(*self._grid, options.block[1]).to(q.device)
            q, k, v = (_permuted(x, order) for x in (q, k, v))
        sparsity = arm.growth[self._chunk] if arm.growth is not None else 0.0
        layer = LayerAttention(q, k, v, grid=self._grid, sparsity=sparsity, options=options, kv=arm.kv.dtype)
        y = layer.arm()()
        return _permuted(y, order.argsort()) if options.tiles else y


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of every frame of x [B, L, H, D] in another order."""
    return x.unflatten(1, (-1, len(order))).index_select(2, order).flatten(1, 2)
