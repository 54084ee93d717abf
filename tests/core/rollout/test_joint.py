"""Chunks that are denoised at once: Rolling Forcing's published passes, videos by the book, continued runs."""

from dataclasses import replace

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.model.joint_cache import JointCache
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.schedule import Schedule
from lightforcing.lightforcing_core.rollout.state import RunState, StateError, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import TEXT, recipe_of, roll, text, video
from .joint_by_hand import LEVELS, STEPS, Book, joint_keys, rolled, windows

JOINT = AttentionOptions("reference", (16, 16), policy="rolling_forcing")
TRAINED = {"window": 21, "sink_frames": 3, "sink_rope": "follow", "attention": JOINT, "frames_per_chunk": 3}


def test_the_reference_makes_the_published_passes():
    rounded = [round(1000 * level, 4) for level in LEVELS]
    assert rounded == [1000, 952.381, 882.3529, 769.2308, 555.5556]
    seven = [
        (list(at_once), [rounded[LEVELS.index(level)] for level in at_once.values()]) for at_once in windows(7, LEVELS)
    ]
    up = rounded[::-1]
    begun = [(list(range(end + 1)), up[4 - end :]) for end in range(5)]
    ended = [(list(range(first, 7)), up[: 7 - first]) for first in range(3, 7)]
    assert seven == [*begun, ([1, 2, 3, 4, 5], up), ([2, 3, 4, 5, 6], up), *ended]
    assert sum(len(chunks) for chunks, _ in seven) == 35
    long = list(windows(42, LEVELS))
    assert (len(long), sum(map(len, long))) == (46, 210)


def test_the_reference_sees_the_published_keys():
    passes = [(3 * min(at_once), 3 * len(at_once)) for at_once in windows(12, LEVELS)]
    seen = [(joint_keys(start, frames, 3, 21), frames) for start, frames in passes]
    assert [frames for _, frames in seen[:5]] == [3, 6, 9, 12, 15]
    assert [not keys for keys, _ in seen[:5]] == [True] * 5
    parts = [(frames, 3, len(keys) - 3) for keys, frames in seen[5:]]
    assert parts == [(15, 3, 0), *[(15, 3, 3)] * 6, (12, 3, 6), (9, 3, 9), (6, 3, 12), (3, 3, 15)]
    assert [keys[0] for keys, _ in seen[5:]] == [(0, at) for at in (0, 0, 3, 6, 9, 12, 15, 15, 15, 15, 15)]


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (36, {}),
        (6, {}),
        (29, {}),
        (30, {"window": 19}),
        (12, {"frames_per_chunk": 1, "window": 7, "sink_frames": 1}),
        (20, {"frames_per_chunk": 2, "window": 12, "sink_frames": 0, "context_noise": 30.0}),
    ],
    ids=["trained", "shorter than a window", "short last chunk", "window 19", "frame by frame", "no sinks"],
)
def test_a_video_equals_the_book(frames, options):
    weights = random_state_dict(dim=256, ffn_dim=320, layers=2, text_dim=TEXT)
    dit, options = wan_from_state_dict(weights, dtype=torch.float64), TRAINED | options
    made = roll(dit, text(1), sigmas=few_step_sigmas(STEPS), seed=4, latent_shape=(1, 16, frames, 4, 6), **options)
    made, draw = list(made), seeded_noise(4)
    book = Book(weights, text(1)[0], 2, (2, 3))
    lengths = [chunk.latents.shape[2] for chunk in made]
    sizes = {"window": options["window"], "sinks": options["sink_frames"]}
    expected = rolled(
        book,
        lambda chunk, number: draw(chunk, number, (1, 16, lengths[chunk], 4, 6))[0].double(),
        lengths,
        noise_of_context=options.get("context_noise", 0.0),
        **sizes,
    )
    torch.testing.assert_close(video(made)[0].double(), expected, rtol=0, atol=2e-4)


def run(dit, frames=21, finished=(), begun=None, steps=(1000, 500, 250), **options):
    size, prompts = (options.pop("batch", 1), 16, frames, 4, 6), options.pop("context", text(1))
    given = {**TRAINED, "window": 13, "sigmas": few_step_sigmas(steps), **options}
    return roll(dit, prompts, finished, begun, latent_shape=size, **given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv": KVOptions("int8"), "batch": 2},
        {"kv": KVOptions("fp8", host=True), "sink_rope": "fixed"},
        {"kv": KVOptions(host=True), "cfg": 2.0, "negative": text(3)},
        {"initial_latents": torch.ones(1, 16, 1, 4, 6), "frames": 22, "chunk_seeds": {3: 5}},
    ],
    ids=["plain", "int8", "fp8, host, fixed", "host, cfg", "image"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(dit, options):
    whole = list(run(dit, **options))
    for done in range(1, len(whole)):
        assert torch.equal(video(run(dit, finished=whole[:done], **options)), video(whole[done:])), done


def test_memory_of_other_kinds_changes_a_video_little_or_nothing(dit):
    plain, far, small = (video(run(dit, kv=kv)) for kv in (KVOptions(), KVOptions(host=True), KVOptions("int8")))
    assert torch.equal(plain, far)
    assert 0 < (plain - small).norm() < 0.02 * plain.norm()


def test_a_saved_run_continues_bit_for_bit_and_lengthens_only_before_its_end(dit, tmp_path):
    recipe = recipe_of(
        context=text(1), latent_shape=(1, 16, 18, 4, 6), sigmas=few_step_sigmas((1000, 500, 250)), **TRAINED
    )
    whole, longer = list(run(dit, 18, window=21)), list(run(dit, 24, window=21))
    state = RunState(recipe, "a model")
    for chunk in whole:
        state = state.extended_by(chunk)
        loaded = load_run_state(save_run_state(state, tmp_path / "run.safetensors"))
        assert loaded.is_complete or torch.equal(
            video(run(dit, 18, loaded.finished, loaded.begun, window=21)), video(whole[chunk.index + 1 :])
        )
        if chunk.index < 4:
            more = loaded.lengthened(24)
            rest = run(dit, 24, more.finished, more.begun, window=21)
            assert torch.equal(video(rest), video(longer[chunk.index + 1 :]))
        else:
            with pytest.raises(StateError, match="at once, as its end; start a new video"):
                loaded.lengthened(24)
    with pytest.raises(Refusal, match=r"begun has shape None.*\[1, 16, 6, 4, 6\]"):
        run(dit, 18, [whole[0].latents], window=21)
    with pytest.raises(Refusal, match="begun has shape"):
        RunState(replace(recipe, attention=AttentionOptions()), "", finished=state.finished[:1], begun=whole[0].begun)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": [Prompt(text(1)), Prompt(text(2), 3)]}, "context changes.*use one prompt"),
        ({"last_latents": torch.zeros(1, 16, 1, 4, 6)}, "last_latents cannot be met by rolling_forcing"),
        ({"first_sigmas": [1, 0.5, 0]}, "first_sigmas give one chunk other steps"),
        ({"window": 11}, "window 11 cannot hold 3 sink frames and 9 frames.*use at least 12"),
        ({"sink_rope": "average", "window": 12}, "sink_rope 'average' changes sinks, and rolling_forcing"),
        ({"cuda_graph": "on"}, "cuda_graph 'on' cannot run: rolling_forcing"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run(dit, options, message):
    with pytest.raises(Refusal, match=message):
        run(dit, **options)


def test_steps_and_the_record_name_each_chunk_and_all_that_its_last_pass_sees(dit):
    recorder, events = RunRecorder(), []
    whole = list(run(dit, 24, growth=[0.0, 0.9], recorder=recorder, on_step=events.append))
    steps = [(event.index, event.step, event.steps, event.done) for event in events]
    assert steps == [(0, 0, 3, 1), (0, 1, 3, 2), (0, 2, 3, 3), *((index, 0, 1, index + 3) for index in range(1, 8))]
    assert {(event.total, tuple(event.x0.shape)) for event in events} == {(10, (1, 16, 3, 4, 6))}
    assert all(torch.equal(event.x0, chunk.latents) for event, chunk in zip(events[2:], whole, strict=True))
    record = recorder.finish()
    assert [(chunk.start_frame, chunk.frames, chunk.steps) for chunk in record.chunks] == [
        (start, 3, 3) for start in range(0, 24, 3)
    ]
    seen = [range(9), range(12), [*range(3), *range(5, 15)], [*range(3), *range(8, 18)]]
    assert [chunk.visible for chunk in record.chunks[:4]] == [*map(tuple, seen)]
    assert record.chunks[-1].visible == (0, 1, 2, *range(14, 24))
    assert all("'rolling_forcing' reads everything" in chunk.why_dense for chunk in record.chunks[1:])


def test_the_published_cache_and_its_memory():
    schedule = Schedule.of_family(FAMILIES["rolling_forcing"], 42)
    assert FAMILIES["rolling_forcing"].sparse.policy == "rolling_forcing"
    recipe = recipe_of(
        context=torch.zeros(1, 512, 4096),
        latent_shape=(1, 16, 42, 60, 104),
        sigmas=few_step_sigmas(STEPS),
        attention=JOINT,
        **schedule.arguments(),
    )
    shape = recipe.cache_shape(layers=30, heads=12, head_dim=128, dtype=torch.bfloat16)
    cache = KVCache(shape, device="meta")
    slot = 287_539_200  # 1560 tokens of 30 layers
    assert recipe.pass_frames == 15
    assert cache.nbytes == (21 + 3) * slot  # as published
    assert JointCache(cache, "meta").nbytes == 21 * slot // 30
