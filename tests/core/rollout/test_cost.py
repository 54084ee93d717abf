"""FLOPs of a schedule against dense attention, held to the published figures of one clip."""

import pytest

from lightforcing.lightforcing_core.rollout.cost import clip_cost, flops_ratio, schedule_costs


def test_dense_clip_costs_what_is_published():
    cost = clip_cost(schedule_costs([0.0] * 7, [3] * 7, None), tokens_per_frame=1536)
    assert cost.dense_attention == pytest.approx(548e12, rel=2e-3)
    assert cost.linears == pytest.approx(403e12, rel=2e-3)
    assert cost.attention_ratio == cost.model_ratio == 1.0


def test_sparsity_saves_attention_and_leaves_the_linears():
    chunks = schedule_costs([0.0, 0.5, 0.75], [3, 3, 3], None)
    cost = clip_cost(chunks)
    assert cost.attention_ratio == pytest.approx((1 * 1 + 2 * 0.5 + 3 * 0.25) / 6)
    saved = cost.dense_attention - cost.attention
    assert cost.model_ratio == pytest.approx(1 - saved / (cost.dense_attention + cost.linears))


def test_window_bounds_dense_attention_too():
    cost = clip_cost(schedule_costs([0.0] * 20, [3] * 20, 12))
    whole = clip_cost(schedule_costs([0.0] * 20, [3] * 20, None))
    assert cost.attention_ratio == 1.0
    assert cost.dense_attention / whole.dense_attention == pytest.approx((3 + 6 + 9 + 17 * 12) / (3 * 210))


def test_forwards_and_model_size_scale_everything():
    chunks = schedule_costs([0.0, 0.6], [3, 3], None)
    small, large = clip_cost(chunks, forwards=2), clip_cost(chunks, forwards=2, layers=40, dim=5120, ffn_dim=13824)
    assert clip_cost(chunks, forwards=4).attention == pytest.approx(2 * small.attention)
    assert large.attention / small.attention == pytest.approx(40 * 5120 / (30 * 1536))
    assert large.linears / small.linears == pytest.approx(
        40 * (6 * 5120**2 + 2 * 5120 * 13824) / (30 * (6 * 1536**2 + 2 * 1536 * 8960))
    )


def test_chunk_costs_follow_the_window():
    costs = schedule_costs([0.0, 0.5, 0.75], [1, 3, 3], window=4)
    assert [(cost.frames, cost.kv_frames) for cost in costs] == [(1, 1), (3, 4), (3, 4)]
    assert [cost.density for cost in costs] == [1.0, 0.5, 0.25]


def test_flops_ratio_weights_chunks_by_their_queries_and_keys():
    costs = schedule_costs([0.0, 0.5], [1, 2], window=None)
    # Dense: 1·1 + 2·3 = 7 frame pairs; sparse: 1·1 + 2·3·0.5 = 4.
    assert flops_ratio(costs) == pytest.approx(4 / 7)


def test_a_schedule_without_one_sparsity_per_chunk_is_refused():
    with pytest.raises(ValueError, match="longer"):
        schedule_costs([0.0, 0.5], [3, 3, 3], window=None)
