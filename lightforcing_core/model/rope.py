"""Wan's three-axis rotary position embedding, for tokens and for stored keys.

A head's D/2 pairs (2i, 2i+1) are split into temporal, height and width pairs; each axis has its own frequencies
`θ_j = 10000^(−2j/d_axis)` over its own width d_axis (Wan 2.1; D = 128 gives 44, 42, 42). Angles are computed in
float64, so no frame index is too large.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from ..pinned import to_device

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Width of the temporal, height and width parts of one head, in channels."""
    sixth = 2 * (head_dim // 6)
    return head_dim - 2 * sixth, sixth, sixth


def _angles(positions: Tensor, dim: int) -> Tensor:
    """float64 angles [n, dim/2] of positions [n]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return positions.to(torch.float64)[:, None] * (1.0 / THETA**exponents)


WITHOUT_FLOAT64 = ("mps", "xpu")  # devices that cannot compute in it, at least some


class RopeTable:
    """cos and sin of the tokens of latent frames at `positions` in time.

    The tokens of a frame are `height` × `width` patches, width fastest, or in `order`, see `blocks.tile_order`.
    cos, sin: [1, L, 1, D/2] in `dtype`.
    """

    def __init__(
        self,
        positions: Sequence[int],
        height: int,
        width: int,
        head_dim: int,
        *,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        place = "cpu" if torch.empty(0, device=device).device.type in WITHOUT_FLOAT64 else device
        rows, columns = (torch.arange(size, device=place) for size in (height, width))
        tokens = torch.cartesian_prod(to_device(torch.tensor(positions), place), rows, columns).unbind(1)
        pairs = zip(tokens, axis_dims(head_dim), strict=True)
        angles = torch.cat([_angles(position, dim) for position, dim in pairs], dim=-1)
        if order is not None:
            angles = angles.unflatten(0, (len(positions), -1))[:, order.to(angles.device)].flatten(0, 1)
        angles = angles[None, :, None]
        self.cos, self.sin = (table.to(dtype).to(device) for table in (angles.cos(), angles.sin()))

    def back(self, tokens: Tensor | slice) -> "RopeTable":
        """The opposite rotation, of some tokens: a slice of them, or their ids [B, L] in each video."""
        table = copy(self)
        table.cos, table.sin = self.cos[0, tokens], -self.sin[0, tokens]
        return table

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x [B, L, H, D] by its tokens' angles in the table's dtype; returns x's."""
        pairs = x.to(self.cos.dtype).unflatten(-1, (-1, 2))
        first, second = pairs.unbind(-1)
        rotated = torch.stack(
            (
                torch.addcmul(first * self.cos, second, self.sin, value=-1),
                torch.addcmul(first * self.sin, second, self.cos),
            ),
            dim=-1,
        )
        return rotated.flatten(-2).to(x.dtype)
