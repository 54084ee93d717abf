"""`python -m laboratory.quality`: arms that cost the same, measures with known answers, and runs that go on."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from laboratory.quality.__main__ import app
from laboratory.quality.arms import Arm, all_arms, as_dense_as_hsa, chosen, growth_of, halves
from laboratory.quality.bench import QualityBench, open_rows, prompt_scenes, run_quality
from laboratory.quality.claims import Table, claims, options, paired, summary
from laboratory.quality.measures import (
    against_caption,
    against_dense,
    over_time,
    psnr,
    structural_similarity,
)
from laboratory.quality.probe import AttentionProbe
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.attention.selection import SelectionPlan
from lightforcing.lightforcing_core.demo import model as demo_model
from lightforcing.lightforcing_core.demo.captions import (
    COLOURS,
    DIRECTIONS,
    PASSING,
    caption_of,
    context_of_caption,
    parse,
)
from lightforcing.lightforcing_core.rollout.rollout import few_step_sigmas, rollout, seeded_noise
from lightforcing.lightforcing_core.rollout.schedule import Schedule

from ..support.tiny_demo import TINY_VIDEO, write_tiny_demo

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT, LONG = Schedule(21), Schedule(61, window=12, sink_frames=1, sink_rope="follow")
ATTENTION = AttentionOptions("reference", (16, 16))


def kept_blocks(schedule, growth, attention, per_frame=6):
    """Key blocks that each chunk's query blocks keep, and how many there are."""
    end, found = 0, []
    for frames, sparsity in zip(schedule.chunk_lengths(), growth, strict=True):
        end += frames
        budget = {name: getattr(attention, name) for name in ("keep_frames", "sink_frames", "near_frames")}
        plan = SelectionPlan.build(range(end), frames, FrameBlocks(per_frame * 16, 16), sparsity=sparsity, **budget)
        found.append((plan.kept, end * per_frame))
    return found


# ---------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.88, 0.97])
def test_uniform_and_growing_sparsity_skip_the_same(sparsity):
    weights = np.cumsum(SHORT.chunk_lengths())
    growing, even = growth_of(SHORT, sparsity), growth_of(SHORT, sparsity, "constant")
    assert growing[0] == even[0] == 0.0
    assert growing != even
    np.testing.assert_allclose(np.dot(weights, growing), np.dot(weights, even))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.88])
def test_one_stage_keeps_as_many_blocks_as_hsa(sparsity):
    arms = all_arms(SHORT, None, [sparsity], ATTENTION)
    published, one_stage = arms[f"published {sparsity}"], arms[f"one-stage {sparsity}"]
    assert one_stage.attention.keep_frames > 10**6
    hsa, flat = (kept_blocks(SHORT, arm.growth, arm.attention) for arm in (published, one_stage))
    assert hsa == flat
    if sparsity == 0.3:  # HSA's frames hold less than the sparsity allows
        assert one_stage.growth != published.growth


def test_matching_leaves_sparsities_alone_that_frames_do_not_limit():
    growth = growth_of(SHORT, 0.88)
    assert as_dense_as_hsa(SHORT, growth, ATTENTION) == growth


@pytest.mark.parametrize("lengths", [[3] * 7, [3] * 3, [1] + [3] * 5, [3] * 6 + [1]])
def test_halves_skip_the_same_in_other_chunks(lengths):
    early, late = halves(lengths, 0.8)
    costs = np.multiply(lengths, np.cumsum(lengths))
    np.testing.assert_allclose(np.dot(costs, early), np.dot(costs, late))
    assert early[0] == late[0] == 0.0
    first_late = next(i for i, s in enumerate(late) if s)
    assert all(early[1:first_late])
    assert not any(early[first_late:])
    assert all(late[first_late:])
    assert max(*early, *late) == pytest.approx(0.8)


def test_two_chunks_have_no_halves():
    with pytest.raises(ValueError, match="use 3 or more"):
        halves([3, 3], 0.5)


def test_arms_are_chosen_by_name_or_pattern():
    arms = all_arms(SHORT, LONG, [0.5, 0.88], ATTENTION)
    assert list(chosen(arms, [])) == list(arms)
    assert list(chosen(arms, ["dense"])) == ["dense"]
    assert list(chosen(arms, ["tail", "long *"])) == [
        "long dense",
        "tail 0.5",
        "long published 0.5",
        "tail 0.88",
        "long published 0.88",
    ]
    assert arms["tail+lse 0.5"].attention == replace(ATTENTION, tail=True, estimator="lse")
    assert arms["kv int8 0.88"].kv.dtype == "int8"
    assert arms["fp8 linears 0.88"].fp8
    with pytest.raises(ValueError, match="no arm is called 'tial'"):
        chosen(arms, ["tial"])
    with pytest.raises(ValueError, match=r"sparsity 1\.0 is outside"):
        all_arms(SHORT, None, [1.0], ATTENTION)


def test_prompts_are_fixed_balanced_and_fit_the_level():
    simple, full = prompt_scenes("simple", 64), prompt_scenes("full", 64)
    assert caption_of(simple[0]) == "on a plain background a blue square moves down-right quickly"
    for scenes in (simple, full):
        assert all(parse(caption_of(scene)) == scene for scene in scenes)
    assert {(scene.background, len(scene.things)) for scene in simple} == {("plain", 1)}
    assert [len(scene.things) for scene in full[:4]] == [1, 2, 1, 2]
    passing = prompt_scenes("pillar", 60)
    ways = Counter((thing.direction, thing.speed) for scene in passing for thing in scene.things)
    assert ways == dict.fromkeys(PASSING, 10)
    for words, name in ((COLOURS, "colour"), (tuple(DIRECTIONS), "direction")):
        counts = [sum(getattr(scene.things[0], name) == word for scene in simple) for word in words]
        assert counts == [64 // len(words)] * len(words)


# ------------------------------------------------------------------------------------------------------ measures


def square_video(frames, left=10, colour=(0.86, 0.13, 0.13), speed=1.0):
    """A square that moves right over grey."""
    video = torch.full((frames, 64, 96, 3), 0.5)
    for index, picture in enumerate(video):
        x = round(left + speed * index)
        picture[24:40, x : x + 16] = torch.tensor(colour)
    return video


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 4, 4, 3)
    assert psnr(x, x) == 100
    assert psnr(x + 0.1, x) == pytest.approx(20, abs=1e-4)


def test_ssim_follows_its_formula_and_is_one_for_equal_videos():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 48, 64, 3, generator=generator)
    assert structural_similarity(video, video) == (pytest.approx(1), pytest.approx(1))
    # Two flat pictures: contrast and structure are equal, luminance alone differs.
    dark, light = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert structural_similarity(dark, light) == (pytest.approx(luminance, rel=1e-4),) * 2
    # Independent noise has no structure in common; a little of it leaves most.
    other = torch.rand(2, 48, 64, 3, generator=generator)
    assert structural_similarity(video, other)[0] < 0.1
    assert structural_similarity(video, other)[1] < 0.2
    little, more = (structural_similarity(video, torch.lerp(video, other, share)) for share in (0.1, 0.4))
    assert 1 > little[0] > more[0] > 0
    assert 1 > little[1] > more[1] > 0
    with pytest.raises(ValueError, match="smaller than SSIM's window"):
        structural_similarity(video[:, :8], video[:, :8])


def test_errors_against_dense_are_found_in_the_chunk_where_they_are():
    generator = torch.Generator().manual_seed(0)
    latents, video = torch.randn(16, 6, 4, 6, generator=generator), torch.rand(21, 32, 48, 3, generator=generator)
    spoiled, seen = latents.clone(), video.clone()
    spoiled[:, 3:] *= 1.5
    seen[9:] = (seen[9:] + 0.1).clamp(0, 1)
    found = against_dense(spoiled, seen, latents, video, [3, 3])
    assert found["latent_errors"] == [0, pytest.approx(0.5, rel=1e-5)]
    assert 0.2 < found["latent_error"] < 0.5
    assert found["psnrs"][0] == 100 > found["psnr"] > found["psnrs"][1] > 20


def test_caption_measures_tell_a_kept_promise_from_a_broken_one():
    video = square_video(33, speed=0.8)  # 0.2 heights per second
    kept = against_caption(video, parse("on a plain background a red square moves right slowly"))
    assert {kept[name] for name in ("right", "colour", "shape", "direction", "speed", "identity")} == {1.0}
    assert kept["position_error"] < 0.02
    assert max(kept["position_errors"]) < 0.03
    assert len(kept["position_errors"]) == 8
    wrong_way = against_caption(video, parse("on a plain background a red square moves left slowly"))
    assert (wrong_way["right"], wrong_way["colour"], wrong_way["direction"]) == (0, 1, 0)
    assert wrong_way["position_errors"][-1] > 0.3
    two = "on a plain background a red square moves right slowly and a blue circle moves up slowly"
    half = against_caption(video, parse(two))
    assert (half["right"], half["colour"], half["shape"]) == (0, 0.5, 0.5)
    assert half["position_error"] == pytest.approx(kept["position_error"])
    absent = against_caption(video, parse("on a plain background a blue square moves right slowly"))
    assert (absent["colour"], absent["strangers"], absent["position_error"]) == (0, 1, None)


def test_a_second_thing_of_the_same_colour_counts_as_a_copy():
    scene = parse("on a plain background a red square moves right slowly")
    video = square_video(33, speed=0.8)
    assert against_caption(video, scene)["copies"] == 0
    video[22:, 40:54, 78:92] = torch.tensor((0.86, 0.13, 0.13))
    spoiled = against_caption(video, scene)
    assert spoiled["copies"] == pytest.approx(11 / 33)
    assert spoiled["right"] == 1  # the promised one is there


def test_drift_grows_with_what_fades_and_not_with_motion():
    scene = parse("on a plain background a red square moves right slowly")
    lengths = [3, 3, 3, 3]
    steady = square_video(45, speed=0.8)
    fading = torch.lerp(steady, torch.full_like(steady, 0.5), torch.linspace(0, 1, 45).view(-1, 1, 1, 1))
    calm, fades = over_time(steady, scene, lengths), over_time(fading, scene, lengths)
    assert calm["drifts"][0] == 0
    assert calm["drift"] < 0.002 < fades["drift"]
    assert fades["drifts"] == sorted(fades["drifts"])
    assert (calm["colour_late"], calm["shape_late"]) == (1, 1)
    assert (fades["colour_late"], fades["shape_late"]) == (0, 0)


# ---------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_tiny_demo(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bench(models):
    arms = ("dense", "published", "tail", "long *")
    return QualityBench(
        models,
        seeds=(0, 1, 5),
        sparsities=(0.75,),
        arms=arms,
        keep=(3, 1, 1),
        long_frames=45,
        window=(7, 1),
        probe_seeds=2,
        batch=2,
    )


def without_seconds(rows):
    return sorted(
        json.dumps({key: value for key, value in row.items() if key != "seconds"}, sort_keys=True) for row in rows
    )


def test_interrupted_run_goes_on_where_it_was(bench, tmp_path):
    whole = run_quality(bench, tmp_path / "whole")
    kinds = [(row["kind"], row["arm"], row["seed"]) for row in whole]
    assert len(set(kinds)) == len(kinds) == 3 * 3 + 2 * 3 + 2 * 2  # videos, long ones, probes of two sparse arms
    made = []

    def stop(done, total):
        made.append((done, total))
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_quality(bench, tmp_path / "parts", stop)
    file = tmp_path / "parts" / "rows.jsonl"
    file.write_text(file.read_text() + '{"kind": "video", "arm": "tai')  # cut off in mid-line
    left = []
    rows = run_quality(bench, tmp_path / "parts", lambda done, total: left.append((done, total)))
    assert without_seconds(rows) == without_seconds(whole)
    assert left[-1] == (left[-1][1],) * 2
    assert left[-1][1] + made[-1][0] == made[-1][1]
    assert run_quality(bench, tmp_path / "parts", lambda *_: pytest.fail("nothing was missing")) == rows


def test_rows_hold_what_one_seed_alone_gives(bench, models, tmp_path):
    """Batches change nothing but rounding: the same errors as of plain rollouts with that seed's own noise."""
    bench = replace(bench, arms=("dense", "published"), probe_seeds=0)
    run_quality(replace(bench, seeds=(0,)), tmp_path)
    rows = run_quality(replace(bench, seeds=(0, 5)), tmp_path)  # of the batch, the second one is missing
    assert max(row["latent_error"] for row in rows if row["arm"] == "dense") < 1e-5
    model = demo_model.load_demo_model(models)
    scene = prompt_scenes("simple")[5]
    context = context_of_caption(model.table, caption_of(scene))

    def rolled(growth):
        chunks = rollout(
            model.dit,
            context,
            latent_shape=(1, 16, 9, 4, 6),
            frames_per_chunk=3,
            sigmas=few_step_sigmas(),
            growth=growth,
            attention=AttentionOptions("reference", (16, 16), 3, 1, 1),
            noise=seeded_noise(5),
        )
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    dense, sparse = rolled(None), rolled(growth_of(Schedule(9), 0.75))
    (row,) = [row for row in rows if (row["kind"], row["arm"], row["seed"]) == ("video", "published 0.75", 5)]
    assert row["caption"] == caption_of(scene)
    assert row["latent_error"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)
    assert row["latent_errors"][0] == pytest.approx(0, abs=1e-5)
    pairs, kept = (3 * 3, 3 * 6, 3 * 9), row["densities"]
    assert kept[0] == 1
    assert row["flops"] == pytest.approx(np.dot(pairs, kept) / sum(pairs))


def test_probe_finds_the_error_of_each_layer_where_selection_skips(bench, tmp_path):
    arms = ("dense kv *", "published", "tail", "tiles", "lse", "early", "late")
    rows = run_quality(replace(bench, arms=arms, seeds=(0,), probe_seeds=1), tmp_path)
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
    np.testing.assert_allclose(errors["tiles 0.75"], published, rtol=1e-3, atol=1e-5)
    for dtype, most in (("int8", 0.02), ("fp8", 0.06)):
        assert (errors[f"dense kv {dtype}"] > 1e-4).all()
        assert (errors[f"dense kv {dtype}"] < most).all()


def test_probe_listens_at_the_last_step_alone(models):
    model, levels = demo_model.load_demo_model(models), few_step_sigmas()
    probe = AttentionProbe(model.dit, (2, 3), levels[-2], [Arm("published 0.5", (0.0, 0.5), ATTENTION)])
    heard = []

    def denoise(x, sigma, state):
        before = len(probe.errors["published 0.5"])
        x0 = probe.denoise(x, sigma, state)
        if len(probe.errors["published 0.5"]) > before:
            heard.append((sigma, state.clean))
        return x0

    sizes = {"latent_shape": (1, 16, 6, 4, 6), "frames_per_chunk": 3, "sigmas": levels}
    context = context_of_caption(model.table, demo_model.DEFAULT_CAPTION)
    list(rollout(model.dit, context, **sizes, denoise=denoise, dense_attention=probe.attention))
    assert heard == [(levels[-2], False)] * 2


def test_rows_of_another_model_are_not_mixed(bench, tmp_path):
    run_quality(replace(bench, seeds=(0,), arms=("dense",)), tmp_path)
    with pytest.raises(ValueError, match="rows of another model or setting"):
        run_quality(replace(bench, keep=(4, 1, 1)), tmp_path)
    assert len(open_rows(tmp_path, bench.header())) == 1


# -------------------------------------------------------------------------------------------------------- claims


def made_rows(values, kind="video", measure="latent_error"):
    """Rows of arms from {arm: [one value per seed]}."""
    return [
        {"kind": kind, "arm": arm, "seed": seed, "flops": 0.5, measure: value}
        for arm, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


def test_interval_covers_the_mean_as_often_as_it_says():
    dice = np.random.default_rng(1)
    found = [paired(dice.normal(0.3, 1.0, 32)) for _ in range(120)]
    inside = sum(each.low <= 0.3 <= each.high for each in found)
    assert 0.88 * 120 <= inside <= 0.99 * 120
    one = found[0]
    assert one == paired(np.random.default_rng(1).normal(0.3, 1.0, 32))
    assert one.low < one.mean < one.high


def test_effects_are_means_over_deviations():
    found = paired([1.0, 2.0, 3.0, 2.0])
    assert found.mean == 2
    assert found.effect == pytest.approx(2 / math.sqrt(2 / 3))
    assert found.worse_in == 1
    assert paired([1.0, 1.0]).effect is None


def test_claims_hold_are_contradicted_or_stay_open():
    dice = np.random.default_rng(2)
    base = dice.normal(1, 0.3, 16)
    rows = made_rows(
        {
            "early 0.5": base + 0.2,
            "late 0.5": base,  # paired, so that the spread of seeds does not hide it
            "published 0.5": base + 0.2 + dice.normal(0, 0.01, 16),
            "uniform 0.5": base,
            "one-stage 0.5": base + 0.2 + dice.normal(0, 0.01, 16),
        }
    )
    verdicts = {claim["worse"]: claim["verdict"] for claim in claims(Table(rows))}
    assert verdicts == {"early 0.5": "holds", "uniform 0.5": "contradicted", "one-stage 0.5": "undecided"}


def test_better_is_more_for_some_measures():
    rows = made_rows({"early 0.5": [20.0, 21, 22] * 4, "late 0.5": [30.0, 30, 30] * 4}, measure="psnr")
    (claim,) = claims(Table(rows))
    assert (claim["verdict"], claim["worse_in"]) == ("holds", 1)
    assert claim["mean"] == pytest.approx(9)


def test_few_seeds_decide_nothing():
    rows = made_rows({"early 0.5": [2.0] * 7, "late 0.5": [1.0] * 7})
    assert [claim["verdict"] for claim in claims(Table(rows))] == ["undecided"]


@pytest.mark.parametrize(("more", "verdict"), [(-0.01, "holds"), (0.004, "holds"), (0.05, "contradicted")])
def test_sparse_may_drift_a_tenth_further_than_dense(more, verdict):
    dice = np.random.default_rng(3)
    dense = dice.normal(0.1, 0.02, 16)
    sparse = dense + more + dice.normal(0, 0.001, 16)
    rows = made_rows({"long dense": dense, "long published 0.5": sparse}, "long", "drift")
    assert [claim["verdict"] for claim in claims(Table(rows))] == [verdict]


def test_options_are_compared_at_their_own_sparsity_over_shared_seeds():
    rows = made_rows(
        {"published 0.5": [1.0, 2, 3], "tail 0.5": [0.5, 1.5], "published 0.88": [9.0], "tiles 0.9": [1.0]}
    )
    (option,) = options(Table(rows))
    assert (option["says"], option["worse"], option["better"]) == ("tail", "tail 0.5", "published 0.5")
    assert (option["seeds"], option["mean"]) == (2, -0.5)


def test_command_writes_rows_table_and_plots(models, tmp_path):
    small = ["--seeds", "0-1,4", "--sparsities", "0.75", "--keep", "3,1,1", "--long-frames", "45", "--window", "7,1"]
    command = ["--models", str(models), "--out", str(tmp_path), *small, "--probes", "1"]
    done = CliRunner().invoke(app, [*command, "--arms", "dense,published,early,late,long *", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "quality.json").read_text())
    assert result["bench"] == "quality"
    assert result["video"]["height"] == TINY_VIDEO.height
    assert {claim["worse"] for claim in result["claims"]} >= {"early 0.75", "long published 0.75"}
    assert "early / late" in done.output
    page = (tmp_path / "table.md").read_text()
    assert "## Sparsifying early chunks hurts more than late ones" in page
    for name in ("sparsity.png", "chunks.png", "layers.png", "drift.png", "claims.png"):
        assert (tmp_path / name).stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert result["rows"] == len(rows)
    assert result["means"] == json.loads(json.dumps(summary(rows)["means"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nowhere"], "nowhere holds no demo model"),
        (["--seeds", "3-x"], "--seeds '3-x' is not a list of seeds"),
        (["--seeds", "1,1"], "each once"),
        (["--keep", "6,1"], "--keep '6,1' holds 2 numbers; give 3"),
        (["--sparsities", "many"], "--sparsities 'many' is not a list of numbers"),
        (["--arms", "magic"], "no arm is called 'magic'"),
        (["--batch", "0"], "batch 0 is not positive"),
        (["--long-frames", "80"], "length 80 is not 1 + 4·k"),
    ],
)
def test_impossible_requests_are_one_line_on_stderr(models, tmp_path, arguments, message):
    command = ["--out", str(tmp_path / "out"), "--device", "cpu", "--models", str(models)]
    done = CliRunner().invoke(app, [*command, *arguments])
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_shipped_model_the_command_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "SHIPPED", tmp_path / "none")
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 1
    assert "holds no demo model" in done.stderr
