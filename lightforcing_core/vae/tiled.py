"""Decode a picture too large for one pass in blended tiles; each sees only itself, so frames are close, not equal."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..pinned import to_device
from .streaming import StreamingDecoder

OVERLAP = 8  # latent rows or columns that neighbouring tiles share: 64 pixels
SMALLEST = 16  # latent rows or columns of a tile; narrower ones would be mostly overlap


def most_tiles(height: int, width: int) -> int:
    """Tiles per side that latents of `height` × `width` can be cut into."""
    return max(1, (max(height, width) - OVERLAP) // (SMALLEST - OVERLAP))


def tile_spans(length: int, tiles: int) -> list[tuple[int, int]]:
    """(start, stop) of up to `tiles` equal tiles over `length` latents, neighbours sharing at least `OVERLAP`."""
    tiles = max(1, min(tiles, (length - OVERLAP) // (SMALLEST - OVERLAP)))
    size = -(-(length + (tiles - 1) * OVERLAP) // tiles)
    return [(start, start + size) for start in (i * (length - size) // max(1, tiles - 1) for i in range(tiles))]


class TiledDecoder:
    """Decode one clip tile by tile, called as a `StreamingDecoder` is.

    make: makes a decoder for one tile, whose cache is in CPU memory while other tiles decode.
    tiles: tiles along the height and along the width, 0 as 1; fewer if the picture is too small.
    """

    def __init__(self, make: Callable[[], StreamingDecoder], tiles: int) -> None:
        self._make, self._tiles = make, tiles
        self._decoders: dict[tuple[tuple[int, int], tuple[int, int]], StreamingDecoder] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes held between calls, on all devices."""
        return sum(decoder.cache_bytes for decoder in self._decoders.values())

    def decode(self, latents: Tensor, *, normalised: bool = True) -> Tensor:
        """Decode the next latents [B, 16, f, h, w] → frames [B, n, 8h, 8w, 3] in 0…1."""
        rows, columns = (tile_spans(size, self._tiles) for size in latents.shape[-2:])
        frames = None
        for row, row_weights in zip(rows, _fades(rows), strict=True):
            for column, column_weights in zip(columns, _fades(columns), strict=True):
                if (row, column) not in self._decoders:
                    self._decoders[row, column] = self._make()
                decoder = self._decoders[row, column]
                decoder.move_cache()
                tile = decoder.decode(latents[..., slice(*row), slice(*column)], normalised=normalised)
                if len(rows) * len(columns) > 1:
                    decoder.move_cache("cpu")
                if frames is None:
                    frames = tile.new_zeros(*tile.shape[:2], *(8 * size for size in latents.shape[-2:]), 3)
                down, across = (to_device(fade.to(tile.dtype), tile.device) for fade in (row_weights, column_weights))
                weights = down[:, None] * across
                place = frames[:, :, 8 * row[0] : 8 * row[1], 8 * column[0] : 8 * column[1]]
                place.addcmul_(tile, weights[:, :, None])
        assert frames is not None
        return frames


def _fades(spans: list[tuple[int, int]]) -> list[Tensor]:
    """Weights per pixel along a side, float32: ramps over shared pixels, 1 elsewhere."""
    fades = [torch.ones(8 * (stop - start)) for start, stop in spans]
    for (before, after), ((_, stop), (start, _)) in zip(pairwise(fades), pairwise(spans), strict=True):
        shared = 8 * (stop - start)
        ramp = (torch.arange(shared) + 0.5) / shared
        before[-shared:], after[:shared] = 1 - ramp, ramp
    return fades
