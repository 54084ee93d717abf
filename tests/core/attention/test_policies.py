"""Attention policies: what each selects, against brute force, and how a chunk is planned by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.chunk import ChunkAttention, plan_chunk
from lightforcing.lightforcing_core.attention.dispatch import BackendUnavailable
from lightforcing.lightforcing_core.attention.options import AttentionOptions, Pools
from lightforcing.lightforcing_core.attention.policies import POLICIES, FrameBudget, View

BUDGET = FrameBudget(keep=3, sinks=1, near=1)


def views(most_frames=9):
    """A ring whose slots hold frames in any order: blocks ragged or not, one or several of a chunk's own."""

    @st.composite
    def view(draw):
        frames = draw(st.integers(2, most_frames))
        first = draw(st.integers(0, 30))
        order = draw(st.permutations(range(first, first + frames)))
        layouts = [FrameBlocks(draw(st.shared(st.integers(1, 40), key="tokens")), 16) for _ in "qk"]
        return View(order, draw(st.integers(1, frames - 1)), *layouts, draw(st.integers(1, 2)), draw(st.integers(1, 2)))

    return view()


def means(view, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(view.batch, blocks, view.heads, 8, generator=generator, dtype=torch.float64)
        for blocks in (view.q_blocks, view.k_blocks)
    )
    return q, k, view.k_layout.frame_means(k)


@given(view=views(), sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_topk_keeps_the_blocks_with_the_highest_scores_wherever_they_are(view, sparsity, seed):
    q, k, frames = means(view, seed)
    plan = POLICIES["topk"].selection.plan(view, sparsity, BUDGET)
    selection = plan.select(q, k, frames)
    kept = max(1, int((1 - sparsity) * view.k_blocks))
    assert plan.kept == kept
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in selection.counts.shape)).reshape(-1, 3).tolist():
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
    assert plan.fixed is plan.select(*means(view, 0))
    assert plan.kept == len(want)
    assert plan.fixed.blocks.shape == (view.batch, view.heads, view.q_blocks, len(want))
    assert (plan.fixed.blocks == torch.tensor(want)).all()
    assert (plan.fixed.counts == len(want)).all()


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
