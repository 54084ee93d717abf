"""Our ring of roped keys against the published long mode: un-roped keys, re-roped from 0 in every pass."""

from itertools import pairwise

import pytest
import torch

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise

from ...support import naive_wan as naive
from ...support.rollouts import roll

LAYERS, TEXT, HEIGHT, WIDTH = 2, 32, 4, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2
TOKENS = ROWS * COLUMNS


class UnropedCache:
    """A rolling cache by the book: it holds keys before RoPE, and positions count from the window's start."""

    def __init__(self, window, sinks):
        self.window, self.sinks = window, sinks
        self.frames = [([], []) for _ in range(LAYERS)]  # of each layer, per frame: keys, values [tokens, heads, 128]

    def attention(self, commit):
        """Self attention of a chunk: it sees the sinks, the newest past frames that fit, and itself."""

        def attend(layer, q, k, v):
            seen = []
            for held, new in zip(self.frames[layer], (k.split(TOKENS), v.split(TOKENS)), strict=True):
                recent = max(self.sinks, len(held) + len(new) - (self.window - self.sinks))
                seen.append([*held[: self.sinks], *held[recent:], *new])
                if commit:
                    held += new
            grid = torch.cartesian_prod(torch.arange(len(seen[0])), torch.arange(ROWS), torch.arange(COLUMNS))
            keys, values = map(torch.cat, seen)
            return naive.attend(naive.rope(q, grid[-len(q) :]), naive.rope(keys, grid), values)

        return attend


@pytest.mark.parametrize(("window", "sinks", "per_chunk", "frames"), [(7, 1, 3, 15), (8, 2, 2, 14), (3, 1, 1, 6)])
def test_following_sinks_give_the_published_rollout(window, sinks, per_chunk, frames):
    weights = random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=TEXT)
    context = torch.randn(1, 7, TEXT, generator=torch.Generator().manual_seed(1))
    sigmas = few_step_sigmas((1000, 500))
    ours = roll(
        wan_from_state_dict(weights, dtype=torch.float64),
        context,
        latent_shape=(1, 16, frames, HEIGHT, WIDTH),
        frames_per_chunk=per_chunk,
        sigmas=sigmas,
        window=window,
        sink_frames=sinks,
        sink_rope="follow",
        seed=4,
    )
    cache, draw = UnropedCache(window, sinks), seeded_noise(4)

    def flow(x, timestep, commit):
        times, attention = torch.full((x.shape[1],), timestep), cache.attention(commit)
        return naive.naive_forward(weights, x, times, context[0], LAYERS, self_attention=attention)

    for chunk in ours:
        shape = chunk.latents.shape
        x = draw(chunk.index, 0, shape)[0]
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            x0 = x - sigma * flow(x, 1000.0 * sigma, commit=False).float()
            if following:
                x = (1 - following) * x0 + following * draw(chunk.index, step + 1, shape)[0]
        flow(x0, 0.0, commit=True)
        torch.testing.assert_close(chunk.latents[0], x0, rtol=0, atol=1e-4)
