"""The options beyond the published method, over whole rollouts of a tiny model, and the 8-bit cache inside one."""

import pytest
import torch

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks, tile_order
from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions, sparse_attention
from lightforcing.lightforcing_core.attention.selection import SelectionPlan
from lightforcing.lightforcing_core.model import causal as causal_wan
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas

from ...support.rollouts import roll

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, CHUNKS = 2, 4


@pytest.fixture(scope="module")
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=LAYERS, text_dim=32, seed=0))


def video(dit, growth=(0.0, 0.6, 0.7, 0.7), *, size=(14, 20), kv=None, dtype=None, **options):
    """Latents of four chunks; frames of 70 tokens by default, which leaves ragged blocks."""
    context = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    chunks = roll(
        dit,
        context,
        latent_shape=(1, 16, 2 * CHUNKS, *size),
        frames_per_chunk=2,
        sigmas=few_step_sigmas((1000, 750, 500, 250)),
        growth=growth,
        kv=kv,
        dtype=dtype,
        attention=AttentionOptions("reference", (16, 16), 3, 1, 1, **options),
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


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


def test_tiles_change_which_tokens_share_a_block(dit):
    raster, tiled = (video(dit, tiles=tiles) for tiles in (False, True))
    torch.testing.assert_close(tiled[:, :, :2], raster[:, :, :2], rtol=0, atol=2e-5)  # the first chunk is dense
    assert (tiled - raster).abs().max() > 1e-3


def test_reused_selections_are_made_in_every_nth_step_and_for_the_clean_pass(dit, monkeypatch):
    made, plain = [], SelectionPlan.select

    def counted(self, *arguments, **options):
        made.append(self)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(SelectionPlan, "select", counted)
    calls = {}
    for steps in (1, 2, 3, 4, 9):
        made.clear()
        video(dit, reuse_steps=steps)
        calls[steps] = len(made)
    # Three sparse chunks of 4 steps in 2 layers; the two clean passes need no selection in their last layer.
    assert calls == {n: LAYERS * 3 * -(-4 // n) + (LAYERS - 1) * 2 for n in calls}


def test_reused_selection_is_the_one_of_the_step_before(dit, monkeypatch):
    used, plain = [], sparse_attention

    def seen(*arguments, selection, **options):
        used.append(selection)
        return plain(*arguments, selection=selection, **options)

    monkeypatch.setattr(causal_wan, "sparse_attention", seen)
    video(dit, reuse_steps=2)
    first, second, third, fourth = (used[LAYERS * step : LAYERS * (step + 1)] for step in range(4))
    for layer in range(LAYERS):
        assert second[layer] is first[layer]
        assert third[layer] is not first[layer]
        assert fourth[layer] is third[layer]


def test_estimators_are_read_from_the_cache(dit):
    mean, lse = (video(dit, estimator=estimator) for estimator in ("mean", "lse"))
    assert (mean - lse).abs().max() > 1e-4


def test_a_tail_brings_a_sparse_video_nearer_to_the_dense_one(dit):
    dense, plain, tailed = video(dit, None), video(dit), video(dit, tail=True)
    assert (tailed - dense).norm() < 0.8 * (plain - dense).norm()


def test_a_tail_is_made_of_the_keys_and_values_in_the_cache(dit, monkeypatch):
    plain = sparse_attention
    checked = []

    def check(q, k, v, *, selection, tail=None, **options):
        layout = FrameBlocks(70, 16)
        torch.testing.assert_close(tail[0], layout.block_means(k), rtol=0, atol=0)
        torch.testing.assert_close(tail[1], layout.block_means(v), rtol=0, atol=0)
        checked.append(1)
        return plain(q, k, v, selection=selection, tail=tail, **options)

    monkeypatch.setattr(causal_wan, "sparse_attention", check)
    video(dit, tail=True)
    assert checked


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("growth", [None, (0.0, 0.6, 0.7, 0.7)])
def test_eight_bit_cache_stays_close(dit, dtype, growth):
    full, small = (video(dit, growth, kv=kv) for kv in (KVOptions(), KVOptions(dtype)))
    error = ((small - full).norm() / full.norm()).item()
    assert 1e-5 < error < {"int8": 0.02, "fp8": 0.06}[dtype]


def test_eight_bit_cache_is_never_widened_as_a_whole(dit, monkeypatch):
    """No tensor as wide as a layer's keys in the computing dtype is made while a late chunk attends."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_iter(out):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 1:
                    sizes.append(x.numel())
            return out

    sizes, heads, tokens = [], 2, 70
    attends = causal_wan.sparse_attention, causal_wan.dense_attention_8bit

    def watched(attend):
        def run(q, k, v, *arguments, **options):
            with Largest():
                sizes.clear()
                out = attend(q, k, v, *arguments, **options)
            if k.shape[1] == 2 * CHUNKS * tokens and q.shape[1] == 2 * tokens:
                # One head at a time or the selected blocks; scores [queries, keys] of one head are allowed too.
                assert max(size for size in sizes if size != q.numel()) <= max(
                    k.numel() // heads, 2 * tokens * k.shape[1]
                )
                late.append(1)
            return out

        return run

    late = []
    for name, attend in zip(("sparse_attention", "dense_attention_8bit"), attends, strict=True):
        monkeypatch.setattr(causal_wan, name, watched(attend))
    video(dit, None, kv=KVOptions("int8"))
    assert late


@pytest.mark.parametrize(
    ("options", "message"),
    [({"estimator": "max"}, "'max' is not known; use one of mean, lse"), ({"reuse_steps": 0}, "reuse_steps 0 is less")],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)
