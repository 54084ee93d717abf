"""Echo-Forcing's compressed memory: worked numbers, videos against brute force, continued runs, what is refused."""

from itertools import pairwise
from math import exp

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies.echo import EchoMemory, query_sums, token_scores, turned_to
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.rope import RopeTable
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support import naive_wan as naive
from ...support.rollouts import TEXT, recipe_of, roll, text, video
from .echo_by_hand import Layer

ECHO = AttentionOptions("reference", (16, 16), policy="echo_forcing")
SOFT = [Prompt(text(1)), Prompt(text(2), 5, "soft")]


def test_scores_are_those_of_the_worked_example():
    """Two pairs, the first one temporal of frequency 1, and a third without anything."""
    mean, lengths = torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.0, 0.0]]), torch.tensor([[1.2, 0.9, 0.0]])
    now = torch.cat([torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.0, 0.0]]), lengths], -1)
    direction, weights = turned_to(torch.cat([mean, lengths], -1), now)
    keys = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    found = []
    for key, frame in zip(keys, (3, 5), strict=True):
        ahead = RopeTable([6 + 1 - frame + offset for offset in (1, 2)], 1, 1, 6)
        aimed = ahead.rotate(direction[None, None].expand(1, 2, 1, 6)).mean(1)
        found.append(token_scores(key[None, None, None], aimed, weights[None]).item())
    assert found == pytest.approx([1.514809, 0.585052], abs=5e-6)


def test_lengths_count_less_if_the_last_queries_point_elsewhere():
    first, last = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[0.9, 0.19**0.5, 1.0]])
    assert turned_to(first, last)[1].item() == pytest.approx(2 * 0.740818, abs=2e-6)
    assert exp(-0.3) == pytest.approx(0.740818, abs=5e-7)
    queries = torch.tensor([[3.0, 4.0], [3.0, -4.0]])[None, :, None]
    assert query_sums(queries).tolist() == [[[3.0, 0.0, 5.0]]]


def test_anchors_come_back_in_the_published_order_and_stay_until_they_leave():
    places, sinks = {}, {}
    for start in range(0, 39, 3):
        first = max(0, start + 3 - 21)
        sinks[start] = [places.get(place, place) for place in range(first, first + 12)]
        held = range(first, start + 3)
        moves = EchoMemory(12).moves(held, range(start, start + 3), 21)
        places |= {place: anchor for _, anchor, place in moves}
        assert (
            [held[slot] for slot, *_ in moves]
            == [place for *_, place in moves]
            == [*range(start - 6, start - 3)][: 3 * (start >= 18)]
        )
    assert sinks[21] == [*range(3, 12), 11, 10, 9]
    assert sinks[33] == [*range(8, -1, -1), 0, 1, 2]
    assert [sinks[start][-3:] for start in (24, 27, 30, 36)] == [[8, 7, 6], [5, 4, 3], [2, 1, 0], [3, 4, 5]]


@pytest.mark.parametrize(
    ("window", "per_chunk", "given", "frames"), [(12, 3, 0, 27), (7, 2, 0, 18), (10, 3, 1, 22), (6, 1, 0, 9)]
)
def test_a_video_equals_one_from_all_its_keys_and_values(window, per_chunk, given, frames):
    weights = random_state_dict(dim=256, ffn_dim=320, layers=2, text_dim=TEXT)
    dit, shape = wan_from_state_dict(weights, dtype=torch.float64), (1, 16, frames, 4, 6)
    layers, sigmas, draw = [Layer(window, 2, 3) for _ in range(2)], few_step_sigmas((1000, 500)), seeded_noise(4)

    def flow(x, timestep, commit=False):
        times = torch.full((x.shape[1],), timestep)
        see = lambda layer, q, k, v: layers[layer].attend(q, k, v, commit)  # noqa: E731
        return naive.naive_forward(weights, x, times, text(1)[0], 2, self_attention=see)

    start = torch.randn(1, 16, given, 4, 6, generator=torch.Generator().manual_seed(3)) if given else None
    if given:
        flow(start[0], 0.0, commit=True)
    options = {"latent_shape": shape, "frames_per_chunk": per_chunk, "sigmas": sigmas, "seed": 4, "window": window}
    for chunk in roll(dit, text(1), initial_latents=start, attention=ECHO, **options):
        x = draw(chunk.index, 0, chunk.latents.shape)[0]
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            x0 = x - sigma * flow(x, 1000.0 * sigma).float()
            if following:
                x = (1 - following) * x0 + following * draw(chunk.index, step + 1, chunk.latents.shape)[0]
        flow(x0, 0.0, commit=True)
        torch.testing.assert_close(chunk.latents[0], x0, rtol=0, atol=1e-4)


def run(dit, prompts, frames=21, finished=(), **options):
    """A video of chunks of 3 in a window of 12: 3 anchors, 3 frames of tokens, the last chunk and the current one."""
    size, steps = (options.pop("batch", 1), 16, frames, 4, 6), few_step_sigmas((1000, 500))
    options = {"frames_per_chunk": 3, "sigmas": steps, "window": 12, "attention": ECHO, **options}
    return roll(dit, prompts, finished, latent_shape=size, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv": KVOptions("int8"), "batch": 2},
        {"kv": KVOptions("fp8", host=True), "cfg": 2.0, "negative": text(3)},
        {"initial_latents": torch.ones(1, 16, 1, 4, 6), "frames": 22},
        {"last_latents": torch.ones(1, 16, 1, 4, 6), "kv": KVOptions(host=True)},
    ],
    ids=["plain", "int8, batch", "host, cfg", "image", "host, given end"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(dit, options):
    whole = list(run(dit, SOFT, **options))
    plain = list(run(dit, SOFT, **options, attention=AttentionOptions()))
    equal = [torch.equal(a.latents, b.latents) for a, b in zip(whole, plain, strict=True)]
    assert equal[:3] + equal[4:] == [True] * 3 + [False] * 3  # the window is full one chunk earlier after an image
    for done in (1, 4, 6):
        assert torch.equal(video(run(dit, SOFT, finished=whole[:done], **options)), video(whole[done:]))


def test_cpu_memory_changes_nothing_and_videos_of_a_batch_choose_for_themselves(dit):
    near, far = (video(run(dit, text(1), kv=KVOptions(host=host), batch=2)) for host in (False, True))
    assert torch.equal(near, far)
    draw = seeded_noise(0)
    noise = lambda index, number, shape: draw(index, number, (2, *shape[1:]))[1:]  # noqa: E731
    torch.testing.assert_close(video(run(dit, text(1), noise=noise)), near[1:], rtol=0, atol=1e-4)


def test_a_run_keeps_its_window_when_saved_and_its_record_names_what_it_keeps(dit, tmp_path):
    recorder = RunRecorder()
    list(run(dit, text(1), recorder=recorder))
    facts = recorder.finish().facts
    assert facts["compressed memory"] == "18 tokens in each layer, of the last 12 latent frames"
    sizes = {"frames_per_chunk": 3, "sigmas": [1, 0], "latent_shape": (1, 16, 30, 4, 6), "context": text(1)}
    state = RunState(recipe_of(attention=ECHO, **sizes), "model")
    saved = load_run_state(save_run_state(state, tmp_path / "run")).recipe
    shape = saved.cache_shape(layers=1, heads=1, head_dim=128, dtype=torch.float32)
    assert (saved.window, saved.attention, shape.rolling, shape.history) == (21, ECHO, EchoMemory(12), 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 9}, "window 9 has no place for first frames before 3 chunks of 3; use at least 10"),
        ({"window": 21, "frames_per_chunk": 1}, "frames_per_chunk 1 could show a token .* to 20 chunks, over 8; use 3"),
        ({"context": [Prompt(text(1)), Prompt(text(2), 3)]}, "'hard' would read frames again"),
        ({"context": [Prompt(text(1)), Prompt(text(2), 3, "cut")]}, "'cut' cannot end a scene that echo_forcing"),
        ({"attention": AttentionOptions(tiles=True, policy="echo_forcing")}, "tiles would mix the rows"),
        ({"sink_frames": 3}, "sink_frames 3 would stay visible, and echo_forcing brings first frames back"),
        ({"attention": AttentionOptions(policy="echo_forcing", settings=(("anchors", 4),))}, "anchors 4 do not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(options, message):
    with pytest.raises(ValueError, match=message):
        run(None, options.pop("context", text(1)), **options)
