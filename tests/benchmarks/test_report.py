"""The report of `doctor` and `bench gpu`: its form, and stages that hang, die or fail."""

import getpass
import json
import os
import platform
import re
import signal
import time
from pathlib import Path

import torch
from typer.testing import CliRunner

from lightforcing.benchmarks import checks, gpu
from lightforcing.benchmarks.stages import NotHere, Stage, run_stages
from lightforcing.cli.main import app

DICTS = {"facts", "ceilings", "forward", "decode", "clip", "faults", "choices"}
LISTS = {"advice", "kernels", "attention", "stages"}
STAGES = ["facts", "ceilings", "compile", "numerics", "attention", "forward", "clip", "faults", "choices"]


def check(report):
    """Assert the report's form, and that it names no path, user or machine."""
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report
    assert set(report) == {"schema", "key", "ok"} | DICTS | LISTS
    assert (report["schema"], type(report["key"]), type(report["ok"])) == (1, str, bool)
    assert all(isinstance(report[name], dict) for name in DICTS)
    assert all(isinstance(report[name], list) for name in LISTS)
    assert all(isinstance(sentence, str) for sentence in report["advice"])
    for name, keys in (
        ("kernels", {"kind"}),
        ("attention", {"chunk", "backend", "ms"}),
        ("stages", {"stage", "state"}),
    ):
        assert all(keys <= set(row) for row in report[name])
    assert len({row["kind"] for row in report["kernels"]}) == len(report["kernels"])
    names = [re.escape(name) for name in (getpass.getuser(), platform.node(), Path.home().name) if name]
    assert not re.search(rf"\b({'|'.join(names)})\b|[A-Z]:\\|(?<![\w.])/\w+/", text)


def hang(report, put):
    put("ceilings", {"copy": 1.0})
    time.sleep(600)


def die(report, put):
    put("kernels", {"kind": "store", "shared": 1})
    put("kernels", {"kind": "store", "verified": None})
    os.kill(os.getpid(), signal.SIGSEGV)


def die_twice(report, put):
    for kind in "abcd"[len(report["kernels"]) :]:
        put("kernels", {"kind": kind, "verified": None})
        if kind in "ac":
            os.kill(os.getpid(), signal.SIGSEGV)
        put("kernels", {"kind": kind, "verified": True})


def fail(report, put):
    raise RuntimeError(f"{Path.home()}/models/a.safetensors and C:\\Users\\joe\\b.pt are damaged, int8/fp8\nmore")


def absent(report, put):
    raise NotHere("no GPU")


def fine(report, put):
    put("kernels", {"kind": "store", "seen": report["kernels"][0]["shared"]})
    put("advice", "once")
    put("advice", "once")
    return "small"


def test_a_stage_that_hangs_dies_or_fails_costs_only_its_own_rest():
    stages = [Stage(run.__name__, run, 10 if run is hang else 60) for run in (absent, hang, die, fail, fine)]
    report = run_stages(stages, print)
    check(report)
    ends = {row["stage"]: (row["state"], row["reason"]) for row in report["stages"]}
    assert ends == {
        "hang": ("hung", "it did not end within 10 s"),
        "die": ("crashed", "its process ended with exit code -11"),
        "fail": ("failed", "RuntimeError: a.safetensors and b.pt are damaged, int8/fp8"),
        "absent": ("skipped", "no GPU"),
        "fine": ("done", "small"),
    }
    assert report["ceilings"] == {"copy": 1.0}
    assert report["kernels"] == [{"kind": "store", "shared": 1, "verified": None, "seen": 1}]
    assert not report["ok"]
    assert [sentence.partition(":")[0] for sentence in report["advice"]] == [
        "once",
        "store is wrong here",
        *(f"stage {name} {ends[name][0]}" for name in ("hang", "die", "fail")),
    ]


def test_checks_after_a_crash_run_in_a_new_process():
    report = run_stages([Stage("checks", die_twice, 60)], print)
    check(report)
    assert [row["verified"] for row in report["kernels"]] == [None, True, None, True]
    assert [(row["state"], row["rest"]) for row in report["stages"]] == [("crashed", "done")]
    assert not report["ok"]


def test_numerics_leaves_out_the_checks_before_a_crash(monkeypatch):
    kinds = [kind for kind, *_ in checks.checks(checks._real(), 0)]
    monkeypatch.setattr(checks, "_verify", lambda runs, limit: {"verified": True})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    rows = []
    report = {
        "kernels": [{"kind": kinds[0], "verified": True}, {"kind": kinds[1], "verified": None}, {"kind": kinds[2]}]
    }
    checks.numerics(0, report, lambda section, row: rows.append(row["kind"]))
    assert list(dict.fromkeys(rows)) == kinds[2:]


def test_a_version_below_the_oldest_supported_is_not_ok(monkeypatch):
    monkeypatch.setattr(gpu, "OLDEST", {"torch": (99, 1)})
    put = []
    gpu.facts(0, {}, lambda section, value: put.append((section, value)))
    assert ("ok", False) in put
    assert any(section == "advice" and "install torch 99.1 or newer" in str(value) for section, value in put)


def test_bench_gpu_checks_and_times_what_a_cpu_can(tmp_path):
    path = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--quick", "--out", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    check(report)
    assert [row["stage"] for row in report["stages"]] == STAGES
    assert {row["state"] for row in report["stages"]} == {"done"}, report["stages"]
    assert report["ok"]
    assert all(row["verified"] and row["error"] <= row["limit"] for row in report["kernels"])
    assert all(report[name] for name in DICTS - {"choices"} | {"attention", "kernels"})
    assert all(report["faults"].values())
    assert "all is well" in done.output


def test_doctor_exits_with_an_error_if_something_is_wrong(tmp_path, monkeypatch):
    facts = gpu.stages(0, everything=False)[0]
    for stage, code in ((facts, 0), (Stage("dies", die, 60), 1)):
        monkeypatch.setattr(gpu, "stages", lambda level, stage=stage, **_: [stage])
        done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "d.json")])
        assert done.exit_code == code, done.output
        check(json.loads((tmp_path / "d.json").read_text()))
