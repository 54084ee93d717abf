"""The command that measures memory estimates."""

import json

import pytest
from typer.testing import CliRunner

from laboratory import memory
from lightforcing.benchmarks.settings import Model, Picture
from lightforcing.lightforcing_core.rollout.schedule import Schedule


def test_an_estimate_is_printed_beside_its_measurement(tmp_path, monkeypatch):
    sizes = Picture(32, 32), Model(128, 128, 1)
    case = memory.MemoryCase("small", Schedule(6), *sizes, text_tokens=8, text_dim=16)
    monkeypatch.setattr(memory, "CPU_CASES", (case,))
    done = CliRunner().invoke(memory.app, ["--device", "cpu", "--out", str(tmp_path / "result.json")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["cases"]
    assert row["error"] == pytest.approx(row["estimated_bytes"] / row["measured_bytes"] - 1)
    assert result["largest_error"] == abs(row["error"])
    assert "small" in done.output
