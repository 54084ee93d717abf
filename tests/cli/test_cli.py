"""The command line: files, output and exit codes."""

import json
import os

import imageio.v3 as iio
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.lightforcing_core.demo import model as demo_model
from lightforcing.lightforcing_core.model.wan import random_state_dict

from ..support.tiny_demo import write_tiny_demo


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def shipped(monkeypatch, tmp_path):
    """The folder in which the command looks for a demo model: with a tiny one, whatever the repository ships."""
    monkeypatch.setattr(demo_model, "SHIPPED", tmp_path / "shipped")
    return write_tiny_demo(tmp_path / "shipped")


def test_demo_writes_video_contact_sheet_and_report(tmp_path):
    result = run("demo", "--out", tmp_path / "new" / "demo", "--height", 64, "--width", 96, "--chunks", 2)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new" / "demo"
    assert sorted(os.listdir(folder)) == ["contact_sheet.png", "demo.mp4", "report.json"]
    video = iio.improps(folder / "demo.mp4", plugin="pyav")
    assert video.shape == (21, 64, 96, 3)  # 6 latent frames: 1 + 5 · 4
    assert iio.immeta(folder / "demo.mp4", plugin="pyav")["fps"] == 16.0
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 2 * 256
    report = json.loads((folder / "report.json").read_text())
    assert [chunk["density"] for chunk in report["chunks"]] == [1.0, pytest.approx(0.3, abs=0.08)]
    assert [chunk["steps"] for chunk in report["chunks"]] == [4, 4]
    assert set(report["seconds"]) == {"denoise", "output", "clean pass"}
    for words in ("of dense attention FLOPs", "clean pass", "chunk 2 of 2 done", "wrote "):
        assert words in result.output


def test_demo_shows_its_caption(tmp_path, shipped):
    def made(name, *arguments):
        result = run("demo", "--out", tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / name / "report.json").read_text())
        densities = [chunk["density"] for chunk in report["chunks"]]
        return report["facts"], densities, iio.imread(tmp_path / name / "demo.mp4", plugin="pyav")

    facts, densities, first = made("first")
    assert first.shape == (33, 32, 48, 3)  # the model's own sizes
    assert facts["caption"] == "on a plain background a red circle moves right slowly"
    assert facts["weights"] == f"the demo model in {shipped}"
    assert "blocks of 16 tokens" in facts["schedule"]
    assert densities[0] == 1.0 > densities[1]
    _, _, other = made("other", "--caption", "on a plain background a blue square moves left quickly", "--chunks", 2)
    assert (first[:21] != other).any()
    _, densities, dense = made("dense", "--target", 0, "--chunks", 2)
    assert (first[9:21] != dense[9:]).any()
    assert densities == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "on a plain background a red panda moves up slowly"], "'panda'; use circle"),
        (["--models", "nowhere"], "nowhere has no demo model"),
        (["--height", 500], "height 500 is not a multiple of 16; use 496 or 512"),
        (["--target", 1.0], "target 1.0 is outside [0, 1)"),
        (["--target", 0.9, "--base", 0.5], "base 0.5 is not between target 0.9 and 1"),
        (["--out", __file__], "choose another folder"),
    ],
)
def test_an_impossible_demo_is_refused_before_any_work(tmp_path, arguments, message):
    result = run("demo", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_demo_that_fails_leaves_no_file(tmp_path, monkeypatch):
    from lightforcing.cli import demo

    class FullDisk(demo.StreamingDecoder):
        def decode(self, *arguments, **options):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "StreamingDecoder", FullDisk)
    out = tmp_path / "out"
    result = run("demo", "--out", out, "--height", 32, "--width", 32, "--chunks", 1)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert os.listdir(out) == []


def test_inspect_describes_a_checkpoint(tmp_path):
    path = tmp_path / "self_forcing_dmd.safetensors"
    save_file(random_state_dict(dim=128, layers=1), path)
    result = run("inspect", path)
    assert result.exit_code == 0, result.stderr
    for words in ("Self Forcing", "dim 128", "1 layers", "KV cache", "needs about", "8-bit KV cache"):
        assert words in result.output


def test_inspect_of_something_else_is_one_line_on_stderr(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("these are not weights")
    result = run("inspect", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(path) in result.stderr


def test_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("lightforcing 0.")
