"""Prompts and stops that a client sends while the video is made."""

import re
import time

import pytest

from lightforcing.lightforcing_core.rollout.state import load_run_state

from ...support.graphs import (
    change,
    demo_graph,
    empty,
    graph,
    latents_of,
    link,
    loader,
    node,
    save_state,
    saved_latents,
)

OTHER = "on a plain background a blue square moves left quickly"
CHUNKS, LATENT = 13, 39


def demo(seed, **inputs):
    return {**demo_graph(seed=seed, **inputs), "latent": empty(length=4 * LATENT - 3, width=48, height=32)}


def sent(server, prompt_id, **asked):
    """The answer, once the sampler runs."""
    for _ in range(400):
        answer = server.post(f"/light_forcing/live/{prompt_id}", asked)
        if answer.status_code != 404:
            return answer
        time.sleep(0.02)
    raise TimeoutError(server.log()[-2000:])


@pytest.mark.parametrize(("switch", "seed"), [("hard", 41), ("soft", 42), ("blend", 43), ("cut", 44)])
def test_live_prompt_changes_the_next_chunk_and_equals_a_timeline(server, switch, seed):
    prompt = demo(seed, state=link("state")) | {"state": save_state(f"live{seed}")}
    prompt_id = server.queue(prompt)
    answer = sent(server, prompt_id, prompt=OTHER, switch=switch, blend_chunks=2, jump=8)
    assert answer.status_code == 200, answer.text
    entry = server.wait(prompt_id)
    live = saved_latents(server, entry)
    (said,) = [note for note in entry["outputs"]["sampler"]["text"] if note.startswith("from chunk")]
    chunk, start = re.match(r"from chunk (\d+) on \(timeline: start ([\d.]+), ", said).groups()
    assert int(chunk) >= answer.json()["chunk"]
    assert said.endswith(f": {OTHER}")
    first = 3 * int(chunk)
    plain = latents_of(server, demo(seed))
    assert (live[:, :, :first] == plain[:, :, :first]).all()
    assert (live[:, :, first : first + 3] - plain[:, :, first : first + 3]).abs().max() > 1e-4

    planned = demo(seed, timeline=link("change")) | {"other": node("LightForcingDemoPrompt", caption=OTHER)}
    planned["change"] = change(float(start), switch, 2)
    planned["change"]["inputs"]["jump"] = 8
    assert (latents_of(server, planned) == live).all()
    (saved,) = (server.output / "light_forcing").glob(f"live{seed}_*")
    prompts = load_run_state(saved).recipe.prompts
    assert [(one.start_chunk, one.switch) for one in prompts[1:]] == [(int(chunk), switch)]
    assert "sampler" in server.executed(server.run(prompt))  # not answered from the cache


def test_stop_keeps_the_chunks_so_far(server):
    prompt_id = server.queue(demo(45))
    answer = sent(server, prompt_id, stop=True)
    entry = server.wait(prompt_id)
    frames = saved_latents(server, entry).shape[2]
    assert frames == 3 * answer.json()["chunk"] < LATENT
    assert entry["outputs"]["sampler"]["text"][0].startswith(f"stopped after {frames // 3} of {CHUNKS} chunks")
    late = server.post(f"/light_forcing/live/{prompt_id}", {"stop": True})
    assert late.status_code == 404
    assert "has ended" in late.json()["error"]


def test_requests_that_cannot_be_met_say_why_and_a_wrong_caption_leaves_the_run_alone(server):
    prompt_id = server.queue(demo(46))
    assert sent(server, prompt_id, prompt="a cat").status_code == 200  # it is encoded before its chunk, in the run
    for asked, status, reason in (
        ({"prompt": "x" * 5000}, 409, "use 1 to 4000 characters"),
        ({"prompt": ""}, 409, "use 1 to 4000 characters"),
        ({"prompt": OTHER, "switch": "glide"}, 409, "'glide' is not known"),
        ({"prompt": OTHER, "jump": 2.5}, 400, "whole numbers"),
        ({"text": OTHER}, 409, "has ['text']; use"),
        ([], 400, "not a request"),
    ):
        answer = server.post(f"/light_forcing/live/{prompt_id}", asked)
        assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text
    entry = server.wait(prompt_id)
    (said,) = entry["outputs"]["sampler"]["text"]
    assert re.match(r"the prompt for chunk \d+ was not taken: word 1 of the caption is 'a'", said)
    assert (saved_latents(server, entry) == latents_of(server, demo(47) | {"sampler": demo(46)["sampler"]})).all()


def test_without_a_text_encoder_the_way_out_is_named(server):
    prompt_id = server.queue(graph({"model": loader()}, latent=empty(length=81), seed=48))
    answer = sent(server, prompt_id, prompt=OTHER)
    assert server.post(f"/light_forcing/live/{prompt_id}", {"stop": True}).status_code == 200
    assert answer.status_code == 409
    assert "to clip of Light Forcing Sampler" in answer.json()["error"]
    server.wait(prompt_id)
