"""The report: FLOPs counted against a hand count, stages timed."""

import json

import pytest

from lightforcing.lightforcing_core.report.plots import RunReport
from lightforcing.lightforcing_core.rollout.cost import flops_ratio, schedule_costs


def test_costs_follow_the_window():
    costs = schedule_costs([0.0, 0.5, 0.75], [1, 3, 3], window=4)
    assert [(cost.start_frame, cost.frames, cost.kv_frames) for cost in costs] == [(0, 1, 1), (1, 3, 4), (4, 3, 4)]
    assert [cost.density for cost in costs] == [1.0, 0.5, 0.25]


def test_flops_ratio_weighs_chunks_by_their_queries_and_keys():
    costs = schedule_costs([0.0, 0.5], [1, 2], window=None)
    # Dense: 1·1 + 2·3 = 7 frame pairs; sparse: 1·1 + 2·3·0.5 = 4.
    assert flops_ratio(costs) == pytest.approx(4 / 7)


def test_schedule_without_one_sparsity_per_chunk_is_refused():
    with pytest.raises(ValueError, match="2 sparsities for 3 chunks"):
        schedule_costs([0.0, 0.5], [3, 3, 3], window=None)


def test_attention_flops_equal_a_hand_count():
    report = RunReport(tokens_per_frame=10, layers=2, heads=3, head_dim=4, forwards=5)
    report.chunks = schedule_costs([0.0, 0.5], [1, 1], window=None)
    # One product q·kᵀ and one p·v, 2 FLOPs per multiply-add; the last chunk has no clean pass.
    per_call = [2 * 2 * 2 * 3 * 4 * 10 * 10, 2 * 2 * 2 * 3 * 4 * 10 * 20]
    assert report.attention_flops(dense=True) == 5 * per_call[0] + 4 * per_call[1]
    assert report.attention_flops() == 5 * per_call[0] + 4 * per_call[1] / 2


def test_stage_counts_a_block_that_fails(monkeypatch):
    clock = iter([1.0, 3.5, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    report = RunReport(tokens_per_frame=1, layers=1, heads=1, head_dim=1, forwards=1)
    with pytest.raises(RuntimeError), report.stage("decode"):
        raise RuntimeError
    with report.stage("decode"):
        pass
    assert report.seconds == {"decode": 3.5}


def test_json_holds_the_totals_and_every_chunk():
    report = RunReport(tokens_per_frame=8, layers=1, heads=1, head_dim=2, forwards=5)
    report.chunks = schedule_costs([0.0, 0.9], [3, 3], window=None)
    report.seconds = {"denoise": 1.5, "decode": 0.5}
    read = json.loads(report.to_json())
    assert read["total_seconds"] == 2.0
    assert [chunk["sparsity"] for chunk in read["chunks"]] == [0.0, 0.9]
    assert read["attention_flops_ratio"] == pytest.approx(report.attention_flops() / report.attention_flops(dense=True))


def test_report_without_chunks_is_still_valid_json():
    read = json.loads(RunReport(tokens_per_frame=1, layers=1, heads=1, head_dim=1, forwards=1).to_json())
    assert read["attention_flops_ratio"] == 1.0
