"""What training computes is what the pack computes at run time."""

import pytest
import torch

from laboratory.training.recipe import PRESETS
from laboratory.training.train_ar import new_model
from laboratory.training.train_vae import fold_statistics, latent_statistics, new_vae
from laboratory.training.whole_clip import decode_clip, encode_clip, teacher_forced
from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.model.causal import ModelState, commit, predict
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder, StreamingEncoder
from lightforcing.lightforcing_core.vae.wan_vae import normalise_latents


@pytest.fixture(scope="module")
def vae():
    return new_vae(4, seed=3).double().requires_grad_(False)


def video_of(frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, frames, 16, 24, 3, generator=generator, dtype=torch.float64)


def planes(video):
    return video.permute(0, 4, 1, 2, 3) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clip_encode_equals_the_streaming_one(vae, frames):
    video = video_of(frames)
    mean, log_variance = encode_clip(vae, planes(video))
    torch.testing.assert_close(mean, StreamingEncoder(vae).encode(video, normalised=False))
    assert log_variance.shape == mean.shape == (1, 16, 1 + (frames - 1) // 4, 2, 3)


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_whole_clip_decode_equals_the_streaming_one(vae, latent_frames):
    latents = torch.randn(1, 16, latent_frames, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = decode_clip(vae, latents).permute(0, 2, 3, 4, 1) / 2 + 0.5
    torch.testing.assert_close(whole.clamp(0, 1), StreamingDecoder(vae).decode(latents, normalised=False))
    assert ((whole > 0) & (whole < 1)).double().mean() > 0.05  # the clamp left something to compare


def test_whole_clip_has_gradients_everywhere():
    vae = new_vae(2, seed=0)
    mean, log_variance = encode_clip(vae, planes(video_of(5).float()))
    (decode_clip(vae, mean).square().mean() + log_variance.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_folded_statistics_give_unit_latents_and_the_same_pictures(vae):
    folded = new_vae(4, seed=3).double().requires_grad_(False)
    videos = torch.cat([planes(video_of(5, seed)) for seed in range(6)])
    before_mean, before_variance = encode_clip(folded, videos)
    pictures = decode_clip(folded, before_mean)
    mean, std = latent_statistics(folded, videos)
    fold_statistics(folded, mean.double(), std.double())
    after_mean, after_variance = encode_clip(folded, videos)
    torch.testing.assert_close(decode_clip(folded, after_mean), pictures)
    latents = normalise_latents(after_mean)
    faint = std < 0.1 * std.median()
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16, dtype=torch.float64), atol=1e-5, rtol=0)
    spread = latents.transpose(0, 1).flatten(1).std(1)[~faint]
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-4, rtol=0)
    # Standard deviations scale with the means.
    ratio = (0.5 * (after_variance - before_variance)).exp()
    scale = (after_mean - after_mean.mean((0, 2, 3, 4), True)) / (before_mean - before_mean.mean((0, 2, 3, 4), True))
    torch.testing.assert_close(ratio, scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("frames", "per_chunk"), [(6, 3), (4, 1), (5, 3)])
def test_teacher_forcing_equals_the_rollout_with_its_cache(frames, per_chunk):
    weights = random_state_dict(dim=256, ffn_dim=128, layers=2, text_dim=16)
    dit = wan_from_state_dict(weights)
    generator = torch.Generator().manual_seed(5)
    noisy, clean = torch.randn(2, 2, 16, frames, 4, 6, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    lengths = [min(per_chunk, frames - start) for start in range(0, frames, per_chunk)]
    levels = [900.0 - 150 * index for index in range(len(lengths))]
    timesteps = torch.tensor([[t for t, n in zip(levels, lengths, strict=True) for _ in range(n)]]).expand(2, -1)
    got = teacher_forced(dit, noisy, clean, timesteps, context, frames_per_chunk=per_chunk)

    shape = CacheShape(layers=2, batch=2, slots=frames, tokens_per_frame=6, heads=2, head_dim=128)
    state = ModelState(KVCache(shape), AttentionOptions())
    state.follow(context)
    start = 0
    for level, length in zip(levels, lengths, strict=True):
        part = slice(start, start + length)
        state.open_chunk(length, 0.0, None)
        want = predict(dit, noisy[:, :, part], torch.full((2,), level), state)
        torch.testing.assert_close(got[:, :, part], want, atol=2e-5, rtol=1e-4)
        commit(dit, clean[:, :, part], torch.zeros(2), state)
        start += length


def test_new_model_fits_the_published_layout_and_starts_silent():
    recipe = PRESETS["tiny"]
    model = new_model(recipe)
    assert wan_from_state_dict(model.state_dict()).dim == recipe.dim
    x = torch.randn(1, 16, 3, 4, 6)
    flow = teacher_forced(
        model, x, x, torch.full((1, 3), 500.0), torch.randn(1, 4, recipe.text_dim), frames_per_chunk=3
    )
    assert not flow.any()
