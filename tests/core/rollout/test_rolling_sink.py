"""Windows by the book: sinks that follow, and first frames that come back (Rolling Sink), in continued runs too."""

from functools import partial
from itertools import chain, cycle, islice

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions, Pools
from lightforcing.lightforcing_core.attention.policies import RollingSink
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions
from lightforcing.lightforcing_core.model.rope import RopeTable
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import recipe_of, roll, text, video
from .unroped import assert_video_sees

ROLLING = AttentionOptions("reference", (16, 16), policy="rolling_sink")


def back(anchors, window, lengths):
    """The anchors that come back, by the first frame of the chunk whose clean pass brings them."""
    rule, start, found = RollingSink(anchors), 0, {}
    for length in lengths:
        end = start + length
        held = range(max(0, end - window), end)
        moves = rule.moves(held, range(start, end), window)
        assert [place for *_, place in moves] == [held[slot] for slot, *_ in moves]
        found |= {start: [anchor for _, anchor, _ in moves]} if moves else {}
        start = end
    return found


def test_anchors_come_back_in_the_published_order():
    published = back(18, 21, [3] * 20)
    down = [[17, 16, 15], [14, 13, 12], [11, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1, 0]]
    up = [places[::-1] for places in down[::-1]]
    assert published == dict(zip(range(21, 60, 3), [*down, *up, down[0]], strict=True))
    assert [published[start] for start in (39, 42, 54)] == [[0, 1, 2], [3, 4, 5], [15, 16, 17]]
    echo = [[11, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1, 0], [0, 1, 2], [3, 4, 5]]
    assert back(12, 21, [3] * 13) == dict(zip(range(21, 39, 3), echo, strict=True))
    assert list(chain(*back(3, 4, [1] * 12).values())) == [2, 1, 0, 0, 1, 2, 2, 1]
    assert back(18, 21, [1] + [3] * 9) == {19: [17], 22: [16, 15, 14], 25: [13, 12, 11]}  # after an image


def sources(start, length, window, anchors):
    """The frame whose keys and values are at each place before a chunk, in the rule's words."""
    real = window - length
    rolled = islice(cycle([*reversed(range(anchors)), *range(anchors)]), max(0, start - length - real))
    return [*range(min(start, real)), *rolled, *range(max(real, start - length), start)]


def shown(start, length, window, anchors):
    """The part of them that the chunk sees: {place: frame}."""
    return {place: sources(start, length, window, anchors)[place] for place in range(start)[length - window :]}


def test_a_chunk_sees_the_published_frames():
    for start, frames in {
        21: range(3, 21),
        24: [*range(6, 18), 17, 16, 15, 21, 22, 23],
        30: [*range(12, 18), *range(17, 8, -1), 27, 28, 29],
        36: [*range(17, 2, -1), 33, 34, 35],
    }.items():
        assert shown(start, 3, 21, 18) == dict(zip(range(start - 18, start), frames, strict=True))


@pytest.mark.parametrize(
    ("window", "anchors", "per_chunk", "given", "frames"),
    [(None, 0, 3, 0, 42), (21, 12, 3, 0, 30), (5, 0, 1, 0, 12), (9, 0, 3, 1, 25), (8, 3, 2, 0, 20)],
)
def test_a_video_equals_one_from_all_its_keys_and_values(window, anchors, per_chunk, given, frames):
    rule = partial(shown, window=window or 21, anchors=anchors or (window or 21) - per_chunk)
    start = torch.randn(1, 16, given, 4, 6, generator=torch.Generator().manual_seed(3)) if given else None
    attention = AttentionOptions("reference", (16, 16), policy="rolling_sink", settings=(("anchors", anchors),))
    assert_video_sees(rule, frames, start, window=window, frames_per_chunk=per_chunk, attention=attention)


@pytest.mark.parametrize("kv", [KVOptions(), KVOptions("int8", key_mean=False), KVOptions("fp8", True, False)], ids=str)
def test_slots_hold_rotated_originals_as_if_they_had_been_stored_there(kv):
    shape = partial(CacheShape, 3, 2, 7, (1, 5), 2, 12, block_k=4, pools=Pools(keys=True, values=True, parts=True))
    rolling, plain = (KVCache(shape(rolling=rule), kv) for rule in (RollingSink(4), None))
    stored, generator = {}, torch.Generator().manual_seed(0)
    for start in range(0, 27, 3):
        for cache in (rolling, plain):
            cache.open(3)
        for layer in range(3):
            k, v = torch.randn(2, 2, 15, 2, 12, generator=generator)
            rolling.store(layer, k, v)
            stored |= {(layer, start + i): (k[:, 5 * i : 5 * i + 5], v[:, 5 * i : 5 * i + 5]) for i in range(3)}
        for cache in (rolling, plain):
            cache.commit()
        plain.reopen()
        for layer in range(3):
            parts = []
            for place in plain.current_frames:
                frame = sources(start + 3, 3, 7, 4)[place]
                k, v = stored[layer, frame]
                parts.append((k if place == frame else RopeTable([place - frame], 1, 1, 12).rotate(k), v))
            plain.store(layer, *(torch.cat(both, 1) for both in zip(*parts, strict=True)))
            for one, other in zip(rolling.visible(layer), plain.visible(layer), strict=True):
                assert one is other is None or torch.equal(one, other)
        plain.commit()


def run(dit, prompts, frames=21, finished=(), **options):
    """A video of chunks of 3 in a window of 9, in which places from 6 on get one of 6 anchors."""
    size, steps = (options.pop("batch", 1), 16, frames, 4, 6), few_step_sigmas((1000, 500))
    options = {"frames_per_chunk": 3, "sigmas": steps, "window": 9, "attention": ROLLING, **options}
    return roll(dit, prompts, finished, latent_shape=size, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv": KVOptions("int8"), "batch": 2},
        {"kv": KVOptions(host=True), "cfg": 2.0, "negative": text(3)},
        {"initial_latents": torch.ones(1, 16, 1, 4, 6), "frames": 22},
    ],
    ids=["plain", "int8", "host, cfg", "image"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(dit, options):
    prompts = [Prompt(text(1)), Prompt(text(2), 5, "hard")]
    whole = list(run(dit, prompts, **options))
    plain = list(run(dit, prompts, **options, attention=AttentionOptions()))
    equal = [torch.equal(a.latents, b.latents) for a, b in zip(whole, plain, strict=True)]
    assert equal[:3] + equal[4:] == [True] * 3 + [False] * 3  # anchors come back one chunk earlier after an image
    for done in (3, 6):
        assert torch.equal(video(run(dit, prompts, finished=whole[:done], **options)), video(whole[done:]))


def test_a_saved_run_keeps_the_policy_and_its_window(tmp_path):
    attention = AttentionOptions(policy="rolling_sink", settings=(("anchors", 12.0),))
    recipe = recipe_of(
        frames_per_chunk=3, sigmas=[1, 0], context=text(1), latent_shape=(1, 16, 30, 4, 6), attention=attention
    )
    saved = load_run_state(save_run_state(RunState(recipe, "model"), tmp_path / "run")).recipe
    assert (saved.window, saved.attention) == (21, attention)
    assert saved.cache_shape(layers=1, heads=1, head_dim=128, dtype=torch.float32).rolling == RollingSink(12)


@pytest.mark.parametrize("prompts", [text(1), [Prompt(text(1)), Prompt(text(2), 6, "hard")]], ids=["one", "switch"])
def test_replaying_the_window_reads_anchors_and_visible_frames_and_sees_the_same(one_layer, prompts):
    given = torch.randn(1, 16, 24, 4, 6)
    whole, window = (
        video(run(one_layer, prompts, 33, initial_latents=given, replay=replay)) for replay in ("all", "window")
    )
    torch.testing.assert_close(whole, window, rtol=0, atol=1e-4)


def test_after_a_hard_switch_the_recomputed_frames_are_the_anchors(one_layer):
    def noise(before):
        return lambda index, draw, shape: seeded_noise(1)(index + before, draw, shape)

    switched = list(run(one_layer, [Prompt(text(1)), Prompt(text(2), 5)], 30, noise=noise(0)))
    past = video(switched[2:5])  # all that chunk 5 could see: a new video may begin with it
    begun = video(run(one_layer, text(2), 24, initial_latents=past, noise=noise(2)))
    torch.testing.assert_close(video(switched[5:]), begun, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"sink_frames": 3}, "sink_frames 3 would stay visible, and rolling_sink brings first frames back; use 0"),
        ({}, {"window": 6}, "window 6 has no place for first frames before 2 chunks of 3; use at least 7"),
        ({"anchors": 7}, {}, "anchors 7 do not fit a window of 9 with a chunk of 3; use at most 6"),
        ({"anchors": -1}, {}, "anchors -1 is negative"),
        ({"frames": 3}, {}, "policy 'rolling_sink' has no setting 'frames'; its settings are anchors"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(settings, options, message):
    with pytest.raises(ValueError, match=message):
        run(None, text(1), attention=AttentionOptions(policy="rolling_sink", settings=(*settings.items(),)), **options)


@pytest.mark.parametrize(("window", "sinks", "per_chunk", "frames"), [(7, 1, 3, 15), (8, 2, 2, 14), (3, 1, 1, 6)])
def test_following_sinks_give_the_published_rollout(window, sinks, per_chunk, frames):
    def shown(past, length):
        """The sinks and the newest past frames that fit; positions count from the window's start."""
        recent = max(sinks, past + length - (window - sinks))
        return dict(enumerate([*range(min(sinks, past)), *range(recent, past)]))

    ring = {"window": window, "sink_frames": sinks, "sink_rope": "follow"}
    assert_video_sees(shown, frames, frames_per_chunk=per_chunk, **ring)
