"""The options beyond the published method, over whole rollouts of a tiny model, and the 8-bit cache inside one."""

import itertools
from dataclasses import replace

import pytest
import torch

from lightforcing.lightforcing_core.attention import chunk
from lightforcing.lightforcing_core.attention.backends.dense import dequantised
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks, tile_order
from lightforcing.lightforcing_core.attention.dispatch import BackendChoice
from lightforcing.lightforcing_core.attention.policies import POLICIES
from lightforcing.lightforcing_core.model import causal
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas

from ...support import rollouts
from ...support.rollouts import FINE, roll, text

LAYERS, CHUNKS = 2, 4


@pytest.fixture(scope="module")
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=32, seed=0))


def video(dit, growth=(0.0, 0.6, 0.7, 0.7), *, kv=None, **options):
    """Latents of four chunks; frames of 70 tokens, which leaves ragged blocks."""
    settings = {"latent_shape": (1, 16, 2 * CHUNKS, 14, 20), "frames_per_chunk": 2, "growth": growth, "kv": kv}
    return rollouts.video(roll(dit, text(1), attention=replace(FINE, **options), sigmas=few_step_sigmas(), **settings))


@pytest.mark.parametrize(
    ("height", "width", "block"), [(7, 10, 16), (30, 52, 64), (32, 48, 64), (3, 2, 64), (8, 8, 16)]
)
def test_tiles_name_every_token_once_and_are_compact(height, width, block):
    order = tile_order(height, width, block)
    assert sorted(order.tolist()) == list(range(height * width))
    side = round(block**0.5)
    rows, columns = order // width, order % width
    for start in range(0, height // side * side * width - block + 1, block):
        run = slice(start, start + block)
        if rows[run].max() - rows[run].min() < side:  # not across two strips
            assert columns[run].max() - columns[run].min() <= side
    if height % side == 0 and width % side == 0:
        for run in order.split(block):
            assert (run // width).max() - (run // width).min() == side - 1
            assert (run % width).max() - (run % width).min() == side - 1


def test_tiles_change_nothing_where_nothing_is_skipped(dit):
    raster, tiled = (video(dit, None, tiles=tiles) for tiles in (False, True))
    torch.testing.assert_close(tiled, raster, rtol=0, atol=2e-5)


def test_a_tail_brings_a_sparse_video_nearer_to_the_dense_one(dit):
    dense, plain, tailed = video(dit, None), video(dit), video(dit, tail=True)
    assert (tailed - dense).norm() < 0.8 * (plain - dense).norm()


@pytest.mark.parametrize(("kv", "far"), [("same", 0.0), ("int8", 0.02)])
def test_a_tail_is_made_of_the_keys_and_values_in_the_cache(dit, monkeypatch, kv, far):
    plain, checked = causal.attend, []

    def check(call, *choice):
        layout, stored = FrameBlocks(70, 16), (call.k, call.v)
        if call.scales:
            stored = dequantised(*stored, call.scales, layout, slice(None), torch.float32)
        for means, x in zip(call.tail, stored, strict=True):
            torch.testing.assert_close(means, layout.block_means(x), rtol=0, atol=far)
        checked.append(1)
        return plain(call, *choice)

    monkeypatch.setattr(causal, "attend", check)
    video(dit, tail=True, kv=KVOptions(kv))
    assert checked


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("growth", [None, (0.0, 0.6, 0.7, 0.7)])
def test_eight_bit_cache_stays_close(dit, dtype, growth):
    full, small = (video(dit, growth, kv=kv) for kv in (KVOptions(), KVOptions(dtype)))
    error = ((small - full).norm() / full.norm()).item()
    assert 1e-5 < error < {"int8": 0.02, "fp8": 0.06}[dtype]


# --------------------------------------------------------------------------------------- policies and last resort


def test_policies_tiles_and_estimators_give_videos_of_their_own_and_dense_is_dense(dit):
    changes = [{}, {"tiles": True}, {"estimator": "lse"}, {"policy": "mass", "settings": (("top_p", 0.5),)}]
    # Nothing has left the windows of some.
    whole = {"light_forcing", "dense", "rolling_sink", "echo_forcing", "rolling_forcing", "pbsa"}
    changes += [{"policy": policy} for policy in set(POLICIES) - whole]
    videos = [video(dit, **change) for change in changes] + [video(dit, None)]
    assert torch.equal(videos[-1], video(dit, policy="dense"))
    for one, other in itertools.combinations(videos, 2):
        assert (one - other).abs().max() > 1e-4
        torch.testing.assert_close(one[:, :, :2], other[:, :, :2], rtol=0, atol=2e-5)  # the first chunk is dense


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"dense", "echo_forcing"}))
def test_policies_run_with_every_other_option(dit, policy):
    options = {"tail": True, "estimator": "lse", "tiles": True, "kv": KVOptions("int8")}
    assert video(dit, policy=policy, **options).isfinite().all()


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("sta", (("frames", 99), ("rows", 99), ("columns", 99))),
        ("svg1", (("frames", 99),)),
        ("mass", (("top_p", 1 - 1e-9),)),
    ],
)
def test_a_rule_that_keeps_everything_is_dense(dit, policy, settings):
    torch.testing.assert_close(video(dit, policy=policy, settings=settings), video(dit, None), rtol=0, atol=2e-5)


def test_a_device_without_a_sparse_backend_runs_every_chunk_dense(dit, monkeypatch):
    monkeypatch.setattr(chunk, "choose", lambda call, backend: BackendChoice("dense", "triton is not installed"))
    assert torch.equal(video(dit), video(dit, None))
