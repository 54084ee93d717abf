"""The whole training at its tiniest: its files load, and an interrupted run equals an uninterrupted one.

The whole-clip forms that it runs give the values that the pack computes chunk by chunk.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from laboratory.training.__main__ import run
from laboratory.training.recipe import PRESETS
from laboratory.training.stage import Session
from laboratory.training.train_vae import fold_statistics, latent_statistics, new_vae
from laboratory.training.whole_clip import decode_clip, encode_clip, teacher_forced
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.checkpoint.load import load_dit_state_dict
from lightforcing.lightforcing_core.demo.captions import VOCABULARY
from lightforcing.lightforcing_core.demo.model import DIT, TEXT, VAE, load_demo_model
from lightforcing.lightforcing_core.model.causal import ModelState, commit, predict
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder, StreamingEncoder
from lightforcing.lightforcing_core.vae.wan_vae import normalise_latents, vae_from_state_dict

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")
WEIGHT = "blocks.0.ffn.0.weight"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run(TINY, Session(folder, CPU))


def rows(folder, stage):
    return [{**json.loads(line), "seconds": None} for line in (folder / f"{stage}.jsonl").read_text().splitlines()]


def checkpoint(folder, stage):
    return torch.load(folder / f"{stage}.pt", weights_only=True)


def test_training_writes_models_that_the_pack_loads(uninterrupted):
    folder, counts = uninterrupted
    state_dict, info = load_dit_state_dict(folder / "models" / DIT)
    assert info.causal_metadata
    assert wan_from_state_dict(state_dict).dim == TINY.model.dim
    assert vae_from_state_dict(load_file(folder / "models" / VAE)).dim == TINY.vae.dim
    with safe_open(folder / "models" / TEXT, "pt") as file:
        assert json.loads(file.metadata()["vocabulary"]) == list(VOCABULARY)
        assert file.get_tensor("words").shape == (len(VOCABULARY), TINY.model.text_dim)
    with safe_open(folder / "models" / DIT, "pt") as file:
        transformer = json.loads(file.metadata()["config"])["transformer"]
        assert transformer == {"causal_ar": True, "text_dim": TINY.model.text_dim}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    verdicts = json.loads((folder / "models" / "evaluation.json").read_text())
    assert set(counts) == set(verdicts) == {"dense first", "sparse first", "dense second", "sparse second"}
    assert load_demo_model(folder / "models").video == TINY.video
    assert (folder / "curves.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="another recipe"):
        run(replace(TINY, seed=1), Session(folder, CPU))


def test_interrupted_run_equals_the_uninterrupted_one(uninterrupted, tmp_path):
    # Before a first checkpoint, between two, and in the stages that continue from another.
    stops = {("vae", 1), ("ar", 3), ("second", 1), ("few", 1)}

    def stop(stage, step, values):
        if (stage, step) in stops:
            stops.remove((stage, step))
            raise KeyboardInterrupt

    session = Session(tmp_path, CPU, stop)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(TINY, session, last="few")
    run(TINY, session, last="few")
    assert not stops
    for stage in ("vae", "ar", "second", "few"):
        assert rows(tmp_path, stage) == rows(uninterrupted[0], stage)
    for name in (DIT, VAE, TEXT):
        mine, theirs = (load_file(folder / "models" / name) for folder in (tmp_path, uninterrupted[0]))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_whole_clips_equal_streamed_ones(latent_frames):
    vae = new_vae(4, seed=3).double().requires_grad_(False)
    video = normal(1, 4 * latent_frames - 3, 16, 24, 3, dtype=torch.float64).sigmoid()
    mean, log_variance = encode_clip(vae, video.permute(0, 4, 1, 2, 3) * 2 - 1)
    torch.testing.assert_close(mean, StreamingEncoder(vae).encode(video, normalised=False))
    assert log_variance.shape == mean.shape == (1, 16, latent_frames, 2, 3)
    latents = normal(1, 16, latent_frames, 2, 3, dtype=torch.float64)
    whole = decode_clip(vae, latents).permute(0, 2, 3, 4, 1) / 2 + 0.5
    torch.testing.assert_close(whole.clamp(0, 1), StreamingDecoder(vae).decode(latents, normalised=False))
    assert ((whole > 0) & (whole < 1)).double().mean() > 0.05  # the clamp left something to compare


def test_folded_statistics_give_unit_latents_and_the_same_pictures():
    vae = new_vae(4, seed=3).double().requires_grad_(False)
    videos = torch.cat([normal(1, 3, 5, 16, 24, seed=seed, dtype=torch.float64).tanh() for seed in range(6)])
    before_mean, before_variance = encode_clip(vae, videos)
    pictures = decode_clip(vae, before_mean)
    mean, std = latent_statistics(vae, videos)
    fold_statistics(vae, mean.double(), std.double())
    after_mean, after_variance = encode_clip(vae, videos)
    torch.testing.assert_close(decode_clip(vae, after_mean), pictures)
    latents, faint = normalise_latents(after_mean), std < 0.1 * std.median()
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16, dtype=torch.float64), atol=1e-5, rtol=0)
    spread = latents.transpose(0, 1).flatten(1).std(1)[~faint]
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-4, rtol=0)
    # Standard deviations scale with the means.
    ratio = (0.5 * (after_variance - before_variance)).exp()
    scale = (after_mean - after_mean.mean((0, 2, 3, 4), True)) / (before_mean - before_mean.mean((0, 2, 3, 4), True))
    torch.testing.assert_close(ratio, scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("frames", "per_chunk"), [(6, 3), (4, 1), (5, 3)])
def test_teacher_forcing_equals_the_rollout_with_its_cache(frames, per_chunk):
    dit = wan_from_state_dict(random_state_dict(dim=256, ffn_dim=128, layers=2, text_dim=16))
    noisy, clean = normal(2, 2, 16, frames, 4, 6, seed=5)
    context = normal(2, 5, 16, seed=6)
    lengths = [min(per_chunk, frames - start) for start in range(0, frames, per_chunk)]
    levels = [900.0 - 150 * index for index in range(len(lengths))]
    timesteps = torch.tensor([[t for t, n in zip(levels, lengths, strict=True) for _ in range(n)]]).expand(2, -1)
    got = teacher_forced(dit, noisy, clean, timesteps, context, frames_per_chunk=per_chunk)

    shape = CacheShape(layers=2, batch=2, slots=frames, grid=(2, 3), heads=2, head_dim=128)
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
