"""Whole-clip forms of the VAE and the model, with gradients, which training runs instead of the chunk-wise code.

Both drive the same module trees as `vae.streaming` and `model.causal`, and the tests compare their values.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lightforcing.lightforcing_core.model.causal import _modulations, _sinusoid, _unpatchify
from lightforcing.lightforcing_core.model.rope import RopeTable
from lightforcing.lightforcing_core.model.wan import HEAD_DIM, Wan
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE


def encode_clip(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video [B, 3, 1 + 4k, H, W] in −1…1 → mean and log-variance of its raw latents, [B, 16, 1 + k, H/8, W/8]."""
    encoder = vae.encoder
    layers = (encoder.conv1, *encoder.downsamples, *encoder.middle, *encoder.head, vae.conv1)
    mean, log_variance = _through(layers, video).chunk(2, dim=1)
    return mean, log_variance


def decode_clip(vae: WanVAE, latents: Tensor) -> Tensor:
    """Raw latents [B, 16, 1 + k, h, w] → video [B, 3, 1 + 4k, 8h, 8w], about −1…1, not clamped."""
    decoder = vae.decoder
    return _through((vae.conv2, decoder.conv1, *decoder.middle, *decoder.upsamples, *decoder.head), latents)


def _through(layers: Iterable[Any], x: Tensor) -> Tensor:
    for layer in layers:
        if hasattr(layer, "residual"):
            x = _through(layer.residual, x) + layer.shortcut(x)
        else:
            x = _resample(layer, x) if hasattr(layer, "resample") else layer(x)
    return x


def _resample(layer: Any, x: Tensor) -> Tensor:
    """A change of size, and of the frame rate for all frames but a clip's first."""
    time_conv = getattr(layer, "time_conv", None)
    grows = time_conv is not None and time_conv.stride[0] == 1
    if grows and x.shape[2] > 1:
        later = rearrange(time_conv(x[:, :, 1:]), "b (two c) t h w -> b c (t two) h w", two=2)
        x = torch.cat([x[:, :, :1], later], dim=2)
    frames = x.shape[2]
    x = layer.resample(rearrange(x, "b c t h w -> (b t) c h w"))
    x = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
    if time_conv is None or grows or frames == 1:
        return x
    return torch.cat([x[:, :, :1], time_conv(x)], dim=2)


def teacher_forced(
    dit: Wan, noisy: Tensor, clean: Tensor, timesteps: Tensor, context: Tensor, *, frames_per_chunk: int
) -> Tensor:
    """The flow of every chunk behind clean history, of all chunks at once; a rollout computes them one by one.

    noisy, clean: [B, 16, F, h, w], the chunks to denoise and those that later chunks see (committed at timestep 0;
    nothing sees the last one).
    timesteps: [B, F] on the 0…1000 scale, of the noisy frames.
    context: [B, tokens, text_dim].
    A noisy chunk sees itself and all clean chunks before it, a clean one itself and those before it. Returns
    [B, 16, F, h, w].
    """
    batch, _, frames, height, width = noisy.shape
    grid = (frames, height // 2, width // 2)
    per_chunk = frames_per_chunk * grid[1] * grid[2]
    past = (frames - 1) // frames_per_chunk * frames_per_chunk
    seen = past * grid[1] * grid[2]  # tokens of history
    both = torch.cat([clean[:, :, :past], noisy], dim=2)
    x = dit.patch_embedding(both).flatten(2).transpose(1, 2).float()  # autocast keeps the residual stream in float32
    steps = torch.cat([torch.zeros_like(timesteps[:, :past]), timesteps], dim=1)
    e = dit.time_embedding(_sinusoid(dit.freq_dim, steps.flatten())).unflatten(0, (batch, -1))
    e0 = dit.time_projection(e).unflatten(2, (6, -1))
    text = dit.text_embedding(context)
    table = RopeTable(range(grid[0]), *grid[1:], HEAD_DIM, dtype=torch.float32, device=noisy.device)
    cos, sin = (torch.cat([t[:, :seen], t], dim=1) for t in (table.cos, table.sin))

    for block in dit.blocks:
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = _modulations([block.modulation], e0)
        y = _self_attention(
            block.self_attn, _modulated(block.norm1(x), scale_sa, shift_sa), (cos, sin), seen, per_chunk
        )
        x = x + _per_frame(y, gate_sa)
        x = x + _cross_attention(block.cross_attn, block.norm3(x), text)
        y = block.ffn(_modulated(block.norm2(x), scale_ffn, shift_ffn))
        x = x + _per_frame(y, gate_ffn)

    shift, scale = _modulations([dit.head.modulation], e[:, past:].unsqueeze(2))
    return _unpatchify(dit.head.head(_modulated(dit.head.norm(x[:, seen:]), scale, shift)), grid)


def _per_frame(x: Tensor, gate: Tensor) -> Tensor:
    """x [B, F · tokens, D] times a gate [B, F, D]."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = x.unflatten(1, (scale.shape[1], -1))
    return (x * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D] rotated by its tokens' angles, in float32."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


def _self_attention(attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], seen: int, per_chunk: int) -> Tensor:
    """Attention over `seen` clean and then all noisy tokens, [B, L, D]; a dense call per chunk needs no mask."""
    heads = (attention.num_heads, HEAD_DIM)
    v = attention.v(x).unflatten(-1, heads)
    q = _rotated(attention.norm_q(attention.q(x)).unflatten(-1, heads), *rope).to(v.dtype)
    k = _rotated(attention.norm_k(attention.k(x)).unflatten(-1, heads), *rope).to(v.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    clean, noisy = [], []
    for start in range(0, q.shape[2] - seen, per_chunk):
        end = min(start + per_chunk, q.shape[2] - seen)
        own = slice(seen + start, seen + end)
        if end <= seen:
            clean.append(_attended(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
        seen_k = torch.cat([k[:, :, :start], k[:, :, own]], dim=2)
        seen_v = torch.cat([v[:, :, :start], v[:, :, own]], dim=2)
        noisy.append(_attended(q[:, :, own], seen_k, seen_v))
    return attention.o(torch.cat([*clean, *noisy], dim=2).transpose(1, 2).flatten(2))


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; on CPUs written out, since torch's fused one takes a quarter of a training step there."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return weights.to(v.dtype) @ v


def _cross_attention(attention: Any, x: Tensor, text: Tensor) -> Tensor:
    heads = (attention.num_heads, HEAD_DIM)
    v = attention.v(text).unflatten(-1, heads)
    q = attention.norm_q(attention.q(x)).unflatten(-1, heads).to(v.dtype)
    k = attention.norm_k(attention.k(text)).unflatten(-1, heads).to(v.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return attention.o(_attended(q, k, v).transpose(1, 2).flatten(2))
