"""Our ring of roped keys against the published long mode: un-roped keys, re-roped from 0 in every pass."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise

from ...support import naive_wan as naive
from ...support.rollouts import roll

LAYERS, TEXT, HEIGHT, WIDTH = 2, 32, 4, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2
TOKENS = ROWS * COLUMNS


class UnropedWan:
    """A rolling model by the book: the cache holds keys before RoPE, positions count from the window's start."""

    def __init__(self, weights, context, window, sinks):
        self.w = {key: value.double() for key, value in weights.items()}
        self.window, self.sinks = window, sinks
        text = naive.linear(context.double(), self.w, "text_embedding.0")
        self.text = naive.linear(F.gelu(text, approximate="tanh"), self.w, "text_embedding.2")
        self.cache = [([], []) for _ in range(LAYERS)]  # per frame: [tokens, heads, 128]

    def heads(self, x, name, norm=None):
        x = naive.linear(x, self.w, name)
        return (naive.rms(x, self.w[f"{norm}.weight"]) if norm else x).unflatten(1, (-1, naive.HEAD))

    def flow(self, latents, timestep, commit):
        """[C, n, h, w] → flow; the chunk sees the sinks, the newest past frames that fit, and itself."""
        frames = latents.shape[1]
        patches = latents.float().unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(3)
        embedding = self.w["patch_embedding.weight"].float().flatten(1)
        x = (patches @ embedding.T + self.w["patch_embedding.bias"].float()).double().flatten(0, 2)
        half = self.w["time_embedding.0.weight"].shape[1] // 2
        angles = timestep / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
        e = naive.linear(torch.cat([angles.cos(), angles.sin()])[None], self.w, "time_embedding.0")
        e = naive.linear(F.silu(e), self.w, "time_embedding.2")
        e0 = naive.linear(F.silu(e), self.w, "time_projection.1").unflatten(1, (6, -1))
        for layer in range(LAYERS):
            name, dim = f"blocks.{layer}", x.shape[1]
            m = (self.w[f"{name}.modulation"] + e0)[0]
            y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[1]) + m[0]
            q = self.heads(y, f"{name}.self_attn.q", f"{name}.self_attn.norm_q")
            k = list(self.heads(y, f"{name}.self_attn.k", f"{name}.self_attn.norm_k").split(TOKENS))
            v = list(self.heads(y, f"{name}.self_attn.v").split(TOKENS))
            past_k, past_v = self.cache[layer]
            recent = max(self.sinks, len(past_k) + frames - (self.window - self.sinks))
            keys = [*past_k[: self.sinks], *past_k[recent:], *k]
            values = [*past_v[: self.sinks], *past_v[recent:], *v]
            grid = torch.cartesian_prod(torch.arange(len(keys)), torch.arange(ROWS), torch.arange(COLUMNS))
            y = naive.attend(
                naive.rope(q, grid[-frames * TOKENS :]), naive.rope(torch.cat(keys), grid), torch.cat(values)
            )
            x = x + naive.linear(y, self.w, f"{name}.self_attn.o") * m[2]
            y = F.layer_norm(x, (dim,), self.w[f"{name}.norm3.weight"], self.w[f"{name}.norm3.bias"], 1e-6)
            q = self.heads(y, f"{name}.cross_attn.q", f"{name}.cross_attn.norm_q")
            k_text = self.heads(self.text, f"{name}.cross_attn.k", f"{name}.cross_attn.norm_k")
            y = naive.attend(q, k_text, self.heads(self.text, f"{name}.cross_attn.v"))
            x = x + naive.linear(y, self.w, f"{name}.cross_attn.o")
            y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[4]) + m[3]
            y = F.gelu(naive.linear(y, self.w, f"{name}.ffn.0"), approximate="tanh")
            x = x + naive.linear(y, self.w, f"{name}.ffn.2") * m[5]
            if commit:
                past_k += k
                past_v += v
        shift, scale = (self.w["head.modulation"] + e[:, None])[0]
        y = naive.linear(F.layer_norm(x, (x.shape[1],), eps=1e-6) * (1 + scale) + shift, self.w, "head.head")
        y = y.view(frames, ROWS, COLUMNS, 2, 2, -1)
        return torch.einsum("fhwpqc->cfhpwq", y).reshape(-1, frames, HEIGHT, WIDTH)


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
    model, draw = UnropedWan(weights, context[0], window, sinks), seeded_noise(4)
    for chunk in ours:
        shape = chunk.latents.shape
        x = draw(chunk.index, 0, shape)[0]
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            x0 = x - sigma * model.flow(x, 1000.0 * sigma, commit=False).float()
            if following:
                x = (1 - following) * x0 + following * draw(chunk.index, step + 1, shape)[0]
        model.flow(x0, 0.0, commit=True)
        torch.testing.assert_close(chunk.latents[0], x0, rtol=0, atol=1e-4)
