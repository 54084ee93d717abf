"""Decode in tiles: the frames stay close to those of one go, join without a seam, and stream."""

from itertools import pairwise

import pytest
import torch

from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.tiled import OVERLAP, SMALLEST, TiledDecoder, _fades, most_tiles, tile_spans
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict


@pytest.fixture(scope="module")
def vae():
    return vae_from_state_dict(random_vae_state_dict(dim=4, seed=0))


def latents(frames, height=24, width=33, batch=1):
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 7, 16, 17, 31, 60, 104])
@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
def test_tiles_cover_a_side_share_enough_and_have_weights_that_add_up_to_one(length, tiles):
    spans = tile_spans(length, tiles)
    assert len(spans) <= tiles
    assert (spans[0][0], spans[-1][1]) == (0, length)
    assert len({stop - start for start, stop in spans}) == 1
    for (_, stop), (start, _) in pairwise(spans):
        assert stop - start >= OVERLAP
    if len(spans) > 1:
        assert spans[0][1] >= SMALLEST
    assert len(tile_spans(length, 100)) <= most_tiles(length, length)
    total = torch.zeros(8 * length)
    for (start, stop), fade in zip(spans, _fades(spans), strict=True):
        assert (fade > 0).all()
        total[8 * start : 8 * stop] += fade
    torch.testing.assert_close(total, torch.ones_like(total))


def test_frames_equal_each_tile_decoded_alone_where_tiles_do_not_meet(vae):
    x = latents(3)
    tiled = TiledDecoder(lambda: StreamingDecoder(vae), 2).decode(x)
    (top, bottom), (left, right) = tile_spans(24, 2), tile_spans(33, 2)
    alone = StreamingDecoder(vae).decode(x[..., slice(*bottom), slice(*left)])
    own_rows, own_columns = slice(8 * top[1], 8 * 24), slice(0, 8 * right[0])
    assert torch.equal(tiled[:, :, own_rows, own_columns], alone[:, :, 8 * (top[1] - bottom[0]) :, : 8 * right[0]])
    small = latents(2, 8, 10)  # one tile
    assert torch.equal(
        TiledDecoder(lambda: StreamingDecoder(vae), 4).decode(small), StreamingDecoder(vae).decode(small)
    )


def test_a_clip_cut_into_calls_equals_one_call(vae):
    x = latents(3, height=16, width=25)
    whole = TiledDecoder(lambda: StreamingDecoder(vae), 2).decode(x)
    decoder = TiledDecoder(lambda: StreamingDecoder(vae), 2)
    pieces = [decoder.decode(piece) for piece in x.split((1, 2), dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=0)
    assert decoder.cache_bytes > 0


def test_a_decoder_that_looks_around_a_little_gives_the_same_frames_tiled(vae):
    """Without the one layer that sees the whole picture, tiles differ from one go at their edges only, and fade."""
    near = vae_from_state_dict(random_vae_state_dict(dim=4, seed=0))
    near.decoder.middle[1] = torch.nn.Identity()
    x = latents(2, 32, 40)
    whole = StreamingDecoder(near).decode(x)
    tiled = TiledDecoder(lambda: StreamingDecoder(near), 2).decode(x)
    assert (tiled - whole).abs().mean() < 0.02 * whole.std()


@pytest.mark.parametrize(("tiles", "moves"), [(1, [None] * 2), (2, [None, "cpu"] * 8)])
def test_only_the_tile_at_work_keeps_its_past_on_the_device(vae, monkeypatch, tiles, moves):
    made = []
    monkeypatch.setattr(StreamingDecoder, "move_cache", lambda self, device=None: made.append(device))
    decoder = TiledDecoder(lambda: StreamingDecoder(vae), tiles)
    for piece in latents(2).split(1, dim=2):
        decoder.decode(piece)
    assert made == moves
