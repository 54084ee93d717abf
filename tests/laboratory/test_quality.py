"""The quality measurements: arms that cost the same, measures with known answers, resumed runs, recorded claims."""

import json
import lzma
import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from laboratory.quality import __main__ as command
from laboratory.quality.arms import OWN_DENSITY, all_arms, growth_of, halves
from laboratory.quality.bench import QualityBench, run_quality
from laboratory.quality.claims import paired, summary
from laboratory.quality.measures import against_caption, over_time, psnr, structural_similarity
from laboratory.quality.pages import markdown
from laboratory.quality.rows import read_rows
from laboratory.quality.scenes import prompt_scenes
from lightforcing.benchmarks.settings import Machine
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies import View
from lightforcing.lightforcing_core.demo import captions
from lightforcing.lightforcing_core.demo import model as demo_model
from lightforcing.lightforcing_core.demo.captions import caption_of, parse
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.schedule import Schedule

from ..support.rollouts import roll
from ..support.tiny_demo import TINY_VIDEO, write_tiny_demo

RESULTS = Path(command.__file__).parents[1] / "results"

SHORT = Schedule(21)
ATTENTION = AttentionOptions("reference", (16, 16))
RED = (0.86, 0.13, 0.13)
PLAIN = "on a plain background"
SIZES = {"frames_per_chunk": 3, "sigmas": few_step_sigmas()}


def kept_blocks(schedule, growth, attention, per_frame=6):
    """Key blocks that each chunk's query blocks keep, and how many there are."""
    lengths, layout = schedule.chunk_lengths(), FrameBlocks(per_frame * 16, 16)
    ends = accumulate(lengths)
    views = [View(range(end), frames, layout, layout, 1, 1) for frames, end in zip(lengths, ends, strict=True)]
    plans = [attention.rule.plan(*one, attention.budget) for one in zip(views, growth, strict=True)]
    return [(plan.kept, view.k_blocks) for plan, view in zip(plans, views, strict=True)]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.88, 0.97])
def test_growing_uniform_and_one_stage_sparsity_skip_the_same(sparsity):
    arms, weights = all_arms(SHORT, None, [sparsity], ATTENTION), np.cumsum(SHORT.chunk_lengths())
    published, uniform, one_stage = (arms[f"{name} {sparsity}"] for name in ("published", "uniform", "one-stage"))
    assert published.growth[0] == uniform.growth[0] == 0.0
    assert published.growth != uniform.growth
    np.testing.assert_allclose(np.dot(weights, published.growth), np.dot(weights, uniform.growth))
    hsa, flat = (kept_blocks(SHORT, arm.growth, arm.attention) for arm in (published, one_stage))
    assert one_stage.attention.policy == "topk"
    assert hsa == flat


@pytest.mark.parametrize("lengths", [[3] * 7, [3] * 3, [1] + [3] * 5, [3] * 6 + [1]])
def test_halves_skip_the_same_in_other_chunks(lengths):
    early, late = halves(lengths, 0.8)
    costs = np.multiply(lengths, np.cumsum(lengths))
    np.testing.assert_allclose(np.dot(costs, early), np.dot(costs, late))
    first_late = next(i for i, s in enumerate(late) if s)
    assert early[0] == late[0] == 0.0
    assert all(early[1:first_late]) and not any(early[first_late:]) and all(late[first_late:])  # noqa: PT018
    assert max(*early, *late) == pytest.approx(0.8)


def square_video(frames):
    """A red square that moves right over grey, 0.2 heights per second."""
    video = torch.full((frames, 64, 96, 3), 0.5)
    for index, picture in enumerate(video):
        x = round(10 + 0.8 * index)
        picture[24:40, x : x + 16] = torch.tensor(RED)
    return video


def test_picture_measures_follow_their_formulas():
    generator = torch.Generator().manual_seed(0)
    video, other = torch.rand(2, 2, 48, 64, 3, generator=generator)
    assert psnr(video, video) == 100
    assert psnr(video + 0.1, video) == pytest.approx(20, abs=1e-4)
    assert structural_similarity(video, video) == (pytest.approx(1), pytest.approx(1))
    # Two flat pictures: contrast and structure are equal, luminance alone differs.
    dark, light = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert structural_similarity(dark, light) == (pytest.approx(luminance, rel=1e-4),) * 2
    assert max(structural_similarity(video, other)) < 0.2  # independent noise has no structure in common
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        structural_similarity(video[:, :8], video[:, :8])


def test_caption_measures_tell_a_kept_promise_from_a_broken_one():
    video, red = square_video(33), f"{PLAIN} a red square moves"
    kept = against_caption(video, parse(f"{red} right slowly"))
    assert {kept[name] for name in ("right", "colour", "shape", "direction", "speed", "identity")} == {1.0}
    assert (kept["copies"], len(kept["position_errors"])) == (0, 8)
    assert kept["position_error"] < 0.02
    wrong_way = against_caption(video, parse(f"{red} left slowly"))
    assert (wrong_way["right"], wrong_way["colour"], wrong_way["direction"]) == (0, 1, 0)
    assert wrong_way["position_errors"][-1] > 0.3
    half = against_caption(video, parse(f"{red} right slowly and a blue circle moves up slowly"))
    assert (half["right"], half["colour"], half["shape"]) == (0, 0.5, 0.5)
    assert half["position_error"] == pytest.approx(kept["position_error"])
    late = [over_time(video, parse(f"{red} right {pace}"), [3, 3, 3])["motion_late"] for pace in ("slowly", "quickly")]
    assert late == pytest.approx([1, 0.5], rel=0.1)
    frozen = over_time(video[:1].expand_as(video), parse(f"{red} right slowly"), [3, 3, 3])
    assert (frozen["shape_late"], frozen["motion_late"]) == (1, 0)
    absent = against_caption(video, parse(f"{PLAIN} a blue square moves right slowly"))
    assert over_time(video, parse(f"{PLAIN} a blue square moves right slowly"), [3, 3, 3])["motion_late"] == 0
    assert (absent["colour"], absent["strangers"], absent["position_error"]) == (0, 1, None)
    video[22:, 40:54, 78:92] = torch.tensor(RED)  # a second red thing
    copied = against_caption(video, parse(f"{red} right slowly"))
    assert (copied["right"], copied["copies"]) == (1, pytest.approx(11 / 33))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_demo(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bench(models):
    arms = ("dense", "published", "tail", "long [dfpr]*")
    sizes = {"keep": (3, 1, 1), "long_frames": 45, "window": (7, 1), "probes": 2, "batch": 2}
    return QualityBench(models, arms, seeds=(0, 1, 5), sparsities=(0.75,), machine=Machine("cpu"), **sizes)


def without_seconds(rows):
    return sorted(json.dumps({**row, "seconds": None}, sort_keys=True) for row in rows)


def test_interrupted_run_continues_where_it_was(bench, tmp_path):
    whole = run_quality(bench, tmp_path / "whole")
    kinds = {(row["kind"], row["arm"], row["seed"]) for row in whole}
    assert len(kinds) == len(whole) == 3 * 3 + 6 * 3 + 2 * 2  # videos, long ones, probes of two sparse arms
    made, left = [], []

    def stop(done, total):
        made.append((done, total))
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_quality(bench, tmp_path / "parts", stop)
    file = tmp_path / "parts" / "rows.jsonl"
    file.write_text(file.read_text() + '{"kind": "video", "arm": "tai')  # cut off in mid-line
    rows = run_quality(bench, tmp_path / "parts", lambda done, total: left.append((done, total)))
    assert without_seconds(rows) == without_seconds(whole)
    assert left[-1][0] == left[-1][1] == made[-1][1] - made[-1][0]
    file.with_suffix(".jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))
    file.unlink()
    assert run_quality(bench, tmp_path / "parts", lambda *_: pytest.fail("nothing was missing")) == rows
    with pytest.raises(ValueError, match="rows of another model or setting"):
        run_quality(replace(bench, keep=(4, 1, 1)), tmp_path / "parts")


def test_rows_hold_what_one_seed_alone_gives(bench, models, tmp_path):
    """Batches change nothing but rounding: the same errors as of plain rollouts with that seed's own noise."""
    bench = replace(bench, arms=("dense", "published", "fp8 linears"), probes=0)
    run_quality(replace(bench, seeds=(0,)), tmp_path)
    rows = run_quality(replace(bench, seeds=(0, 5)), tmp_path)  # of the batch, the second one is missing
    assert max(row["latent_error"] for row in rows if row["arm"] == "dense") < 1e-5
    model, scene = demo_model.load_demo_model(models), prompt_scenes("simple")[5]
    context = captions.context_of_caption(model.table, caption_of(scene))
    options = {"attention": AttentionOptions("reference", (16, 16), 3, 1, 1), "noise": seeded_noise(5)}

    def rolled(growth):
        chunks = roll(model.dit, context, latent_shape=(1, 16, 9, 4, 6), **SIZES, growth=growth, **options)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    dense, sparse = rolled(None), rolled(growth_of(Schedule(9), 0.75))
    (row,) = [row for row in rows if (row["kind"], row["arm"], row["seed"]) == ("video", "published 0.75", 5)]
    assert row["caption"] == caption_of(scene)
    assert row["latent_error"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)
    assert row["latent_errors"][0] == pytest.approx(0, abs=1e-5)
    (fp8,) = [each for each in rows if (each["arm"], each["seed"]) == ("fp8 linears 0.75", 5)]
    assert 0.001 < fp8["latent_errors"][0] < 0.1
    pairs, kept = (3 * 3, 3 * 6, 3 * 9), row["densities"]
    assert kept[0] == 1
    assert row["flops"] == pytest.approx(np.dot(pairs, kept) / sum(pairs), rel=1e-3)


def test_probe_finds_the_error_of_each_layer_in_the_chunks_that_skip(bench, tmp_path):
    arms = ("dense kv *", "published", "tail", "tiles", "lse", "early", "late")
    rows = run_quality(replace(bench, arms=arms, seeds=(0,), probes=1), tmp_path)
    errors = {row["arm"]: np.array(row["errors"]) for row in rows if row["kind"] == "attention"}
    assert {found.shape for found in errors.values()} == {(3, 2)}  # chunks, layers
    published = errors["published 0.75"]
    assert (published[0] < 1e-5).all()  # the first chunk is dense
    assert (published[1:] > 0.05).all()
    assert (errors["tail 0.75"][1:] < published[1:]).all()
    assert (errors["early 0.75"][2] < 1e-5).all()
    assert (errors["late 0.75"][1] < 1e-5).all()
    assert (errors["late 0.75"][2] > 0.05).all()
    # A frame this small is one block, however its tokens are ordered.
    np.testing.assert_allclose(errors["tiles 0.75"], published, rtol=2e-3, atol=1e-5)
    for dtype, most in (("int8", 0.02), ("fp8", 0.06)):
        assert (errors[f"dense kv {dtype}"] > 1e-4).all()
        assert (errors[f"dense kv {dtype}"] < most).all()


def test_policies_of_their_own_density_have_a_peer_that_reads_as_much(bench, tmp_path):
    bench = replace(bench, arms=("published as *", "mass", "published"), seeds=(0, 1), probes=1)
    rows = run_quality(bench, tmp_path)
    videos = {(row["arm"], row["seed"]): row for row in rows if row["kind"] == "video"}
    for name in OWN_DENSITY:
        own, peer = (np.array(videos[arm, 1]["densities"]) for arm in (name, f"published as {name}"))
        assert own[0] == 1.0
        assert own[2] < 1.0
        assert (abs(own - peer) <= 0.5 / np.array([3, 6, 9])).all(), name  # a frame this small is one block
    assert videos["mass 0.75", 0]["densities"] == videos["published 0.75", 0]["densities"]
    probed = {row["arm"] for row in rows if row["kind"] == "attention"}
    assert {arm for arm, _ in videos} - probed == {"forcing_kv", "dummy_forcing"}


def test_intervals_cover_the_mean_as_often_as_they_say_and_effects_are_in_deviations():
    dice = np.random.default_rng(1)
    found = [paired(dice.normal(0.3, 1.0, 32)) for _ in range(120)]
    inside = sum(each.low <= 0.3 <= each.high for each in found)
    assert 0.88 * 120 <= inside <= 0.99 * 120
    four = paired([1.0, 2.0, 3.0, 2.0])
    assert (four.mean, four.worse_in, four.effect) == (2, 1, pytest.approx(2 / math.sqrt(2 / 3)))
    assert paired([1.0, 1.0]).effect is None


@pytest.mark.parametrize("name", ["quality", "quality-pillar", "policies", "policies-60s", "roles-60s"])
def test_recorded_rows_give_the_recorded_tables(name):
    settings, rows = read_rows(RESULTS / name)
    assert settings["keep"] == [6, 1, 2]
    assert markdown(summary(rows)) == (RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert len(rows) == json.loads((RESULTS / name / "quality.json").read_text())["rows"]
    assert sum(file.stat().st_size for file in RESULTS.rglob("rows*")) < 300_000


def run(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_command_writes_rows_table_and_plots(models, tmp_path):
    small = ["--seeds", "0-1,4", "--sparsities", "0.75", "--keep", "3,1,1", "--long-frames", 45, "--window", "7,1"]
    arms = ["--arms", "dense,published,early,late", "--arms", "long *", "--probes", 1, "--device", "cpu"]
    done = run("run", "--models", models, "--out", tmp_path, *small, *arms)
    assert done.exit_code == 0, done.output
    assert "early / late" in done.output
    record = json.loads((tmp_path / "quality.json").read_text())
    assert (record["bench"], record["video"]["height"]) == ("quality", TINY_VIDEO.height)
    assert len(read_rows(tmp_path)[1]) == record["rows"]
    pages = {"table.md", "sparsity.png", "chunks.png", "layers.png", "drift.png", "claims.png"}
    texts = {name: (tmp_path / name).read_bytes() for name in pages}
    assert b"## Sparsifying early chunks hurts more than late ones" in texts["table.md"]
    [(tmp_path / name).unlink() for name in pages]
    assert run("pages", tmp_path).exit_code == 0
    assert (tmp_path / "table.md").read_bytes() == texts["table.md"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in pages - {"table.md"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nowhere"], "nowhere has no demo model"),
        (["--seeds", "3-x"], "seeds '3-x' is not a list of numbers"),
        (["--arms", "magic"], "no arm is called 'magic'"),
    ],
)
def test_impossible_requests_are_one_line_on_stderr(models, tmp_path, arguments, message):
    done = run("run", "--out", tmp_path / "out", "--device", "cpu", "--models", models, *arguments)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
