"""The whole training chain at its tiniest: what it writes loads, and an interrupted run equals an uninterrupted one."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from laboratory.training.__main__ import run
from laboratory.training.evaluate import evaluation_scenes
from laboratory.training.export import export
from laboratory.training.recipe import PRESETS
from laboratory.training.shapes import draw_clip
from laboratory.training.stage import Paused, Stage, step_generator
from laboratory.training.train_ar import CACHES, TRAIN_SEED_OFFSET, Batches, new_model, thing_weights
from laboratory.training.train_vae import crops, new_vae
from laboratory.training.whole_clip import decode_clip, encode_clip, teacher_forced
from lightforcing.lightforcing_core.checkpoint.load import load_dit_state_dict
from lightforcing.lightforcing_core.demo.captions import PASSING, SLOTS, VOCABULARY, caption_of, new_table
from lightforcing.lightforcing_core.demo.model import DIT, TEXT, VAE, load_demo_model
from lightforcing.lightforcing_core.model.wan import wan_from_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import vae_from_state_dict

ROOT = Path(__file__).parents[2]
TINY = PRESETS["tiny"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, run(TINY, folder, device=CPU)


def rows(folder, stage):
    keep = ("seconds",)
    lines = (folder / f"{stage}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in keep} for line in lines]


def test_chain_writes_models_that_the_pack_loads(uninterrupted):
    folder, counts = uninterrupted
    state_dict, info = load_dit_state_dict(folder / "models" / DIT)
    assert info.causal_metadata
    assert wan_from_state_dict(state_dict).dim == TINY.dim
    assert vae_from_state_dict(load_file(folder / "models" / VAE)).dim == TINY.vae_dim
    with safe_open(folder / "models" / TEXT, "pt") as file:
        assert json.loads(file.metadata()["vocabulary"]) == list(VOCABULARY)
        assert file.get_tensor("words").shape == (len(VOCABULARY), TINY.text_dim)
    with safe_open(folder / "models" / DIT, "pt") as file:
        transformer = json.loads(file.metadata()["config"])["transformer"]
        assert transformer == {"causal_ar": True, "text_dim": TINY.text_dim}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    kinds = {"dense first", "sparse first", "dense second", "sparse second"}
    assert set(counts) == kinds
    verdicts = json.loads((folder / "models" / "evaluation.json").read_text())
    assert {kind: len(verdicts[kind]["captions"]) for kind in kinds} == dict.fromkeys(kinds, 1)
    assert load_demo_model(folder / "models").video.level == "pillar"
    assert (folder / "curves.png").stat().st_size > 1000


def test_steps_change_the_weights(uninterrupted):
    folder, _ = uninterrupted
    assert len(rows(folder, "vae")) == TINY.vae_steps
    trained = torch.load(folder / "vae.pt", weights_only=True)["module"]
    fresh = new_vae(TINY.vae_dim, TINY.seed).state_dict()
    assert all(not torch.equal(trained[name], fresh[name]) for name in fresh if name.endswith("weight"))
    stages = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("ar", "second", "few")}
    name = "blocks.0.ffn.0.weight"
    for before, after in (("ar", "second"), ("second", "few")):
        assert not torch.equal(stages[after]["module"][name], stages[before]["ema"][name])
        torch.testing.assert_close(stages[after]["module"][name], stages[before]["ema"][name], rtol=0, atol=0.02)


def test_without_a_last_stage_the_autoregressive_model_itself_is_shipped(tmp_path):
    run(replace(TINY, second=None, few_steps=0), tmp_path, device=CPU, last="few")
    assert not (tmp_path / "few.pt").exists()
    assert not (tmp_path / "second.pt").exists()
    shipped, _ = load_dit_state_dict(tmp_path / "models" / DIT)
    averaged = torch.load(tmp_path / "ar.pt", weights_only=True)["ema"]
    name = "blocks.0.ffn.0.weight"
    torch.testing.assert_close(shipped[name], averaged[name].bfloat16())


def test_exported_models_stand_for_the_stages_before_the_second_lesson(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    recipe = replace(TINY, few_steps=0)
    run(recipe, tmp_path, device=CPU, last="few", start=folder / "models")
    assert not any((tmp_path / name).exists() for name in ("vae.pt", "ar.pt", CACHES["ar"]))
    before, after = (load_file(path / "models" / DIT) for path in (folder, tmp_path))
    name = "blocks.0.ffn.0.weight"
    assert 0 < (after[name].float() - before[name].float()).abs().max() < 0.02
    known, kept = (load_file(path / "models" / VAE) for path in (folder, tmp_path))
    assert all(torch.equal(known[key], kept[key]) for key in known)


def test_crops_hold_the_middle_of_a_thing():
    recipe = replace(TINY, first=replace(TINY.first, level="full"), vae_batch=4, vae_frames=5)
    pictures, videos = crops(recipe, 5, CPU, 1), crops(recipe, 5, CPU, 5)
    assert pictures.shape == (10, 3, 1, 32, 32)
    assert videos.shape == (4, 3, 5, 32, 32)
    for cut in (pictures, videos[:, :, 2:3]):
        saturation = cut.amax(1) - cut.amin(1)
        assert (saturation.flatten(1).amax(1) > 0.4).all()  # a background is nearly grey


def test_an_untrained_vae_is_blind_to_the_past():
    vae = new_vae(2, 0)
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = encode_clip(vae, video)[0]
        for place in range(3):
            picture = encode_clip(vae, video[:, :, 4 * place : 4 * place + 1])[0]
            torch.testing.assert_close(latents[:, :, place : place + 1], picture)
        shown = decode_clip(vae, latents)
    assert latents.std() > 0.1
    torch.testing.assert_close(shown[:, :, 1:5], shown[:, :, 4:5].expand(-1, -1, 4, -1, -1))
    assert (shown[:, :, 4] - shown[:, :, 8]).abs().max() > 0.01


def test_batches_of_one_chunk_come_from_the_openings(uninterrupted):
    folder, _ = uninterrupted
    cache = load_file(folder / CACHES["ar"])
    assert cache["openings"].shape == (3, 16, 3, 4, 6)
    batches = Batches(TINY, cache, new_table(TINY.text_dim, 0), CPU, "ar")
    whole, context, _ = batches.draw(0, 3, 2)
    assert (whole.shape, context.shape) == ((3, 16, 6, 4, 6), (3, SLOTS, TINY.text_dim))
    openings, _, _ = batches.draw(0, 6, 1)
    assert openings.shape == (6, 16, 3, 4, 6)
    known = cache["openings"].float()
    assert all((clip == known).flatten(1).all(1).any() for clip in openings)


def test_things_count_more_than_backgrounds():
    x0 = torch.zeros(2, 16, 3, 6, 9) + torch.arange(3).view(3, 1, 1)  # a level of its own for every frame
    x0[:, :, :, 2:4, 3:5] += 5
    weights = thing_weights(x0, 1.0)
    assert weights.shape == (2, 1, 3, 6, 9)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[:, :, :, 2:4, 3:5], torch.full((2, 1, 3, 2, 2), (1 + 54 / 4) / 2))
    torch.testing.assert_close(weights[:, :, :, 0], torch.full((2, 1, 3, 9), 0.5))
    assert (thing_weights(x0, 0.0) == 1).all()


def test_first_chunk_alone_costs_and_gives_what_it_does_in_a_longer_clip():
    model = new_model(TINY)
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    noisy, clean = torch.randn(2, 1, 16, 6, 4, 6)
    context, steps = torch.randn(1, 4, TINY.text_dim), torch.full((1, 6), 700.0)
    both = teacher_forced(model, noisy, clean, steps, context, frames_per_chunk=3)
    alone = teacher_forced(model, noisy[:, :, :3], clean[:, :, :3], steps[:, :3], context, frames_per_chunk=3)
    torch.testing.assert_close(alone, both[:, :, :3])


def test_interrupted_run_equals_the_uninterrupted_one(uninterrupted, tmp_path):
    whole, _ = uninterrupted
    # Before a first checkpoint, between two, in the stages that go on from another.
    stops = {("vae", 1), ("ar", 3), ("second", 1), ("few", 1)}

    def stop(stage, step, values):
        if (stage, step) in stops:
            stops.remove((stage, step))
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(TINY, tmp_path, device=CPU, last="few", on_step=stop)
    run(TINY, tmp_path, device=CPU, last="few", on_step=stop)
    assert not stops
    for stage in ("vae", "ar", "second", "few"):
        assert rows(tmp_path, stage) == rows(whole, stage)
    for name in (DIT, VAE, TEXT):
        mine, theirs = (load_file(folder / "models" / name) for folder in (tmp_path, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_folder_of_another_recipe_is_refused(uninterrupted):
    folder, _ = uninterrupted
    with pytest.raises(ValueError, match="another recipe"):
        run(replace(TINY, seed=1), folder, device=CPU)


def test_run_pauses_at_its_deadline_and_keeps_the_step(tmp_path):
    def stage():
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        deadline = time.monotonic() if not (tmp_path / "x.pt").exists() else None
        made = Stage(tmp_path, "x", module, rate=0.1, steps=3, minutes=None, save_every=100, deadline=deadline)
        return made, lambda step: (module(torch.full((1, 2), step + 1.0)).square().sum(), {})

    first, loss = stage()
    with pytest.raises(Paused, match="x paused after step 1"):
        first.run(loss)
    second, loss = stage()
    assert second.step == 1
    second.run(loss)
    assert [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_stage_ends_when_its_minutes_are_spent(tmp_path):
    module = torch.nn.Linear(2, 1)
    stage = Stage(tmp_path, "x", module, rate=0.1, steps=10**6, minutes=1e-6, save_every=100)
    stage.run(lambda step: (module(torch.ones(1, 2)).square().sum(), {}))
    assert stage.step == 1


def test_stage_refuses_a_loss_that_is_no_number(tmp_path):
    module = torch.nn.Linear(2, 1)
    stage = Stage(tmp_path, "x", module, rate=0.1, steps=3, minutes=None, save_every=100)
    with pytest.raises(RuntimeError, match="loss of step 0 is nan"):
        stage.run(lambda step: (module(torch.full((1, 2), torch.nan)).sum(), {}))
    assert not (tmp_path / "x.pt").exists()


def test_random_numbers_follow_from_seed_stage_and_step():
    draws = {
        torch.rand((), generator=step_generator(*key)).item()
        for key in ((0, "ar", 1), (0, "ar", 2), (0, "few", 1), (1, "ar", 1))
    }
    assert len(draws) == 4
    again = torch.rand((), generator=step_generator(0, "ar", 1)).item()
    assert again in draws


def test_export_refuses_more_than_the_repository_may_carry(tmp_path):
    recipe = replace(PRESETS["h200"], layers=12)
    table = new_table(recipe.text_dim, 0)
    with pytest.raises(ValueError, match="use fewer layers"):
        export(tmp_path, new_model(recipe), new_vae(recipe.vae_dim, 0), table, recipe.video)
    assert not list(tmp_path.iterdir())


def test_full_recipe_fits_the_limit(tmp_path):
    recipe = PRESETS["h200"]
    table = new_table(recipe.text_dim, 0)
    files = export(tmp_path, new_model(recipe), new_vae(recipe.vae_dim, 0), table, recipe.video)
    assert sum(file.stat().st_size for file in files) < 24_000_000
    model = load_demo_model(tmp_path)
    assert model.dit.dim == recipe.dim
    assert model.video == recipe.video


def test_evaluation_scenes_are_not_those_of_training():
    scenes = evaluation_scenes(replace(TINY, eval_captions=20))
    assert {name: len({caption_of(scene) for scene in found}) for name, found in scenes.items()} == {
        "first": 20,
        "second": 20,
    }
    trained_on = [draw_clip(TINY.seed + TRAIN_SEED_OFFSET, index, level="pillar").scene for index in range(20)]
    assert scenes["second"] != trained_on
    assert {(thing.direction, thing.speed) for scene in scenes["second"] for thing in scene.things} <= set(PASSING)


def test_bfloat16_autocast_stays_near_float32():
    """What a GPU computes in; the CPU has the same casts."""
    recipe = replace(TINY, layers=2)
    model = new_model(recipe)
    torch.nn.init.normal_(model.head.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    noisy, clean = torch.randn(2, 1, 16, 6, 4, 6, generator=generator)
    context = torch.randn(1, SLOTS, recipe.text_dim, generator=generator)
    arguments = (noisy, clean, torch.full((1, 6), 700.0), context)
    exact = teacher_forced(model, *arguments, frames_per_chunk=3)
    vae = new_vae(4, 0)
    video = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
    decoded = decode_clip(vae, encode_clip(vae, video)[0])
    with torch.autocast("cpu", torch.bfloat16):
        rough = teacher_forced(model, *arguments, frames_per_chunk=3)
        rough_decoded = decode_clip(vae, encode_clip(vae, video)[0])
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    assert (rough_decoded.float() - decoded).norm() < 0.1 * decoded.norm()
    rough.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_command_pauses_with_its_own_exit_status(tmp_path):
    command = [sys.executable, "-m", "laboratory.training", "vae", "--preset", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "run", "--pause-after", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "vae_images paused after step 1" in done.stdout
    assert (tmp_path / "run" / "vae_images.pt").exists()
