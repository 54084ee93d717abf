"""The selection kernels: equal to a brute force and to the torch path, ties included; memory, refusals, compilation."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lightforcing.kernels.selection import Parts, _order, select_blocks, why_not
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.selection import SUB_BLOCKS, sub_block_layout

from ..support.attention_problems import DEVICE, LARGEST, RING, brute_force_selection, selection_plan

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of what is masked


def means(per_frame, q_blocks, frames, batch=1, heads=1, dim=16, seed=0, values=2, dtype=torch.float32):
    """Integer means, whose inner products are exact in any order and often equal; frame means are their own draw."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-values, values + 1, (batch, rows, heads, dim), generator=generator).to(DEVICE, dtype)
        for rows in (q_blocks, frames * per_frame, frames)
    ]


def plan_for(per_frame, slot_frames, current, sparsity, keep=6, sinks=1, near=2):
    layout = FrameBlocks(16 * per_frame, 16)
    options = {"sparsity": sparsity, "keep_frames": keep, "sink_frames": sinks, "near_frames": near}
    return selection_plan(slot_frames, current, layout, **options, device=DEVICE)


def parts_of(plan, frames, heads=1, dim=16, batch=1, seed=0, dtype=torch.float32):
    """Random means of four parts to a block, fewer where a frame's last block is too short for more."""
    rows = frames * sub_block_layout(plan.layout).per_frame
    generator = torch.Generator().manual_seed(1000 + seed)
    means = torch.randn(batch, rows, heads, dim, generator=generator).to(DEVICE, dtype)
    return Parts(means, plan.layout.tokens_per_frame, plan.layout.block // SUB_BLOCKS, SUB_BLOCKS)


def lse_scores(q_mean, parts, layout):
    """Scores of blocks [k_blocks] and frames [frames] in float64 for one query mean [D] and parts [parts, D]."""
    size = layout.block // SUB_BLOCKS
    per_frame = -(-layout.tokens_per_frame // size)
    tokens = torch.tensor([min(size, layout.tokens_per_frame - part * size) for part in range(per_frame)])
    terms = (parts.double() @ q_mean.double() * len(q_mean) ** -0.5).view(-1, per_frame) + tokens.double().log()
    blocks = torch.stack([part.logsumexp(1) for part in terms.split(SUB_BLOCKS, dim=1)], dim=1)
    return blocks.flatten(), blocks.logsumexp(1)


def run(plan, q_means, k_means, frame_means):
    return select_blocks(q_means, k_means, frame_means, plan.frame_ranks, choose=plan.choose, kept=plan.kept)


def check(inputs, slot_frames, current=3, sparsity=0.7, keep=6, sinks=1, near=2):
    per_frame = inputs[1].shape[1] // inputs[2].shape[1]
    plan = plan_for(per_frame, slot_frames, current, sparsity, keep, sinks, near)
    blocks, counts = run(plan, *inputs)
    want = brute_force_selection(*inputs, slot_frames, current, keep, sinks, near, plan.kept)
    assert blocks.dtype == counts.dtype == torch.int32
    assert torch.equal(blocks.cpu(), want)
    assert (counts == plan.kept).all()
    assert counts.shape == blocks.shape[:3]
    through_torch = plan.select(*inputs)
    assert torch.equal(blocks, through_torch.blocks)
    assert torch.equal(counts, through_torch.counts)
    return plan


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_picks_equal_brute_force_with_many_ties(seed, dtype):
    check(means(3, 3, len(RING), batch=2, dim=8, seed=seed, values=1, dtype=dtype), RING)


@pytest.mark.parametrize(
    ("slot_frames", "current", "keep", "sinks", "near", "chosen"),
    [
        (RING, 1, 6, 0, 0, 6),
        (RING, 1, 2, 0, 1, 1),
        (RING, 3, 3, 1, 2, 0),
        (RING, 3, 0, 0, 0, 0),
        ([4, 5, 2, 3], 1, 2, 0, 1, 1),
        ([4, 5, 2, 3], 1, 2, 1, 0, 1),
        (RING, 3, 9, 1, 2, 0),
        (list(range(40)), 1, 8, 1, 2, 5),
        (list(range(40)), 1, 6, 1, 2, 4),  # 32 of 160 blocks are to be kept, and 7 frames hold 28
    ],
)
def test_picks_equal_brute_force_for_any_frame_budget(slot_frames, current, keep, sinks, near, chosen):
    inputs = means(2, 2, len(slot_frames), heads=2, seed=keep)
    plan = check(inputs, slot_frames, current, 0.8, keep, sinks, near)
    assert plan.choose == chosen


@pytest.mark.parametrize("sparsity", [0.999, 0.5, 0.1])
def test_equal_scores_go_to_the_lowest_ids_and_the_oldest_frames(sparsity):
    q, k, f = means(4, 2, len(RING))
    q.zero_()
    plan = check([q, k, f], RING, sparsity=sparsity)
    frames_kept = [0, 10, 11, 12, 4, 5, 6, 8, 9]  # all but the youngest of the middle frames 4, 5, 6 and 7
    slots = [slot for slot, frame in enumerate(RING) if frame in frames_kept]
    eligible = [slot * 4 + j for slot in slots for j in range(4)]
    assert run(plan, q, k, f)[0][0, 0, 0].tolist() == eligible[: plan.kept]
    assert plan.kept == {0.999: 1, 0.5: 20, 0.1: 36}[sparsity]


def lse_plan(layout, slot_frames, sparsity=0.7):
    return selection_plan(slot_frames, 3, layout, sparsity, device=DEVICE)


def select_by_parts(plan, q, parts):
    frames = len(plan.frame_ranks)
    k, f = (q.new_zeros(q.shape[0], rows, *q.shape[2:]) for rows in (frames * plan.layout.per_frame, frames))
    got = select_blocks(q, k, f, plan.frame_ranks, choose=plan.choose, kept=plan.kept, parts=parts)
    through_torch = plan.select(q, k, f, sub_means=parts.means)
    assert torch.equal(got[0], through_torch.blocks)
    assert torch.equal(got[1], through_torch.counts)
    return got[0].cpu()


# Whole blocks; a last block of one part, of two and a bit, of fewer tokens than a part; one block; two tiles of parts.
@pytest.mark.parametrize(
    ("tokens_per_frame", "dtype"),
    [
        (48, torch.float32),
        (36, torch.bfloat16),
        (42, torch.float16),
        (33, torch.float32),
        (7, torch.bfloat16),
        (300, torch.float32),
    ],
)
def test_scores_of_parts_equal_float64_and_torch(tokens_per_frame, dtype):
    layout = FrameBlocks(tokens_per_frame, 16)
    plan = lse_plan(layout, RING)
    generator = torch.Generator().manual_seed(tokens_per_frame)
    q = torch.randn(2, 2, 1, 16, generator=generator).to(DEVICE, dtype)
    parts = parts_of(plan, len(RING), batch=2, seed=tokens_per_frame, dtype=dtype)
    blocks = select_by_parts(plan, q, parts)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores, frame_scores = lse_scores(q[b, i, h], parts.means[b, :, h], layout)
        eligible = plan.always.clone()
        if plan.choose:
            best = frame_scores[plan.middle_slots].topk(plan.choose).indices
            for slot in plan.middle_slots[best].tolist():
                eligible[slot * layout.per_frame : (slot + 1) * layout.per_frame] = True
        want = scores.masked_fill(~eligible, -torch.inf).topk(plan.kept).indices.sort().values
        assert blocks[b, h, i].tolist() == want.tolist()


def test_blocks_of_equal_parts_go_to_the_lowest_ids_and_the_oldest_frames():
    plan = lse_plan(FrameBlocks(64, 16), RING, sparsity=0.5)
    parts = parts_of(plan, len(RING))
    one_block = parts.means[:, :SUB_BLOCKS]
    parts = parts._replace(means=one_block.repeat(1, 4 * len(RING), 1, 1))
    frames_kept = [0, 10, 11, 12, 4, 5, 6, 8, 9]  # all but the youngest of the middle frames 4, 5, 6 and 7
    eligible = [slot * 4 + j for slot, frame in enumerate(RING) if frame in frames_kept for j in range(4)]
    got = select_by_parts(plan, torch.ones(1, 2, 1, 16, device=DEVICE), parts)
    assert got[0, 0].tolist() == [eligible[: plan.kept]] * 2


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parts_that_are_not_finite_score_as_in_torch(bad):
    plan = lse_plan(FrameBlocks(42, 16), RING)
    parts = parts_of(plan, len(RING), dim=8, seed=1)
    q = torch.ones(1, 3, 1, 8, device=DEVICE)
    for rows in (slice(None, None, 5), slice(3, 14), slice(None)):
        parts.means[:, rows, :, 0] = bad
        select_by_parts(plan, q, parts)


@triton.jit
def store_order(scores_ptr, order_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(order_ptr + at, _order(tl.load(scores_ptr + at)))


def test_integers_compare_as_the_scores_do():
    ascending = [-LARGEST, -7.5, -1.0, -1e-42, 0.0, 1e-42, 0.5, 1.0, 1e30, LARGEST]
    equal = {-0.0: 0.0, math.inf: LARGEST, -math.inf: -LARGEST, math.nan: -LARGEST, -math.nan: -LARGEST}
    scores = torch.tensor([*ascending, *equal, 0.0], device=DEVICE)
    order = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    store_order[(1,)](scores, order, COUNT=16)
    order = order.tolist()
    assert order[:10] == sorted(set(order[:10]))
    assert order[10:15] == [order[ascending.index(same)] for same in equal.values()]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_have_their_place(bad):
    q, k, f = means(3, 2, len(RING), dim=8, seed=3)
    q[..., 0] = 1.0
    k[:, ::4, :, 0] = bad
    f[:, ::2, :, 0] = bad
    check([q, k, f], RING)
    q[:, 1] = bad
    k[..., 1] = 0.0  # inf · 0 is NaN
    check([q, k, f], RING)


@pytest.mark.parametrize(
    ("per_frame", "q_blocks", "frames", "dim"),
    [(1, 1, 7, 1), (25, 2, 21, 128), (57, 1, 10, 80), (13, 66, 8, 16), (2, 2, 150, 16), (60, 1, 20, 4)],
)
def test_picks_equal_brute_force_on_other_shapes(per_frame, q_blocks, frames, dim):
    """More than one tile of blocks, frames, query blocks and head dimension; odd lengths; rows beyond one warp."""
    check(means(per_frame, q_blocks, frames, dim=dim), list(range(frames)), sparsity=0.85)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_picks_differ_from_float64_by_rounding_only(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, 21 * 8, 21)
    inputs = [torch.randn(1, rows, 2, 64, generator=generator).to(DEVICE, torch.bfloat16) for rows in sizes]
    plan = plan_for(8, list(range(21)), 3, 0.88)
    got = run(plan, *inputs)[0].cpu()
    want = brute_force_selection(*inputs, list(range(21)), 3, 6, 1, 2, plan.kept)
    scores = torch.einsum("bqhd,bkhd->bhqk", *(x.cpu().double() for x in inputs[:2]))
    gap = scores.gather(-1, got.long()).sort(-1).values - scores.gather(-1, want.long()).sort(-1).values
    assert gap.abs().max() <= 1e-4


@pytest.mark.parametrize("layout", ["cache slices", "every second head", "heads first", "last dim strided"])
def test_any_strides_are_honoured(layout):
    q, k, f = means(3, 2, len(RING), batch=2, heads=2, dim=8, seed=5)
    if layout == "cache slices":  # the rows of frames that are not visible lie around
        wide = [torch.full((2, x.shape[1] + 9, 2, 8), math.nan, device=DEVICE) for x in (q, k, f)]
        for whole, x in zip(wide, (q, k, f), strict=True):
            whole[:, 4 : 4 + x.shape[1]] = x
        q, k, f = (whole[:, 4:-5] for whole in wide)
    elif layout == "every second head":
        q, k, f = (torch.stack([x, x + 1], dim=3).flatten(2, 3)[:, :, ::2] for x in (q, k, f))
    elif layout == "heads first":
        q, k, f = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, f))
    else:
        q, k, f = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, f))
    check([q, k, f], RING)


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize("choose_frames", [True, False])
def test_nothing_is_left_unwritten_or_written_outside(monkeypatch, choose_frames, by_parts):
    real, buffers = torch.empty, []

    def poisoned(*shape, dtype, device):
        size, fill = math.prod(shape), math.nan if dtype.is_floating_point else 10**9
        buffers.append(real(size + 128, dtype=dtype, device=device).fill_(fill))
        return buffers[-1][64 : 64 + size].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    keep = 6 if choose_frames else 3
    if by_parts:
        plan = lse_plan(FrameBlocks(42, 16), RING if choose_frames else RING[:8])
        select_by_parts(plan, torch.ones(1, 3, 1, 16, device=DEVICE), parts_of(plan, len(plan.frame_ranks)))
    else:
        check(means(5, 3, len(RING), heads=2), RING, keep=keep)
    assert len(buffers) == 3
    for buffer in buffers:
        edges = torch.cat([buffer[:64], buffer[-64:]])
        assert edges.isnan().all() if edges.is_floating_point() else (edges == 10**9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_means": torch.zeros(1, 2, 1, 16, dtype=torch.float64)}, "not torch.float64"),
        ({"k_means": torch.zeros(1, 20_000, 1, 16)}, "up to 16,384 key blocks in registers, not 20,000"),
        (
            {"k_means": torch.zeros(1, 8, 2, 16)},
            r"k_means must be torch.float32 \(1, 8, 1, 16\) on .* not torch.float32 \(1, 8, 2, 16\)",
        ),
        (
            {"frame_means": torch.zeros(1, 4, 1, 16, dtype=torch.float16)},
            "frame_means must be torch.float32 .* not torch.float16",
        ),
        ({"k_means": torch.zeros(1, 9, 1, 16)}, "9 key blocks do not fit 4 frames"),
        ({"frame_ranks": torch.zeros(4, dtype=torch.int64)}, "frame_ranks must be torch.int32 .* not torch.int64"),
        (
            {"frame_ranks": torch.zeros(5, dtype=torch.int32)},
            r"frame_ranks must be torch.int32 \(4,\) .* not torch.int32 \(5,\)",
        ),
        ({"frame_ranks": torch.zeros(4, dtype=torch.int32, device="meta")}, r"not torch.int32 \(4,\) on meta"),
        ({"kept": 9}, "cannot keep 9 of 8 key blocks"),
        ({"kept": 0}, "cannot keep 0 of 8 key blocks"),
        ({"choose": 5}, "choose 5 of 4 frames"),
        (
            {"parts": Parts(torch.zeros(1, 16, 1, 16).half(), 16, 4, 4)},
            "parts must be torch.float32 .* not torch.float16",
        ),
        ({"parts": Parts(torch.zeros(1, 16, 1, 16), 16, 4, 4)}, r"parts \(1, 16, 1, 16\) of 4 tokens, 4 to a block"),
    ],
)
def test_launcher_refuses_with_the_value(change, message):
    arguments = {
        "q_means": torch.zeros(1, 2, 1, 16),
        "k_means": torch.zeros(1, 8, 1, 16),
        "frame_means": torch.zeros(1, 4, 1, 16),
        "frame_ranks": torch.full((4,), -1, dtype=torch.int32),
        "choose": 0,
        "kept": 2,
    }
    with pytest.raises(ValueError, match=message):
        select_blocks(**(arguments | change))


def test_long_videos_are_taken_or_declined_with_a_reason():
    q = torch.empty(1, 75, 12, 128, dtype=torch.bfloat16, device=DEVICE)
    assert why_not(q, 21 * 57, 21) is None
    assert why_not(q, 240 * 25, 240) is None
    assert "not 23,940" in why_not(q, 420 * 57, 420)
    assert "not 8,000" in why_not(q, 8_000, 8_000)
