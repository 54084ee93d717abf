import math

import pytest
import torch

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.selection import (
    BlockSelection,
    best,
    hierarchical_block_mask,
    sub_block_layout,
)

from ...support.attention_problems import RING, brute_force_selection, selection_plan, spans


def brute_force_mask(q, k, tokens, block, sparsity, *budget):
    """The rule of HSA over means of the tokens themselves; a chunk without past frames keeps everything."""
    current, frames = (x.shape[1] // tokens for x in (q, k))
    q_spans, k_spans = (spans(count, tokens, size) for count, size in zip((current, frames), block, strict=True))
    means = [
        torch.stack([x[:, start:end].mean(1) for start, end in parts], dim=1)
        for x, parts in ((q, q_spans), (k, k_spans), (k, spans(frames, tokens, tokens)))
    ]
    kept = max(1, int((1.0 - sparsity) * len(k_spans))) if frames > current else len(k_spans)
    ids = brute_force_selection(*means, range(frames), current, *budget, kept)
    return torch.zeros(*ids.shape[:3], len(k_spans), dtype=torch.bool).scatter_(-1, ids.long(), True)


@pytest.mark.parametrize(
    ("tokens", "block", "frames", "current", "batch", "heads", "dim"),
    [
        (7, (16, 16), 12, 3, 2, 2, 16),
        (96, (32, 16), 12, 3, 1, 3, 32),
        (96, (64, 64), 9, 1, 2, 1, 32),
        (390, (64, 128), 11, 3, 1, 2, 16),
        (1536, (128, 128), 11, 1, 1, 1, 16),
        (1536, (64, 64), 8, 3, 1, 1, 16),
        (1560, (64, 64), 9, 2, 1, 1, 16),
        (96, (32, 32), 3, 3, 1, 2, 16),
        (96, (32, 32), 6, 3, 1, 2, 16),
    ],
)
@pytest.mark.parametrize("sparsity", [0.3, 0.88])
def test_mask_equals_brute_force(tokens, block, frames, current, batch, heads, dim, sparsity):
    generator = torch.Generator().manual_seed(tokens + frames)
    q = torch.randn(batch, current * tokens, heads, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, frames * tokens, heads, dim, generator=generator, dtype=torch.float64)
    mask = hierarchical_block_mask(q, k, tokens_per_frame=tokens, block=block, sparsity=sparsity)
    assert torch.equal(mask, brute_force_mask(q, k, tokens, block, sparsity, 6, 1, 2))


@pytest.mark.parametrize(("keep", "sinks", "near"), [(3, 1, 1), (3, 1, 2), (2, 0, 0), (4, 4, 0), (4, 0, 4), (0, 0, 0)])
def test_frame_rule_holds_for_other_counts(keep, sinks, near):
    generator = torch.Generator().manual_seed(keep * 16 + sinks * 4 + near)
    q = torch.randn(1, 2 * 20, 2, 8, generator=generator)
    k = torch.randn(1, 9 * 20, 2, 8, generator=generator)
    options = {"keep_frames": keep, "sink_frames": sinks, "near_frames": near}
    mask = hierarchical_block_mask(q, k, tokens_per_frame=20, block=(8, 8), sparsity=0.2, **options)
    assert torch.equal(mask, brute_force_mask(q, k, 20, (8, 8), 0.2, keep, sinks, near))


@pytest.mark.parametrize(
    ("block", "counts"), [((64, 64), [24, 31, 36, 42, 46, 51]), ((128, 128), [12, 15, 18, 21, 23, 25])]
)
def test_block_counts_of_the_published_short_setting(block, counts):
    sparsities = [0.826990, 0.855068, 0.871806, 0.883228, 0.891660, 0.898213]
    kept = [
        selection_plan(range(3 * (chunk + 2)), 3, FrameBlocks(1536, block[1]), sparsity).kept
        for chunk, sparsity in enumerate(sparsities)
    ]
    assert kept == counts


def test_list_and_mask_forms_are_inverse():
    mask = torch.rand(2, 3, 5, 17, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0, 0, 0] = False
    mask[0, 0, 1] = True
    selection = BlockSelection.from_mask(mask)
    assert torch.equal(selection.to_mask(17), mask)
    row = selection.blocks[1, 2, 3, : selection.counts[1, 2, 3]]
    assert row.tolist() == mask[1, 2, 3].nonzero().flatten().tolist()


def test_pooled_means_skip_the_padding_of_ragged_blocks():
    layout = FrameBlocks(7, 4)
    x = torch.randn(2, 21, 3, 5, dtype=torch.float64)
    means = layout.block_means(x)
    for block, (start, end) in enumerate(spans(3, 7, 4)):
        torch.testing.assert_close(means[:, block], x[:, start:end].mean(1))
    torch.testing.assert_close(layout.frame_means(means), x.unflatten(1, (3, 7)).mean(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity 1\.0"),
        ({"sparsity": -0.1}, r"sparsity -0\.1"),
        ({"sparsity": 0.5, "sink_frames": 4, "near_frames": 4}, r"sink_frames 4 \+ near_frames 4 exceed keep_frames 6"),
        ({"sparsity": 0.5, "near_frames": -1}, "near_frames -1"),
        ({"sparsity": 0.5, "tokens_per_frame": 21}, "21 tokens"),
        ({"sparsity": 0.5, "block": 64}, r"block 64 is not a pair"),
        ({"sparsity": 0.5, "k": torch.randn(1, 20, 1, 8)}, "q holds 2 frames but k only 1"),
    ],
)
def test_bad_requests_name_the_value(arguments, message):
    q, k = torch.randn(1, 40, 1, 8), torch.randn(1, 120, 1, 8)
    with pytest.raises(ValueError, match=message):
        hierarchical_block_mask(**{"q": q, "k": k, "tokens_per_frame": 20, "block": (8, 8), **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("frames", "current", "sparsity"), [(12, 3, 0.88), (12, 1, 0.5), (5, 2, 0.7)])
def test_ties_go_to_the_lowest_block_and_the_oldest_frame(dtype, frames, current, sparsity):
    """Whole numbers in blocks of a power of two have exact means and products, and only a few different scores."""
    generator = torch.Generator().manual_seed(frames)
    q, k = (
        torch.randint(-1, 2, (2, count * 16, 2, 3), generator=generator).to(dtype).repeat_interleave(4, dim=1)
        for count in (current, frames)
    )
    mask = hierarchical_block_mask(q, k, tokens_per_frame=64, block=(8, 4), sparsity=sparsity)
    # Python's sort is stable, also in reverse.
    assert torch.equal(mask, brute_force_mask(q, k, 64, (8, 4), sparsity, 6, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_zero_ties_with_zero(dtype):
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0], dtype=dtype)
    assert [best(scores.clone(), count).tolist() for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_not_finite_have_their_place(dtype):
    scores = [math.nan, 3.0, -math.inf, math.inf, 7.0, torch.finfo(dtype).max, -2.0, -math.nan]
    ranking = [3, 5, 4, 1, 6, 0, 2, 7]  # infinity ties with the largest number, NaN with negative infinity
    k = torch.tensor(scores, dtype=dtype).view(1, 8, 1, 1)
    for kept in range(1, 8):
        plan = selection_plan([0, 1], 1, FrameBlocks(8, 2), sparsity=1 - (kept + 0.5) / 8)
        blocks = plan.select(torch.ones(1, 1, 1, 1, dtype=dtype), k, torch.zeros(1, 2, 1, 1, dtype=dtype)).blocks
        assert blocks.flatten().tolist() == sorted(ranking[:kept])


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_no_block_outside_the_eligible_frames_is_kept_whatever_the_scores(bad):
    plan = selection_plan(RING, 3, FrameBlocks(20, 8), sparsity=0.1)
    assert plan.kept == 27  # as many as are eligible
    q, k, f = (torch.full((1, rows, 1, 4), bad) for rows in (2, 30, 10))
    assert plan.select(q, k, f).blocks[0, 0, 1].tolist() == [*range(21), *range(24, 30)]


def test_frame_ranks_say_the_same_as_the_middle_slots():
    plan = selection_plan(RING, 3, FrameBlocks(20, 8), sparsity=0.5)
    assert plan.middle_slots.tolist() == [4, 5, 6, 7]
    assert plan.frame_ranks.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, -1, -1]
    whole = selection_plan(range(9), 3, FrameBlocks(20, 8), sparsity=0.5)
    assert whole.middle_slots is None
    assert whole.frame_ranks.tolist() == [-1] * 9


# ------------------------------------------------------------------------------------- sub-blocks and log-sum-exp


@pytest.mark.parametrize("block", [4, 8, 64])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 96, 1560])
def test_sub_blocks_nest_in_blocks(tokens, block):
    layout = FrameBlocks(tokens, block)
    subs = sub_block_layout(layout)
    block_of_token, sub_of_token = layout.block_of_token(2), subs.block_of_token(2)
    for sub in range(2 * subs.per_frame):
        inside = block_of_token[sub_of_token == sub].unique()
        assert len(inside) == 1
        frame, within = divmod(sub, subs.per_frame)
        assert inside.item() == frame * layout.per_frame + within // 4


@pytest.mark.parametrize(("tokens", "block"), [(64, 16), (40, 16), (39, 8), (7, 16)])
def test_lse_selection_equals_brute_force(tokens, block):
    layout, frames, generator = FrameBlocks(tokens, block), len(RING), torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64) * 3
    k = torch.randn(2, frames * tokens, 2, 8, generator=generator, dtype=torch.float64)
    means, subs = layout.block_means(k), sub_block_layout(layout)
    plan = selection_plan(RING, 3, layout, sparsity=0.6)
    got = plan.select(q, means, layout.frame_means(means), sub_means=subs.block_means(k))
    for b in range(2):
        for h in range(2):
            for i in range(3):
                mass = []  # of each block, as if its sub-blocks were uniform
                for start, end in spans(frames, tokens, block):
                    parts = [(s, min(s + block // 4, end)) for s in range(start, end, block // 4)]
                    terms = [math.exp(q[b, i, h] @ k[b, s:e, h].mean(0) / 8**0.5) * (e - s) for s, e in parts]
                    mass.append(sum(terms))
                frame_mass = [sum(mass[s * layout.per_frame : (s + 1) * layout.per_frame]) for s in range(frames)]
                chosen = sorted((4, 5, 6, 7), key=frame_mass.__getitem__)[1:]
                slots = [0, 1, 2, 3, 8, 9, *chosen]
                eligible = [slot * layout.per_frame + j for slot in slots for j in range(layout.per_frame)]
                want = sorted(sorted(eligible, key=mass.__getitem__)[-plan.kept :])
                assert got.blocks[b, h, i].tolist() == want


def test_blocks_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="blocks of 10 tokens do not split into 4 sub-blocks"):
        sub_block_layout(FrameBlocks(20, 10))
