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
from lightforcing.benchmarks.console import add
from lightforcing.benchmarks.settings import GpuBench
from lightforcing.benchmarks.stages import NotHere, Stage, run_stages
from lightforcing.cli.main import app


def check(report):
    """Assert the report's form, and that it names no path, user or machine."""
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text) == report
    assert (report["schema"], type(report["ok"])) == (1, bool)
    assert all(isinstance(rows, dict) for name, rows in report.items() if name not in ("schema", "ok"))
    assert all({"state", "remark", "seconds"} <= set(row) for row in report["stages"].values())
    names = [re.escape(name) for name in (getpass.getuser(), platform.node(), Path.home().name) if name]
    assert not re.search(rf"\b({'|'.join(names)})\b|[A-Z]:\\|(?<![\w.])/\w+/", text)


def report_of(*stages):
    report = {}
    run_stages(stages, lambda *row: add(report, *row), print)
    check(report)
    return report


def hang(record, put):
    put("ceilings", "copy", 1.0)
    time.sleep(600)


def die(record, put):
    put("kernels", "store", {"shared": 1})
    put("kernels", "store", {"verified": None})
    os.kill(os.getpid(), signal.SIGSEGV)


def die_at_once(bench, record, put):
    os.kill(os.getpid(), signal.SIGSEGV)


def die_twice(record, put):
    for kind in "abcd"[len(record["kernels"]) :]:
        put("kernels", kind, {"verified": None})
        if kind in "ac":
            os.kill(os.getpid(), signal.SIGSEGV)
        put("kernels", kind, {"verified": True})


def fail(record, put):
    raise RuntimeError(f"{Path.home()}/models/a.safetensors and C:\\Users\\joe\\b.pt are damaged, int8/fp8\nmore")


def absent(record, put):
    raise NotHere("no GPU")


def fine(record, put):
    put("kernels", "store", {"seen": record["kernels"]["store"]["shared"]})
    return "small"


def test_a_stage_that_hangs_dies_or_fails_costs_only_its_own_rest():
    report = report_of(
        *(Stage(run.__name__, run, 10 if run is hang else 60) for run in (absent, hang, die, fail, fine))
    )
    ends = {name: (row["state"], row["remark"]) for name, row in report["stages"].items()}
    assert ends == {
        "absent": ("skipped", "no GPU"),
        "hang": ("hung", "it did not end within 10 s"),
        "die": ("crashed", "its process ended with exit code -11"),
        "fail": ("failed", "RuntimeError: a.safetensors and b.pt are damaged, int8/fp8"),
        "fine": ("done", "small"),
    }
    assert report["ceilings"] == {"copy": 1.0}
    assert report["kernels"] == {"store": {"shared": 1, "verified": None, "seen": 1}}
    assert not report["ok"]
    assert list(report["advice"]) == ["store", "stage hang", "stage die", "stage fail"]


def test_checks_after_a_crash_run_in_a_new_process():
    report = report_of(Stage("checks", die_twice, 60))
    assert [row["verified"] for row in report["kernels"].values()] == [None, True, None, True]
    assert [(row["state"], row["rest"]) for row in report["stages"].values()] == [("crashed", "done")]
    assert not report["ok"]


def test_numerics_leaves_out_the_checks_before_a_crash(monkeypatch):
    kinds = [kind for kind, *_ in checks.checks(None, 0)]
    monkeypatch.setattr(checks, "_verify", lambda runs, limit: {"verified": True})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    rows = []
    record = {"kernels": {kinds[0]: {"verified": True}, kinds[1]: {"verified": None}, kinds[2]: {}}}
    checks.kernels(GpuBench(quick=True), record, lambda section, kind, row: rows.append(kind))
    assert list(dict.fromkeys(rows)) == kinds[2:]


def test_a_version_below_the_oldest_supported_is_not_ok(monkeypatch):
    monkeypatch.setattr(gpu, "OLDEST", {"torch": (99, 1)})
    found = {}
    gpu.facts(GpuBench(), {}, lambda *row: add(found, *row))
    assert found["facts"]["outdated"] == "torch"
    assert "install torch 99.1 or newer" in found["advice"]["torch"]


def test_bench_gpu_checks_and_times_what_a_cpu_can(tmp_path):
    path = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--quick", "--out", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    check(report)
    assert list(report["stages"]) == [*gpu.CHECKS, *gpu.MEASUREMENTS]
    assert {row["state"] for row in report["stages"].values()} == {"done"}, report["stages"]
    assert report["ok"]
    assert all(row["verified"] and row["error"] <= row["limit"] for row in report["kernels"].values())
    for section in ("facts", "ceilings", "kernels", "attention", "forward", "operations", "decode", "clip", "faults"):
        assert report[section]
    assert all(report["faults"].values())
    assert "no GPU" in report["stages"]["forward"]["remark"]
    assert "all is well" in done.output


def test_doctor_exits_with_an_error_if_something_is_wrong(tmp_path, monkeypatch):
    for stage, code in ((gpu.facts, 0), (die_at_once, 1)):
        monkeypatch.setattr(gpu, "CHECKS", {"one": stage})
        done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "d.json")])
        assert done.exit_code == code, done.output
        check(json.loads((tmp_path / "d.json").read_text()))
