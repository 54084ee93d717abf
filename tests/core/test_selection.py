import pytest
import torch

from lightforcing.lightforcing_core.geometry import FrameBlocks
from lightforcing.lightforcing_core.selection import BlockSelection, SelectionPlan, hierarchical_block_mask


def block_spans(frames, tokens_per_frame, block):
    """(frame, first token, end token) of every block, by walking the tokens."""
    spans = []
    for frame in range(frames):
        for start in range(0, tokens_per_frame, block):
            first = frame * tokens_per_frame + start
            spans.append((frame, first, min(first + block, (frame + 1) * tokens_per_frame)))
    return spans


def brute_force_mask(q, k, tokens_per_frame, block, sparsity, keep, sinks, near):
    """The rule of HSA, one query block at a time."""
    q_spans = block_spans(q.shape[1] // tokens_per_frame, tokens_per_frame, block[0])
    k_spans = block_spans(k.shape[1] // tokens_per_frame, tokens_per_frame, block[1])
    frames, current = k.shape[1] // tokens_per_frame, q.shape[1] // tokens_per_frame
    past = frames - current
    mask = torch.zeros(q.shape[0], q.shape[2], len(q_spans), len(k_spans), dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            k_means = torch.stack([k[b, start:end, h].mean(0) for _, start, end in k_spans])
            for i, (_, start, end) in enumerate(q_spans):
                if past == 0:
                    mask[b, h, i] = True
                    continue
                q_mean = q[b, start:end, h].mean(0)
                kept_frames = set(range(frames))
                if past > keep:
                    middle = list(range(sinks, past - near))
                    scores = {
                        f: float(q_mean @ k[b, f * tokens_per_frame : (f + 1) * tokens_per_frame, h].mean(0))
                        for f in middle
                    }
                    best = sorted(middle, key=scores.get, reverse=True)[: keep - sinks - near]
                    kept_frames = {*range(sinks), *range(past - near, past), *range(past, frames), *best}
                candidates = [j for j, (f, _, _) in enumerate(k_spans) if f in kept_frames]
                count = max(1, min(int((1.0 - sparsity) * len(k_spans)), len(candidates)))
                ranked = sorted(candidates, key=lambda j: float(q_mean @ k_means[j]), reverse=True)
                mask[b, h, i, ranked[:count]] = True
    return mask


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
        SelectionPlan.build(
            range(3 * (chunk + 2)),
            3,
            FrameBlocks(1536, block[1]),
            sparsity=sparsity,
            keep_frames=6,
            sink_frames=1,
            near_frames=2,
        ).kept
        for chunk, sparsity in enumerate(sparsities)
    ]
    assert kept == counts


def test_no_past_keeps_everything():
    q = torch.randn(1, 60, 1, 8)
    assert hierarchical_block_mask(q, q, tokens_per_frame=20, block=(16, 16), sparsity=0.9).all()


def test_at_least_one_block_is_kept():
    q, k = torch.randn(1, 20, 1, 8), torch.randn(1, 60, 1, 8)
    mask = hierarchical_block_mask(q, k, tokens_per_frame=20, block=(32, 32), sparsity=0.999)
    assert (mask.sum(-1) == 1).all()


def test_slot_order_does_not_change_what_is_selected():
    layout, generator = FrameBlocks(20, 8), torch.Generator().manual_seed(0)
    frames = 12
    k_means = torch.randn(1, frames * layout.per_frame, 2, 8, generator=generator)
    q_means = torch.randn(1, 3 * layout.per_frame, 2, 8, generator=generator)
    options = {"sparsity": 0.8, "keep_frames": 6, "sink_frames": 1, "near_frames": 2}
    in_order = SelectionPlan.build(range(frames), 3, layout, **options)
    expected = in_order.select(q_means, k_means, layout.frame_means(k_means)).to_mask(k_means.shape[1])

    ring = [0, 10, 11, 3, 4, 5, 6, 7, 8, 9, 1, 2]  # the frame that each slot holds
    blocks = torch.tensor([frame * layout.per_frame + j for frame in ring for j in range(layout.per_frame)])
    shuffled = k_means[:, blocks]
    plan = SelectionPlan.build(ring, 3, layout, **options)
    mask = plan.select(q_means, shuffled, layout.frame_means(shuffled)).to_mask(k_means.shape[1])
    assert torch.equal(mask, expected[..., blocks])


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
    for block, (_, start, end) in enumerate(block_spans(3, 7, 4)):
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
    ],
)
def test_bad_requests_name_the_value(arguments, message):
    q, k = torch.randn(1, 40, 1, 8), torch.randn(1, 120, 1, 8)
    with pytest.raises(ValueError, match=message):
        hierarchical_block_mask(q, k, **{"tokens_per_frame": 20, "block": (8, 8), **arguments})


def test_a_chunk_longer_than_its_keys_is_refused():
    with pytest.raises(ValueError, match="q holds 3 frames but k only 2"):
        hierarchical_block_mask(torch.randn(1, 60, 1, 8), torch.randn(1, 40, 1, 8), tokens_per_frame=20, sparsity=0.5)
