"""Videos by the book: every key before RoPE and every value is held, and roped anew in every pass."""

from itertools import pairwise

import torch

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise

from ...support import naive_wan as naive
from ...support.rollouts import TEXT, roll, text

LAYERS, ROWS, COLUMNS, SEED = 2, 2, 3, 4
TOKENS = ROWS * COLUMNS


def assert_video_sees(shown, frames, given=None, prompts=None, place=None, **options):
    """Assert that the rollout's video is the one whose chunks see `shown(past, length)`: {place in time: frame}.

    past: frames before the chunk. length: its own frames, whose places follow, or begin at `place(past)`.
    given: latents at the start. prompts: of the rollout, all of them `text(1)`.
    """
    weights = random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=TEXT)
    dit, shape = wan_from_state_dict(weights, dtype=torch.float64), (1, 16, frames, 2 * ROWS, 2 * COLUMNS)
    held = [([], []) for _ in range(LAYERS)]  # of each layer, per frame: keys, values [tokens, heads, 128]
    sigmas, draw = few_step_sigmas((1000, 500)), seeded_noise(SEED)

    def flow(x, timestep, commit=False):
        def attend(layer, q, k, v):
            past = shown(len(held[layer][0]), len(k) // TOKENS)
            first = place(len(held[layer][0])) if place else max(past, default=-1) + 1
            places = torch.tensor([*past, *range(first, first + len(k) // TOKENS)])
            keys, values = held[layer]
            seen = [torch.cat([*map(one.__getitem__, past.values()), new]) for one, new in ((keys, k), (values, v))]
            if commit:
                keys += k.split(TOKENS)
                values += v.split(TOKENS)
            grid = torch.cartesian_prod(places, torch.arange(ROWS), torch.arange(COLUMNS))
            return naive.attend(naive.rope(q, grid[-len(q) :]), naive.rope(seen[0], grid), seen[1])

        times = torch.full((x.shape[1],), timestep)
        return naive.naive_forward(weights, x, times, text(1)[0], LAYERS, self_attention=attend)

    if given is not None:
        flow(given[0], 0.0, commit=True)
    options |= {"latent_shape": shape, "sigmas": sigmas, "seed": SEED, "initial_latents": given}
    for chunk in roll(dit, prompts or text(1), **options):
        shape = chunk.latents.shape
        x = draw(chunk.index, 0, shape)[0]
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            x0 = x - sigma * flow(x, 1000.0 * sigma).float()
            if following:
                x = (1 - following) * x0 + following * draw(chunk.index, step + 1, shape)[0]
        flow(x0, 0.0, commit=True)
        torch.testing.assert_close(chunk.latents[0], x0, rtol=0, atol=1e-4)
