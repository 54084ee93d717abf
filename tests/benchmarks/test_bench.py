"""`lightforcing bench` at its smallest: what the JSON holds, and that every ratio is made from both arms."""

import json
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lightforcing.benchmarks import attention, core, decode, policies, rollout, step
from lightforcing.benchmarks.console import add
from lightforcing.benchmarks.settings import AttentionBench, CoreBench, Machine, Model, Picture, Place, StepBench
from lightforcing.benchmarks.timing import WARM_UP, ratio, take_turns
from lightforcing.cli.main import app
from lightforcing.lightforcing_core.attention.policies import POLICIES
from lightforcing.lightforcing_core.model import cuda_graph

from ..support.tape import TapeRecorder
from ..support.tiny_demo import write_tiny_demo

CPU = torch.device("cpu")
ON_CPU = Place(Machine("cpu"))
TINY_MODEL = ("--dim", 128, "--ffn-dim", 128, "--layers", 1, "--height", 32, "--width", 32)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def record(tmp_path, name, *arguments):
    path = tmp_path / "new" / "result.json"
    done = run(name, *arguments, "--device", "cpu", "--out", path)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert set(result["facts"]) >= {"name", "threads", "torch", "triton", "commit"}
    assert result["arguments"][name]["place"] == {"machine": {"device": "cpu", "threads": None}, "dtype": "bfloat16"}
    return result, done.output


def recorded(measure, bench):
    result = {}
    measure(bench, lambda *row: add(result, *row))
    return result


def median_ratio(slow, fast):
    return pytest.approx(statistics.median(a / b for a, b in zip(slow, fast, strict=True)))


def test_attention_compares_both_arms_of_each_chunk(tmp_path):
    small = ("--tokens-per-frame", 24, "--heads", 1, "--block", "16,16", "--chunks", "2,7", "--repeats", 3)
    result, output = record(tmp_path, "attention", *small, "--backend", "reference")
    assert list(result["attention"]) == ["chunk 2, 83%, reference", "chunk 7, 90%, reference"]
    for row, ms in zip(result["attention"].values(), result["ms"].values(), strict=True):
        assert set(ms) == {"dense torch", *(f"{name} reference" for name in ("kernel", "whole", "selection"))}
        assert all(len(times) == 3 for times in ms.values())
        assert row["kernel ×"]["median"] == median_ratio(ms["dense torch"], ms["kernel reference"])
        assert row["whole ×"]["median"] == median_ratio(ms["dense torch"], ms["whole reference"])
        assert row["ideal ×"] > 5
        assert row["error"] < 0.02
    for words in ("chunk 7, 90%, reference", "commit", "whole ×"):
        assert words in output


def test_attention_takes_other_options_and_refuses_to_time_a_wrong_result(monkeypatch):
    bench = AttentionBench(24, 1, (16, 16), chunks=(2,), backend=("reference",), repeats=1, place=ON_CPU)
    options = replace(bench, estimator="lse", tail=True, kv="int8", sparsity=(0.5, 0.8))
    for one, rows in ((bench, 1), (options, 2)):
        found = recorded(attention.measure, one)["attention"]
        assert [row["error"] < 0.01 for row in found.values()] == rows * [True]
    monkeypatch.setattr(
        attention.LayerAttention, "arm", lambda self, blocks: lambda: torch.full_like(self.q, self.q.element_size())
    )
    with pytest.raises(RuntimeError, match="reference differs from float64"):
        recorded(attention.measure, bench)


def test_policies_are_compared_with_the_method_that_reads_as_much(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "SHIPPED", write_tiny_demo(tmp_path / "models"))
    small = ("--seeds", 2, "--height", 64, "--width", 64, "--block", "16,16", "--repeats", 2)
    result, output = record(tmp_path, "policies", *small, "--backend", "reference")
    errors, layers, ms = result["error"], result["layer"], result["ms"]["layer"]
    of_whole_runs = {"forcing_kv", "dummy_forcing", "rolling_sink", "echo_forcing", "rolling_forcing", "pbsa"}
    assert set(POLICIES) - set(errors) == of_whole_runs
    assert set(errors) == set(layers) == set(ms)
    assert errors["dense"] == {"read": 1, "error": dict.fromkeys(("low", "median", "high"), 0)}
    for name in ("light_forcing", "light_forcing, lse + tail"):
        assert set(errors[name]["over light_forcing"].values()) == {1}
    for name in ("mass", "topk"):  # they read what the schedule says
        assert errors[name]["read"] == pytest.approx(errors["light_forcing"]["read"])
    assert errors["radial"]["read"] != errors["light_forcing"]["read"]
    assert errors["mass, lse + tail"]["error"]["median"] < errors["mass"]["error"]["median"]
    assert layers["light_forcing"]["times as fast"]["median"] == median_ratio(ms["dense"], ms["light_forcing"])
    dense, means, values = (layers[name]["KV GB"] for name in ("dense", "mass", "window, tail"))
    # 21 frames of 16 tokens, 12 heads of 128 in 30 layers.
    assert dense == pytest.approx(2 * 2 * 21 * 16 * 12 * 128 * 30 / 1e9)
    assert dense < means < values
    assert "over light_forcing" in output
    done = run("policies", "--sparsity", 1)
    assert "sparsity 1 is outside (0, 1)" in done.stderr


def test_step_times_both_arms_and_their_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "why_not_scaled_mm", lambda *_: None)
    result, output = record(tmp_path, "step", *TINY_MODEL, "--repeats", 2, "--chunk", 3, "--fp8", "--cuda-graph")
    forward, ms = result["forward"], result["ms"]["forward"]
    assert forward["sparse"]["times as fast"]["median"] == median_ratio(ms["dense"], ms["sparse"])
    assert forward["fp8"]["times as fast"]["median"] == median_ratio(ms["sparse"], ms["fp8"])
    assert forward["sparse"]["density"] < 1.0
    assert forward["sparse"]["host ms"] > 0
    assert set(result["operations"]["aten::addmm"]) >= {"dense ms", "sparse ms"}
    assert "CUDA graphs are for NVIDIA GPUs" in result["not here"]["graph"]
    assert "times as fast" in output


def test_step_measures_each_arm_as_a_graph_too(monkeypatch):
    for module in (step, cuda_graph):
        monkeypatch.setattr(module, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(cuda_graph, "_checked", set())
    monkeypatch.setattr(TapeRecorder, "events", [])
    model, place = Model(128, 128, 1), Place(Machine("cpu"), "float32")
    result = recorded(step.measure, StepBench(2, model, Picture(32, 32), repeats=2, cuda_graph=True, place=place))
    ms = result["ms"]["forward"]
    assert set(ms) == {"dense", "sparse", "dense graph", "sparse graph"}
    for name in ("dense", "sparse"):
        assert result["forward"][f"{name} graph"]["times as fast"]["median"] == median_ratio(
            ms[name], ms[f"{name} graph"]
        )
    # Recorded in the second of the warm-up runs, then timed as launches only.
    launches = WARM_UP - 2
    assert [kind for kind, _ in TapeRecorder.events] == 2 * ["record", *((1 + launches) * ["launch"])] + 4 * ["launch"]


def test_decode_times_vaes_and_a_tae(tmp_path):
    result, _ = record(tmp_path, "decode", "--vae-dims", 4, "--height", 32, "--width", 48, "--repeats", 2)
    assert set(result["decode"]) == {"TAE", "VAE 4"}
    assert all(row["ms per chunk"]["median"] > 0 for row in result["decode"].values())
    frames = decode.StreamingDecoder(decode.random_tae(), tae_latents="normalised").decode(torch.randn(1, 16, 2, 2, 3))
    assert frames.shape == (1, 5, 16, 24, 3)


def test_rollout_lists_every_chunk_and_compares_whole_videos(tmp_path):
    result, output = record(tmp_path, "rollout", *TINY_MODEL, "--decode", "--vae-dim", 4, "--frames", 25)
    assert [row["latent frames"] for row in result["chunks"].values()] == [3, 3, 1]
    dense, sparse = (sum(row[f"{arm} ms"] for row in result["chunks"].values()) for arm in ("dense", "sparse"))
    assert all(row["sparse ms"] > row["sparse decode ms"] > 0 for row in result["chunks"].values())
    assert result["times as fast as dense"]["video"]["median"] == pytest.approx(dense / sparse)
    assert result["clip"]["sparse"]["FPS"] == pytest.approx(25e3 / sparse)
    assert "flatness" not in result
    assert "CUDA graphs are for NVIDIA GPUs" in output


def test_rollout_of_one_arm_has_no_ratio(tmp_path):
    options = ("--arm", "sparse", "--setting", "long", "--frames", 21, "--decode", "--overlap", "--vae-dim", 4)
    result, _ = record(tmp_path, "rollout", *TINY_MODEL, *options)
    assert set(result["clip"]) == {"sparse"}
    assert "times as fast as dense" not in result


def test_rollout_takes_medians_of_rounds_and_says_how_flat_chunks_of_full_length_are():
    def video(slower):
        seconds = [slower * (1.0 if n <= 20 else 1.5) for n in range(1, 81)] + [9.0]
        chunks = [
            SimpleNamespace(index=n, frames=3 if n < 80 else 1, seconds={"denoise": s, "output": 0.0})
            for n, s in enumerate(seconds)
        ]
        return SimpleNamespace(chunks=chunks, facts={}), [100.0 + n + slower for n in range(1, 82)]

    result = {}
    rollout.summarise({"sparse": [video(x) for x in (3, 1, 2)]}, lambda *row: add(result, *row))
    assert result["chunks"]["1"] == {
        "latent frames": 3,
        "sparse ms": 2000.0,
        "sparse decode ms": 0.0,
        "sparse peak MB": 104.0,
    }
    assert list(result["flatness"]["sparse"].values()) == [183 / 113, 1.5]


def test_arms_take_turns_after_their_warm_up_and_one_that_does_not_run_says_why():
    calls, absent = [], {}
    arms = {name: lambda name=name: calls.append(name) for name in "ab"} | {"c": lambda: torch.ones(2) @ torch.ones(3)}
    ms = take_turns(arms, 3, CPU, lambda *row: add(absent, *row))
    assert "".join(calls) == WARM_UP * "a" + WARM_UP * "b" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in ms.items()} == {"a": 3, "b": 3}
    assert absent["not here"]["c"].startswith("RuntimeError")
    # The median of the rounds, not of the medians.
    assert ratio((1.0, 8.0, 4.0), (1.0, 2.0, 2.0)) == {"low": 1.5, "median": 2.0, "high": 3.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--chunks", "1"], "chunk 1 has no sparse arm; use 2 to 7"),
        (["attention", "--chunks", "x"], "chunks 'x' is not a list of numbers like 2-4,7"),
        (["attention", "--block", "64"], "block '64' is not a list of 2 numbers"),
        (["attention", "--backend", "magic"], "unknown attention backend 'magic'"),
        (["attention", "--backend", "flash4"], "attention backend 'flash4' cannot run"),
        (["step", "--dtype", "int8"], "dtype 'int8' is not known; use bfloat16, float16, float32"),
        (["rollout", "--frames", "80"], "length 80 is not 1 + 4·k video frames; use 77 or 81"),
        (["rollout", "--arm", "fast"], "must be one or more of dense, sparse, even"),
        (["rollout", "--overlap"], "overlap needs decode; use --decode too"),
        (["rollout", "--overlap", "--decode"], "overlap cannot measure the interleaved arms dense, sparse"),
        (["rollout", "--cuda-graph", "on", "--device", "cpu"], "CUDA graphs are for NVIDIA GPUs, not for cpu"),
        (["rollout", "--device", "mps"], "device 'mps' cannot be measured"),
    ],
)
def test_impossible_requests_are_one_line_on_stderr(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("python", "message"), [("", "COMFYUI_PYTHON '' are not"), (sys.executable, "exit code 1: ModuleNotFoundError")]
)
def test_core_refuses_without_a_comfyui_that_starts(python, message, tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", python)
    with pytest.raises(ValueError, match=message):
        recorded(core.measure, CoreBench())
