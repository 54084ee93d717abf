"""An independent Wan forward for tests: no cache, one masked pass over the whole sequence, complex RoPE, float64."""

import torch
import torch.nn.functional as F

HEAD = 128


def rope(x, positions):
    """x [L, H, 128], positions [L, 3] as (frame, row, column)."""
    angles = []
    for axis, dim in enumerate((44, 42, 42)):
        frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis : axis + 1].double() * frequency)
    phase = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=1))
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * phase[:, None]).flatten(-2)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(q, k, v, mask=None):
    """[L, H, 128] each; mask bool [Lq, Lk]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def naive_forward(weights, latents, frame_timesteps, context, layers, *, frame_mask=None, self_attention=None):
    """Flow of every frame, [C, F, h, w].

    latents [C, F, h, w], frame_timesteps [F], context [tokens, text_dim]. Either frame_mask [F, F] says which frames
    see which, or self_attention(layer, q, k, v) gives the result of q, k, v [L, H, 128] before RoPE.
    """
    weights = {key: value.double() for key, value in weights.items()}
    _, frames, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = rows * columns
    patches = latents.float().unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(3)
    embedding = weights["patch_embedding.weight"].float().flatten(1)
    x = (patches @ embedding.T + weights["patch_embedding.bias"].float()).double().flatten(0, 2)
    if self_attention is None:
        positions = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
        mask = frame_mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

        def self_attention(layer, q, k, v):
            return attend(rope(q, positions), rope(k, positions), v, mask)

    half = weights["time_embedding.0.weight"].shape[1] // 2
    angles = frame_timesteps.double()[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    e = torch.cat([angles.cos(), angles.sin()], dim=1)
    e = linear(F.silu(linear(e, weights, "time_embedding.0")), weights, "time_embedding.2")
    e0 = linear(F.silu(e), weights, "time_projection.1").unflatten(1, (6, -1))
    text = linear(context.double(), weights, "text_embedding.0")
    text = linear(F.gelu(text, approximate="tanh"), weights, "text_embedding.2")

    dim = x.shape[1]
    for layer in range(layers):
        name = f"blocks.{layer}"
        m = (weights[f"{name}.modulation"] + e0).repeat_interleave(tokens, 0).unbind(1)

        def heads(y, projection, norm=None, name=name):
            y = linear(y, weights, f"{name}.{projection}")
            if norm:
                y = rms(y, weights[f"{name}.{norm}.weight"])
            return y.unflatten(1, (-1, HEAD))

        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[1]) + m[0]
        q, k = (heads(y, f"self_attn.{part}", f"self_attn.norm_{part}") for part in "qk")
        y = self_attention(layer, q, k, heads(y, "self_attn.v"))
        x = x + linear(y, weights, f"{name}.self_attn.o") * m[2]

        y = F.layer_norm(x, (dim,), weights[f"{name}.norm3.weight"], weights[f"{name}.norm3.bias"], 1e-6)
        q = heads(y, "cross_attn.q", "cross_attn.norm_q")
        k = heads(text, "cross_attn.k", "cross_attn.norm_k")
        x = x + linear(attend(q, k, heads(text, "cross_attn.v")), weights, f"{name}.cross_attn.o")

        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[4]) + m[3]
        y = linear(F.gelu(linear(y, weights, f"{name}.ffn.0"), approximate="tanh"), weights, f"{name}.ffn.2")
        x = x + y * m[5]

    shift, scale = (weights["head.modulation"] + e[:, None]).repeat_interleave(tokens, 0).unbind(1)
    y = linear(F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift, weights, "head.head")
    y = y.view(frames, rows, columns, 2, 2, -1)
    return torch.einsum("fhwpqc->cfhpwq", y).reshape(-1, frames, height, width)
