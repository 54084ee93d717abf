"""A run that is kept on disk: killed and resumed it gives the same video, and a state that does not fit is refused."""

import shutil
import time

import pytest

from ..support.graphs import empty, graph, latents_of, link, load_state, loader, lora, save_state, schedule

LENGTH = 93  # 24 latent frames: 8 chunks


def long_run(state=None, **sampler):
    nodes = {"model": loader(), "plan": schedule(LENGTH, window=9, sink_frames=1, sink_rope="follow")}
    if state:
        nodes, sampler = {**nodes, "state": state}, {**sampler, "state": link("state")}
    return graph(nodes, latent=empty(LENGTH), schedule=link("plan"), seed=11, **sampler)


@pytest.fixture(scope="module")
def folder(server):
    return server.output / "light_forcing"


@pytest.fixture(scope="module")
def killed(start_server, models, tmp_path_factory):
    """The state that a server leaves which is killed in the middle of a run."""
    base = tmp_path_factory.mktemp("doomed")
    (base / "models").symlink_to(models / "models", target_is_directory=True)
    with start_server(base, "pack") as doomed:
        doomed.queue(long_run(save_state("kept/run")))
        state, deadline = base / "output" / "light_forcing" / "kept" / "run_00001.safetensors", time.monotonic() + 60
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        doomed.kill()
    return state


def test_killed_and_resumed_equals_uninterrupted(server, killed, folder):
    expected = latents_of(server, long_run())
    (folder / "kept").mkdir(parents=True)
    shutil.copy(killed, folder / "kept")
    prompt = long_run(load_state("kept/run_00001.safetensors"))
    prompt["sampler"]["inputs"] |= {"seed": 5, "steps": 2}  # not read: the state decides
    before = killed.stat().st_size
    assert (latents_of(server, prompt) == expected).all()
    assert (folder / "kept" / "run_00001.safetensors").stat().st_size > before  # it went on in the same file
    assert (latents_of(server, prompt) == expected).all()  # nothing is left to make


@pytest.fixture(scope="module")
def stored(server, folder):
    server.run({**graph({"model": loader()}, state=link("state")), "state": save_state("stored")})
    return load_state("stored_00001.safetensors")


def test_state_of_another_model_is_refused(server, stored):
    other = loader(model_name="self_forcing_dmd.pt", weights="plain")
    message = server.error_of({**graph({"model": other}, state=link("state")), "state": stored})
    assert "made by the model Wan 2.1, 256 wide, 2 layers, weights" in message
    assert "load the former" in message


@pytest.mark.parametrize(("latent", "parts"), [(empty(17), ["21 frames", "17"]), (empty(width=64), ["96×64", "64×64"])])
def test_state_of_another_video_is_refused(server, stored, latent, parts):
    message = server.error_of({**graph({"model": loader()}, latent=latent, state=link("state")), "state": stored})
    assert all(part in message for part in parts), message


def test_stronger_lora_is_another_model(server):
    def model(strength):
        return {"unet": loader(), "model": lora(link("unet"), strength)}

    server.run({**graph(model(1.0), state=link("state")), "state": save_state("lora")})
    load = load_state("lora_00001.safetensors")
    assert "LoRA" in server.error_of({**graph(model(0.5), state=link("state")), "state": load})
    server.run({**graph(model(1.0), state=link("state")), "state": load})
