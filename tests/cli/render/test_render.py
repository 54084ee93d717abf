"""`lightforcing render` in one process and in several: each video once, whole, and from where a try ended."""

import os
import signal

import fsspec
import pytest
import torch

from lightforcing.cli.queue.prompt import UsageError
from lightforcing.cli.render.batch import Model, claim
from lightforcing.cli.render.jobs import RenderJob, read_jobs
from lightforcing.cli.render.renderer import Renderer
from lightforcing.cli.render.store import Store
from lightforcing.lightforcing_core.files.video import VideoWriter
from lightforcing.lightforcing_core.rollout.text_embeds import save_embeds

from ...support.render_command import CAPTION, finished, processes_of, prompts, started
from ...support.tiny_demo import write_tiny_demo


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(str(write_tiny_demo(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def renderer(model):
    return Renderer(model, torch.device("cpu"))


@pytest.fixture
def written(monkeypatch):
    """The frames that were encoded."""
    frames = []
    plain = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, some: (frames.append(some), plain(self, some))[1])
    return frames


def test_an_interrupted_video_is_continued_frame_by_frame(renderer, tmp_path, written):
    job, whole, broken = (
        RenderJob("a", CAPTION, seed=3),
        Store(str(tmp_path / "whole")),
        Store(str(tmp_path / "broken")),
    )
    assert renderer.render(job, whole)["made"] == 3
    expected = torch.cat(written)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renderer.render(job, broken, interrupt)
    assert sorted(os.listdir(tmp_path / "broken")) == [".a.state.safetensors"]
    written.clear()
    assert {"made": 1, "found": 2}.items() <= renderer.render(job, broken).items()
    assert torch.equal(torch.cat(written), expected)
    assert os.listdir(tmp_path / "broken") == ["a.mp4"]
    assert renderer.render(job, broken)["made"] == 0


def test_what_another_run_left_is_not_continued(renderer, tmp_path):
    store = Store(str(tmp_path))
    (tmp_path / ".a.state.safetensors").write_bytes(b"damaged")
    assert renderer.render(RenderJob("a", CAPTION), store)["found"] == 0


def test_a_video_that_ends_its_process_again_and_again_fails_alone(renderer, tmp_path):
    store = Store(str(tmp_path))
    store.write(".a.tries", b"3")
    assert "3 processes ended" in renderer.attempt(RenderJob("a", CAPTION), store)["error"]
    assert renderer.attempt(RenderJob("a", CAPTION), store)["made"] == 3  # the next command tries anew


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"text": "a cat"}, "word 1 of the caption"),
        ({"embeds": "missing"}, "No such file"),
        ({"text": CAPTION, "target": 1.5}, "1.5"),
        ({"text": CAPTION, "timeline": ({"text": CAPTION, "start_chunk": 1, "switch": "slow"},)}, "slow"),
    ],
)
def test_a_video_that_the_model_cannot_make_is_an_error_of_its_own(renderer, tmp_path, job, message):
    assert message in renderer.attempt(RenderJob("a", **job), Store(str(tmp_path)))["error"]
    assert os.listdir(tmp_path) == []


def test_every_value_of_a_line_reaches_the_recipe(renderer, tmp_path):
    embeds = torch.randn(1, 7, 32)
    save_embeds(tmp_path / "scene.safetensors", [[embeds, {}]])
    change = {"text": CAPTION, "start_chunk": 1, "switch": "soft"}
    line = {"embeds": "scene.safetensors", "seed": 5, "height": 48, "width": 32, "length": 21, "target": 0}
    (job,) = read_jobs(prompts(tmp_path, line | {"timeline": [change]}), None)
    recipe = renderer.recipe(job)
    assert (recipe.latent_shape, recipe.seed, recipe.growth) == ((1, 16, 6, 6, 4), 5, None)
    assert torch.equal(recipe.prompts[0].context, embeds.to(recipe.prompts[0].context))
    assert (recipe.prompts[1].start_chunk, recipe.prompts[1].switch) == (1, "soft")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x", "embeds": "y"}, "give text or embeds"),
        ({"seed": 1}, "give text or embeds"),
        ({"text": "x", "length": 20}, "20 is not 1 \\+ 4·k"),
        ({"text": "x", "width": 33}, "33"),
        ({"text": "x", "seed": True}, "'seed' may not be True"),
        ({"text": "x", "steps": 4}, "'steps' may not be 4; known are"),
        ({"text": "x", "timeline": ["y"]}, "'y' is not an object"),
        ({"text": "x", "timeline": [{"text": "y"}] * 1001}, "1001 prompts"),
        ({"text": "x", "name": "../x"}, "cannot be a folder's name"),
    ],
)
def test_a_bad_line_is_refused_before_anything_runs(tmp_path, line, message):
    with pytest.raises(UsageError, match=message):
        read_jobs(prompts(tmp_path, line), None)


def test_a_folder_takes_one_batch(tmp_path, model):
    jobs = [RenderJob("a", CAPTION), RenderJob("b", CAPTION, seed=1)]
    claim(jobs, model, str(tmp_path))
    claim(jobs[1:], model, str(tmp_path))
    for other, by in (([RenderJob("a", CAPTION, seed=2)], model), (jobs, Model())):
        with pytest.raises(UsageError, match="holds a of another batch"):
            claim(other, by, str(tmp_path))


def test_videos_go_wherever_fsspec_reaches(renderer):
    store = Store("memory://videos")
    renderer.render(RenderJob("a", CAPTION), store)
    assert [file.rpartition("/")[2] for file in fsspec.filesystem("memory").ls("/videos", detail=False)] == ["a.mp4"]
    with pytest.raises(UsageError, match="nowhere"):
        Store("nowhere://videos")


def test_a_checkpoint_renders_embeds(tmp_path, model):
    files = sorted(str(path) for path in tmp_path.parent.glob("tiny*/*/*.safetensors"))
    dit, vae = (next(file for file in files if part in file) for part in ("diffusion_models", "/vae/"))
    save_embeds(tmp_path / "scene.safetensors", [[torch.randn(1, 7, 32), {}]])
    line = {"embeds": "scene.safetensors", "height": 32, "width": 48, "length": 9}
    command = [prompts(tmp_path, line), "--out", tmp_path / "out", "--model", dit, "--vae", vae]
    code, events, error = finished(command)
    assert (code, error) == (0, "")
    assert [event["event"] for event in events] == ["batch", "progress", "finished", "summary"]


def test_ranks_render_together_and_continue_after_a_kill(tmp_path):
    line = {"text": CAPTION, "length": 45}
    command = [prompts(tmp_path, line), "--out", tmp_path / "out", "--gpus-per-video", "2"]
    with started(command) as (process, events):
        next(event for event in events if event["event"] == "progress" and event["value"] == 2)
        _, second = processes_of(process.pid, "spawn_main")
        os.kill(second, signal.SIGKILL)
        ends = [event for event in events if event["event"] != "progress"]
        assert process.wait(60) == 0
    assert [event["event"] for event in ends] == ["batch", "finished", "summary"]
    assert 2 <= ends[1]["found"] <= 3
    assert ends[1]["made"] + ends[1]["found"] == 4


def test_what_no_restart_mends_is_said_at_once(tmp_path):
    command = [prompts(tmp_path, {"text": CAPTION}), "--out", tmp_path / "out", "--gpus-per-video", "2"]
    (tmp_path / "empty").mkdir()
    code, _, error = finished([*command, "--model", tmp_path / "empty"])
    assert code == 1
    assert "has no demo model" in error
    command = [prompts(tmp_path, {"text": "a cat"}), "--out", tmp_path / "other", "--gpus-per-video", "2"]
    code, events, _ = finished(command)
    assert code == 1
    (failed,) = (event for event in events if event["event"] == "failed")
    assert failed["message"] == "word 1 of the caption is 'a'; use on"
