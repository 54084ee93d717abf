"""`lightforcing bench` at its smallest: what the JSON holds, and that every ratio is made from both arms."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from lightforcing.benchmarks import attention, layer, step
from lightforcing.benchmarks.rollout import EARLY, over_rounds, summarise
from lightforcing.benchmarks.settings import AttentionBench, Machine, Model, Picture, Place, StepBench
from lightforcing.benchmarks.timing import ratio, take_turns
from lightforcing.cli.main import app
from lightforcing.lightforcing_core.model import cuda_graph

from ..support.tape import TapeRecorder

CPU = torch.device("cpu")
ON_CPU = Place(Machine("cpu"))
MACHINE = {"machine", "threads", "torch", "triton", "commit", "arguments", "gpu", "bench"}
TINY_MODEL = ("--dim", 128, "--ffn-dim", 128, "--layers", 1, "--height", 32, "--width", 32)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def record(tmp_path, *arguments):
    path = tmp_path / "new" / "result.json"
    done = run(*arguments, "--device", "cpu", "--out", path)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert set(result) >= MACHINE
    assert result["bench"] == arguments[0]
    return result, done.output


def median_ratio(slow, fast):
    return statistics.median(a / b for a, b in zip(slow["seconds"], fast["seconds"], strict=True))


def test_attention_compares_both_arms_of_each_chunk(tmp_path):
    small = ("--tokens-per-frame", 24, "--heads", 1, "--block", "16,16", "--chunks", "2,7", "--repeats", 3)
    result, output = record(tmp_path, "attention", *small, "--backend", "reference")
    assert [row["chunk"] for row in result["chunks"]] == [2, 7]
    assert [(row["queries"], row["keys"]) for row in result["chunks"]] == [(72, 144), (72, 504)]
    for row in result["chunks"]:
        arms, ratios = row["arms"], row["ratios"]["reference"]
        assert set(arms) == {"dense sdpa", "selection", "kernel reference", "whole reference"}
        assert all(len(arm["seconds"]) == 3 for arm in arms.values())
        assert ratios["kernel"]["median"] == pytest.approx(median_ratio(arms["dense sdpa"], arms["kernel reference"]))
        assert ratios["with_selection"]["median"] == pytest.approx(
            median_ratio(arms["dense sdpa"], arms["whole reference"])
        )
        assert row["selection_share_of_dense"] == pytest.approx(median_ratio(arms["selection"], arms["dense sdpa"]))
        assert row["ideal_ratio"] == row["key_blocks"] / row["kept_blocks"]
        assert row["largest_error"]["reference"] < 0.02
    for words in ("with selection", "warm-up: every arm runs 2 times", "commit"):
        assert words in output


def test_attention_takes_other_options_and_refuses_to_time_a_wrong_result(monkeypatch):
    bench = AttentionBench(24, 1, (16, 16), chunks=(2,), backend=("reference",), repeats=1, place=ON_CPU)
    options = replace(bench, estimator="lse", tail=True, kv="int8")
    for one in (bench, options):
        assert attention.run_attention(one, print)["chunks"][0]["largest_error"]["reference"] < 0.01
    monkeypatch.setattr(layer, "sparse_attention", lambda q, k, v, **rest: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="differs from the reference"):
        attention.run_attention(bench, print)


def test_attention_takes_every_backend_that_can_run_but_not_the_reference():
    bench = AttentionBench(24, 1, (16, 16))
    q, k = torch.zeros(1, 72, 1, 128), torch.zeros(1, 144, 1, 128)
    absent = {}
    able = attention._sparse_backends(bench, q, k, absent)
    assert able
    assert set(able).isdisjoint(absent)
    assert "triton" in absent  # its interpreter is no backend to be timed
    assert "reference" not in able or able == ["reference"]


def test_step_times_both_arms_and_their_operations(tmp_path):
    result, output = record(tmp_path, "step", *TINY_MODEL, "--repeats", 2, "--chunk", 3)
    arms = result["arms"]
    assert result["ratio"]["median"] == pytest.approx(median_ratio(arms["dense"], arms["sparse"]))
    assert (result["queries"], result["keys"]) == (12, 36)
    assert result["density"] < 1.0
    for operations in result["stages"].values():
        assert "aten::addmm" in operations
        assert list(operations.values()) == sorted(operations.values(), reverse=True)
    assert result["host_ms"] > 0
    assert "one forward of 1 layers, chunk 3" in output


def test_rollout_lists_every_chunk_and_compares_whole_videos(tmp_path):
    result, output = record(tmp_path, "rollout", *TINY_MODEL, "--decode", "--vae-dim", 4, "--frames", 25)
    rows = result["chunks"]
    assert [row["latent_frames"] for row in rows] == [3, 3, 1]
    totals = {arm: sum(sum(row[arm].values()) for row in rows) for arm in ("dense", "sparse")}
    assert all(set(row["sparse"]) == {"sample", "decode"} for row in rows)
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert result["dense_over_sparse"]["video"] == pytest.approx(totals["dense"] / totals["sparse"])
    assert "flatness" not in result
    assert "as fast as dense: video" in output


def test_step_measures_each_arm_as_a_graph_too(monkeypatch):
    for module in (step, cuda_graph):
        monkeypatch.setattr(module, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(cuda_graph, "_checked", set())
    monkeypatch.setattr(TapeRecorder, "events", [])
    model, place = Model(128, 128, 1), Place(Machine("cpu"), "float32")
    bench = StepBench(2, model, Picture(32, 32), repeats=2, cuda_graph=True, place=place)
    result = step.run_step(bench)
    arms = result["arms"]
    assert set(arms) == {"dense", "sparse", "dense, graph", "sparse, graph"}
    for name in ("dense", "sparse"):
        assert result["graph_ratio"][name]["median"] == pytest.approx(median_ratio(arms[name], arms[f"{name}, graph"]))
    # Recorded in the second of two warm-up runs, timed as launches only.
    assert [kind for kind, _ in TapeRecorder.events] == 2 * ["record", "launch"] + 4 * ["launch"]
    assert set(result["stages"]) == {"dense", "sparse"}


def test_rounds_give_the_median_and_the_most_memory(tmp_path):
    result, _ = record(tmp_path, "rollout", *TINY_MODEL, "--frames", 9, "--rounds", 3)
    assert len(result["chunks"]) == 1
    rows = [
        {"chunk": 1, "dense": {"sample": seconds}, "peak_bytes": peak}
        for seconds, peak in ((3.0, 10), (1.0, 30), (2.0, 20))
    ]
    assert over_rounds(rows, ["dense"]) == {"chunk": 1, "dense": {"sample": 2.0}, "peak_bytes": 30}


def test_rollout_of_one_arm_has_no_ratio_and_says_what_became_of_cuda_graphs(tmp_path):
    options = ("--arm", "sparse", "--setting", "long", "--frames", 21, "--cuda-graph", "auto")
    overlap = ("--decode", "--overlap", "--vae-dim", 4)  # times sampling and decoding as one
    result, output = record(tmp_path, "rollout", *TINY_MODEL, *options, *overlap)
    assert [set(row["sparse"]) for row in result["chunks"]] == [{"both"}, {"both"}]
    assert result["seconds"]["sparse"] == pytest.approx(sum(row["sparse"]["both"] for row in result["chunks"]))
    assert result["cuda_graphs"] == {"sparse": "not used: CUDA graphs are for NVIDIA GPUs, not for cpu"}
    assert "CUDA graphs, sparse: not used: CUDA graphs are for NVIDIA GPUs" in output
    assert "dense_over_sparse" not in result
    assert set(result["seconds"]) == {"sparse"}


def test_flatness_compares_chunks_of_full_length():
    rows = [
        {"chunk": n, "latent_frames": 3, "sparse": {"sample": 1.0 if n <= 20 else 1.5}, "peak_bytes": 100 + n}
        for n in range(1, 81)
    ]
    rows.append({"chunk": 81, "latent_frames": 1, "sparse": {"sample": 9.0}, "peak_bytes": 999})
    result = summarise(rows, ("sparse",))
    assert result["flatness"] == {"chunks": [10, 80], "memory": 180 / 110, "sparse_seconds": 1.5}
    assert result["peak_bytes"] == 999
    assert "flatness" not in summarise(rows[: 2 * EARLY - 1], ("sparse",))


def test_arms_take_turns_after_their_warm_up_and_a_ratio_is_made_of_rounds():
    calls = []
    samples = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, device=CPU)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert [len(seconds) for seconds in samples.values()] == [3, 3]
    # The median of the rounds, not of the medians.
    assert ratio((1.0, 8.0, 4.0), (1.0, 2.0, 2.0)) == {"median": 2.0, "quartiles": [1.5, 3.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--chunks", "1"], "chunk 1 has no sparse arm; use 2 to 7"),
        (["attention", "--chunks", "x"], "chunks 'x' is not a list of numbers like 2-4,7"),
        (["attention", "--block", "64"], "block '64' is not a list of 2 numbers"),
        (["attention", "--backend", "magic"], "unknown attention backend 'magic'"),
        (["step", "--chunk", "8"], "chunk 8 has no sparse arm; use 2 to 7"),
        (["step", "--dtype", "int8"], "dtype 'int8' is not known; use bfloat16, float16, float32"),
        (["rollout", "--frames", "80"], "length 80 is not 1 + 4·k video frames; use 77 or 81"),
        (["rollout", "--arm", "fast"], "must be one or more of dense, sparse, even"),
        (["rollout", "--setting", "medium"], "setting 'medium' is not known; use short, long"),
        (["rollout", "--overlap"], "overlap needs decode; use --decode too"),
        (["rollout", "--overlap", "--decode"], "overlap cannot measure the interleaved arms dense, sparse"),
        (["rollout", "--cuda-graph", "yes"], "cuda_graph 'yes' is not known; use auto, on, off"),
        (["rollout", "--cuda-graph", "on", "--device", "cpu"], "CUDA graphs are for NVIDIA GPUs, not for cpu"),
        (["step", "--cuda-graph", "--device", "cpu"], "CUDA graphs are for NVIDIA GPUs, not for cpu"),
        (["rollout", "--device", "mps"], "device 'mps' cannot be measured"),
    ],
)
def test_impossible_requests_are_one_line_on_stderr(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
