"""Attention policies: what each selects, against brute force, and how a chunk is planned by one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.chunk import ChunkAttention, plan_chunk
from lightforcing.lightforcing_core.attention.dispatch import BackendUnavailable
from lightforcing.lightforcing_core.attention.options import AttentionOptions, Pools
from lightforcing.lightforcing_core.attention.policies import POLICIES, FrameBudget, View
from lightforcing.lightforcing_core.attention.policies.gated import Mass, MixtureOfBlocks, until_more_than
from lightforcing.lightforcing_core.attention.policies.static import Radial, SlidingTile, SpatialBand

from . import policies_by_hand as by_hand

BUDGET = FrameBudget(keep=3, sinks=1, near=1)


def views(most_frames=9):
    """A ring whose slots hold frames in any order: blocks ragged or not, one or several of a chunk's own."""

    @st.composite
    def view(draw):
        frames = draw(st.integers(2, most_frames))
        first = draw(st.integers(0, 30))
        order = draw(st.permutations(range(first, first + frames)))
        layouts = [
            FrameBlocks(draw(st.shared(st.integers(1, 40), key="tokens")), draw(st.sampled_from([16, 32])))
            for _ in "qk"
        ]
        return View(order, draw(st.integers(1, frames - 1)), *layouts, draw(st.integers(1, 2)), draw(st.integers(1, 2)))

    return view()


def means(view, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(view.batch, blocks, view.heads, 8, generator=generator, dtype=torch.float64)
        for blocks in (view.q_blocks, view.k_blocks)
    )
    return q, k, view.k_layout.frame_means(k)


def rows_of(selection):
    return torch.cartesian_prod(*(torch.arange(n) for n in selection.counts.shape)).reshape(-1, 3).tolist()


def read_by(selection, b, h, row):
    """The blocks that one query block reads, with the promises that every list keeps."""
    blocks, count = selection.blocks[b, h, row], int(selection.counts[b, h, row])
    assert blocks.dtype == selection.counts.dtype == torch.int32
    read = blocks[:count].tolist()
    assert read == sorted(set(read))
    return read


@given(view=views(), sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_topk_keeps_the_blocks_with_the_highest_scores_wherever_they_are(view, sparsity, seed):
    q, k, frames = means(view, seed)
    plan = POLICIES["topk"].selection.plan(view, sparsity, BUDGET)
    selection = plan.select(q, k, frames)
    kept = max(1, int((1 - sparsity) * view.k_blocks))
    assert plan.kept == kept
    for b, h, row in rows_of(selection):
        scores = {block: float(q[b, row, h] @ k[b, block, h]) for block in range(view.k_blocks)}
        want = sorted(sorted(scores, key=lambda block: (-scores[block], block))[:kept])
        assert selection.blocks[b, h, row].tolist() == want
        assert selection.counts[b, h, row] == kept


def test_topk_takes_the_first_of_equal_blocks():
    view = View([2, 0, 1], 1, FrameBlocks(32, 16), FrameBlocks(32, 16), 1, 1)
    plan = POLICIES["topk"].selection.plan(view, 0.5, BUDGET)
    q, k = torch.ones(1, 2, 1, 4), torch.ones(1, 6, 1, 4)
    assert plan.select(q, k, torch.ones(1, 3, 1, 4)).blocks[0, 0].tolist() == [[0, 1, 2]] * 2


@given(view=views(), sparsity=st.floats(0.01, 0.99), sinks=st.integers(0, 2))
def test_window_reads_whole_frames_own_then_sinks_then_newest_within_the_budget(view, sparsity, sinks):
    plan = POLICIES["window"].selection.plan(view, sparsity, FrameBudget(6, sinks, 2))
    in_time = sorted(view.slot_frames)
    past, own = in_time[: -view.current], in_time[-view.current :]
    allowed = int((1 - sparsity) * view.k_blocks)
    read = list(own)
    for frame in [*past[:sinks], *reversed(past[sinks:])]:
        if (len(read) + 1) * view.k_layout.per_frame <= allowed:
            read.append(frame)
    per_frame = view.k_layout.per_frame
    want = [
        slot * per_frame + block
        for slot, frame in enumerate(view.slot_frames)
        if frame in read
        for block in range(per_frame)
    ]
    assert plan.of_layer(0) is plan.of_layer(1)
    assert plan.kept == len(want)
    assert plan.of_layer(0).blocks.shape == (view.batch, view.heads, view.q_blocks, len(want))
    assert (plan.of_layer(0).blocks == torch.tensor(want)).all()
    assert (plan.of_layer(0).counts == len(want)).all()


# --------------------------------------------------------------------------- rules about places, static


def in_time(frames, current=3, tokens=1536, block=64, grid=(0, 0)):
    layout = FrameBlocks(tokens, block)
    return View(range(frames), current, layout, layout, 1, 1, grid=grid, tiles=grid != (0, 0))


@given(view=views(6), decay=st.sampled_from([0.05, 0.2, 1.0]))
def test_static_rules_equal_brute_force_in_any_order_of_slots(view, decay):
    tokens, sizes = view.k_layout.tokens_per_frame, (view.q_layout.block, view.k_layout.block)
    frames, per_frame = sorted(view.slot_frames), view.q_layout.per_frame
    rules = (
        (Radial(decay), lambda *where: by_hand.radial(*where, decay)),
        (
            SpatialBand(1),
            lambda *where: by_hand.spatial_band(*where, 1),
        ),
    )
    for rule, brute_force in rules:
        plan = rule.plan(view, 0.5, BUDGET)
        assert plan.of_layer(0) is plan.of_layer(1)
        for b, h, row in rows_of(plan.of_layer(0)):
            frame, block = frames[len(frames) - view.current + row // per_frame], row % per_frame
            slot_of = [view.slot_frames.index(frame) for frame in frames]
            read = [divmod(one, view.k_layout.per_frame) for one in brute_force(frames, frame, block, tokens, *sizes)]
            want = sorted(slot_of[at] * view.k_layout.per_frame + inside for at, inside in read)
            assert read_by(plan.of_layer(0), b, h, row) == want
        counts = plan.of_layer(0).counts.float()
        assert plan.kept == counts.max()
        assert plan.density == pytest.approx(counts.mean().item() / view.k_blocks)
        assert plan.uneven == (counts.min() < counts.max())


@pytest.mark.parametrize(
    ("tokens", "block", "densities"),
    [
        (1536, 64, [0.6584, 0.4794, 0.3899, 0.3363, 0.3005, 0.2672]),
        (1560, 64, [0.6576, 0.4775, 0.3873, 0.3332, 0.2971, 0.2639]),
        (1536, 128, [0.7029, None, None, None, None, 0.3545]),
        (1560, 128, [0.6963, None, None, None, None, 0.3414]),
    ],
)
def test_radial_density_of_the_published_setting(tokens, block, densities):
    for frames, density in zip((6, 9, 12, 15, 18, 21), densities, strict=True):
        if density is not None:
            plan = Radial().plan(in_time(frames, tokens=tokens, block=block), 0.5, BUDGET)
            assert round(plan.density, 4) == density


def test_radial_reads_bands_that_thin_out():
    fixed = Radial().plan(in_time(4, current=1), 0.5, BUDGET).of_layer(0)
    assert read_by(fixed, 0, 0, 0) == [*range(26), *range(48, 96)]
    assert read_by(fixed, 0, 0, 12) == [*range(24), 35, 36, 37, *range(48, 96)]
    counts = Radial().plan(in_time(21), 0.5, BUDGET).of_layer(0).counts
    assert (counts.min(), counts.max()) == (104, 144)


@pytest.mark.parametrize("window", [(3, 3, 3), (1, 1, 3), (3, 1, 10), (5, 1, 5), (4, 3, 3), (1, 6, 10)])
@pytest.mark.parametrize("grid", [(3, 4, 6), (2, 2, 3), (3, 6, 10), (5, 6, 10)])
def test_sliding_tiles_equal_brute_force(grid, window):
    view = in_time(grid[0], current=grid[0], tokens=grid[1] * grid[2], block=1, grid=grid[1:])
    mask = SlidingTile(*window).box(view).view(view.q_blocks, view.k_blocks)
    for row, read in enumerate(mask):
        t, inside = divmod(row, grid[1] * grid[2])
        assert read.nonzero().flatten().tolist() == by_hand.tiles(grid, window, (t, *divmod(inside, grid[2])))


@pytest.mark.parametrize(
    ("grid", "window", "density"),
    [
        ((5, 6, 10), (3, 3, 3), 0.09),
        ((5, 6, 10), (5, 1, 5), 0.0833),
        ((5, 6, 10), (1, 6, 10), 0.2),
        ((5, 6, 10), (4, 3, 3), 0.15),
        ((3, 6, 10), (3, 1, 10), 0.1667),
    ],
)
def test_sliding_tiles_read_as_much_as_published(grid, window, density):
    view = in_time(grid[0], current=grid[0], tokens=grid[1] * grid[2], block=1, grid=grid[1:])
    assert round(SlidingTile(*window).box(view).float().mean().item(), 4) == density


def test_sliding_tiles_of_an_open_chunk_read_it_and_the_sinks_whole():
    for frames, density in ((6, 0.1875), (9, 0.125), (12, 0.0938), (21, 0.0536)):
        box = SlidingTile(3, 3, 3).box(in_time(frames, grid=(32, 48)))
        assert round(box.float().mean().item(), 4) == density
    plan = SlidingTile(5, 3, 3).plan(in_time(12, grid=(32, 48)), 0.5, BUDGET)
    assert (plan.kept, round(plan.density, 4), plan.uneven) == (114, 0.3958, False)
    ragged = SlidingTile().plan(in_time(12, tokens=1560, grid=(30, 52)), 0.5, BUDGET)
    own_and_sink = {*range(25), *range(9 * 25, 12 * 25)}
    assert all(own_and_sink <= set(read_by(ragged.of_layer(0), *where)) for where in rows_of(ragged.of_layer(0)))


# ------------------------------------------------------------------ rules about scores that read uneven numbers


@given(view=views(5), top_p=st.sampled_from([0.0, 0.3, 0.9]), sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_mass_equals_brute_force(view, top_p, sparsity, seed):
    q, k, frames = means(view, seed)
    plan = Mass(top_p).plan(view, sparsity, BUDGET)
    selection, tokens = plan.select(q, k, frames), view.k_layout.block_lengths(len(view.slot_frames)).tolist()
    kept = max(1, int((1 - sparsity) * view.k_blocks))
    for b in range(view.batch):
        where = [(b, h, row) for h in range(view.heads) for row in range(view.q_blocks)]
        rows = [
            by_hand.softmax([float(q[b, i, h] @ k[b, j, h]) / 8**0.5 + math.log(n) for j, n in enumerate(tokens)])
            for _, h, i in where
        ]
        want = [by_hand.top_p(row, top_p) for row in rows] if top_p else by_hand.best_of_all(rows, kept)
        assert [read_by(selection, *one) for one in where] == want
    assert plan.density == (None if top_p else kept / view.k_blocks)
    assert plan.uneven


@pytest.mark.parametrize(("limit", "read"), [(0.05, [1]), (0.5, [1]), (0.9, [0, 1, 2])])
def test_top_p_over_blocks_of_different_sizes(limit, read):
    scores = torch.tensor([2.0, 1, 0, -1]) / 2**0.5 + torch.tensor([1.0, 10, 4, 2]).log()
    shares = scores.softmax(-1)
    torch.testing.assert_close(shares, torch.tensor([0.139999, 0.690292, 0.136145, 0.033564]), rtol=0, atol=1e-6)
    assert until_more_than(shares, limit).nonzero().flatten().tolist() == read


def test_blocks_of_unlike_tokens_are_read_by_all_and_read_all():
    """The worked numbers: key block 1 fails, so the others' shares are those without it."""
    tokens = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    layout = FrameBlocks(4, 16)
    assert layout.self_similarity(tokens[None, :, None]).item() == pytest.approx(0.640165, abs=1e-6)
    view = in_time(5, current=2, tokens=16, block=16)
    q, k = torch.zeros(1, 2, 1, 2), torch.zeros(1, 5, 1, 2)
    q[..., 0], k[0, :, 0, 0] = 1.0, torch.tensor([3.0, 2, 1, 0, -1])
    plan = Mass(0.85, 0.6).plan(view, 0.5, BUDGET)
    assert plan.density is None
    alike = torch.tensor([0.61, 0.5]), torch.tensor([0.9, 0.6, 0.7, 0.9, 0.9])
    selection = plan.seeing(*(x.view(1, 1, -1) for x in alike)).select(q, k, k)
    assert [read_by(selection, 0, 0, row) for row in range(2)] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert read_by(plan.select(q, k, k), 0, 0, 0) == [0, 1, 2]


@given(view=views(5), share=st.sampled_from([0.1, 0.25, 0.9]), seed=st.integers(0, 99))
def test_mixture_of_blocks_equals_brute_force(view, share, seed):
    q, k, frames = means(view, seed)
    selection = MixtureOfBlocks(share).plan(view, 0.5, BUDGET).select(q, k, frames)
    in_time = sorted(view.slot_frames)[-view.current :]
    for b, h, row in rows_of(selection):
        frame, block = divmod(row, view.q_layout.per_frame)
        tokens = by_hand.blocks_of(view.q_layout.tokens_per_frame, view.q_layout.block)[block]
        slot = view.slot_frames.index(in_time[frame])
        own = {slot * view.k_layout.per_frame + token // view.k_layout.block for token in tokens}
        scores = [float(q[b, row, h] @ k[b, j, h]) for j in range(view.k_blocks)]
        assert read_by(selection, b, h, row) == by_hand.vmoba(scores, own, share)


@pytest.mark.parametrize(("share", "read"), [(0.25, [0, 1]), (0.5, [0, 1, 3]), (0.9, [0, 1, 3, 4])])
def test_mixture_of_blocks_on_the_published_example(share, read):
    view = View([1, 2, 3, 4, 0], 1, FrameBlocks(1, 16), FrameBlocks(1, 16), 1, 1)._replace(slot_frames=[9, 0, 1, 2, 3])
    k = torch.tensor([2.0, 5, 1, 4, 3]).view(1, 5, 1, 1)
    selection = MixtureOfBlocks(share).plan(view, 0.5, BUDGET).select(torch.ones(1, 1, 1, 1), k, k)
    assert read_by(selection, 0, 0, 0) == read


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [Mass(), Mass(0.9), MixtureOfBlocks()])
def test_scores_that_are_not_finite_leave_no_query_block_without_keys(rule, bad):
    view = in_time(4, current=1, tokens=48, block=16)
    q, k, frames = (x.float() for x in means(view, 0))
    k[:, 2] = bad
    selection = rule.plan(view, 0.5, BUDGET).select(q, k, frames)
    assert all(read_by(selection, *where) for where in rows_of(selection))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((("decay", 0.5),), "attention policy 'mass' has no setting 'decay'; its settings are top_p"),
        ((("top_p", 1.0),), "top_p 1.0 is outside"),
        ((("top_p", "x"),), "setting top_p 'x' of policy 'mass' is no number up to 1,000,000"),
        ((("top_p", math.nan),), "setting top_p nan of policy 'mass' is no number"),
    ],
)
def test_settings_that_a_policy_does_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(policy="mass", settings=settings)


def test_settings_reach_the_rule_and_saved_runs():
    options = AttentionOptions(policy="mass", settings=(("top_p", 0.9),))
    assert options.rule == Mass(0.9)
    assert AttentionOptions.from_saved(json.loads(json.dumps(options.to_saved()))) == options
    assert "settings" not in replace(options, settings=()).to_saved()


# ------------------------------------------------------------------------------------------- planning a chunk


VIEW = View(range(6), 2, FrameBlocks(40, 16), FrameBlocks(40, 32), 1, 2)


def planned(sparsity=0.5, view=VIEW, **options):
    options = AttentionOptions(block=(16, 32), **options)
    return plan_chunk(options, view, sparsity, head_dim=32, dtype=torch.float32, stored=torch.float32)


def test_a_sparse_chunk_has_a_plan_and_a_backend():
    chunk = planned()
    assert (chunk.choice.name, chunk.why_dense) == ("reference", None)
    assert chunk.density == 6 / 12
    with pytest.raises(BackendUnavailable, match="bfloat16 or float16"):
        planned(backend="flash4")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sparsity": 0.0}, "its scheduled sparsity is 0"),
        ({"view": VIEW._replace(slot_frames=range(2))}, "it has no past frames"),
        ({"policy": "dense"}, "the attention policy 'dense' reads everything"),
        ({"view": VIEW._replace(device="meta")}, "no sparse attention backend works here: "),
    ],
)
def test_a_dense_chunk_has_no_plan_and_says_why(change, reason):
    chunk = planned(**change)
    assert (chunk.plan, chunk.density) == (None, 1.0)
    assert chunk.why_dense.startswith(reason)
    assert bool(chunk.no_backend) == ("backend" in reason)


def test_a_plan_that_keeps_every_block_says_so():
    assert planned(0.01, policy="topk").why_dense is None
    assert planned(1e-17).why_dense == "a sparsity of 1e-17 leaves no whole block to skip among 12"
    view = VIEW._replace(grid=(5, 8))
    everything = planned(view=view, policy="sta", settings=(("frames", 99), ("rows", 99), ("columns", 99)))
    assert everything.why_dense == "the policy 'sta' leaves no whole block to skip among 12"
    assert ChunkAttention().density == 1.0


@pytest.mark.parametrize(
    ("options", "pools"),
    [
        ({}, Pools(True, False, False)),
        ({"estimator": "lse", "tail": True}, Pools(True, True, True)),
        ({"policy": "topk", "estimator": "lse"}, Pools(True, False, True)),
        ({"policy": "window", "estimator": "lse"}, Pools(False, False, False)),
        ({"policy": "window", "tail": True}, Pools(True, True, False)),
        ({"policy": "dense", "tail": True}, Pools(False, False, False)),
    ],
)
def test_the_cache_keeps_the_means_that_a_policy_reads(options, pools):
    assert AttentionOptions(**options).pools(sparse=True) == pools
    assert AttentionOptions(**options).pools(sparse=False) == Pools(False, False, False)
