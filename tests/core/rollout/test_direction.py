"""Prompt changes, guidance, first-chunk steps, per-chunk seeds and continuation: what steers a running video."""

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.timeline import Prompt, Timeline

from ...support.rollouts import FINE, TEXT, roll, text, video
from .unroped import assert_video_sees

SIZE = (4, 6)
ROLLING, ROLES = (AttentionOptions(block=(16, 16), policy=policy) for policy in ("rolling_sink", "forcing_kv"))
SIGMAS = few_step_sigmas((1000, 500))


def run(dit, context, frames=12, **options):
    arguments = {"frames_per_chunk": 3, "sigmas": SIGMAS, "attention": FINE, **options}
    return roll(dit, context, latent_shape=(1, 16, frames, *SIZE), **arguments)


def passes(dit, context, **options):
    """(noise level, frames, clean) of every forward."""
    seen = []

    def denoise(x, sigma, passes):
        seen.append((sigma, x.shape[2], passes[0].commits))
        return 0.5 * x

    list(run(dit, context, denoise=denoise, **options))
    return seen


class TestTimeline:
    def test_each_chunk_follows_the_newest_prompt(self):
        a, b, c = text(1), text(2), text(3)
        timeline = Timeline([Prompt(c, 4), Prompt(a), Prompt(b, 2, "soft")])
        assert [next(i for i, t in enumerate((a, b, c)) if timeline.text(k) is t) for k in range(6)] == [
            *(0, 0),
            *(1, 1),
            *(2, 2),
        ]
        assert [timeline.changes_at(k) for k in range(6)] == [None, None, "soft", None, "hard", None]

    def test_blend_moves_in_equal_parts_and_pads_the_shorter_text(self):
        a, b = text(1, 5), text(2, 8)
        timeline = Timeline([Prompt(a), Prompt(b, 2, "blend", 4)])
        padded = torch.cat([a, torch.zeros(1, 3, TEXT)], dim=1)
        for chunk, share in ((2, 0.25), (3, 0.5), (4, 0.75)):
            torch.testing.assert_close(timeline.text(chunk), (1 - share) * padded + share * b)
        assert timeline.text(5) is b
        for dtypes in ((torch.float16, torch.float32), (torch.bfloat16, torch.float16)):
            mixed = Timeline([Prompt(a.to(dtypes[0])), Prompt(b.to(dtypes[1]), 2, "blend", 4)])
            torch.testing.assert_close(mixed.text(3), timeline.text(3), rtol=0, atol=0.02)
        assert [timeline.changes_at(k) for k in range(7)] == [None, None, "soft", "soft", "soft", "soft", None]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Timeline([]), "no prompt that starts at chunk 0"),
            (lambda: Timeline([Prompt(text(1), 1)]), "first starts at chunk 1"),
            (lambda: Timeline([Prompt(text(1)), Prompt(text(2))]), "two prompts that start at chunk 0"),
            (lambda: Timeline([Prompt(text(1)), Prompt(torch.zeros(1, 7, 16), 1)]), "widths 32 and 16"),
            (lambda: Prompt(text(1), -1), "start_chunk -1"),
            (lambda: Prompt(text(1), 1, "fade"), "'fade'"),
            (lambda: Prompt(text(1), 1, "blend", 0), "blend_chunks 0"),
            (lambda: Prompt(text(1), 1, "cut", jump=-1), "jump -1 is outside 0 to 1000"),
            (lambda: Prompt(text(1), 1, "cut", pin=1001), "pin 1001 is outside"),
            (lambda: Prompt(torch.zeros(7, 16)), r"\[7, 16\]"),
        ],
    )
    def test_impossible_timelines_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_change_leaves_earlier_chunks_alone(dit):
    plain = video(run(dit, text(1)))
    for switch in ("hard", "soft", "blend"):
        changed = video(run(dit, [Prompt(text(1)), Prompt(text(2), 2, switch, 2)]))
        assert torch.equal(plain[:, :, :6], changed[:, :, :6])
        assert not torch.allclose(plain[:, :, 6:9], changed[:, :, 6:9], atol=1e-3)


@pytest.mark.parametrize("sinks", [{}, *({"window": 7, "sink_frames": 3, "sink_rope": r} for r in ("fixed", "follow"))])
def test_a_hard_switch_equals_a_run_whose_past_was_made_under_the_new_text(dit, sinks):
    """Recomputed history, sinks included, must be what one clean pass over those frames under the new text stores."""
    switched = list(run(dit, [Prompt(text(1)), Prompt(text(2), 1)], **sinks))
    continued = list(run(dit, text(2), initial_latents=switched[0].latents, **sinks))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(switched[1:], continued, strict=True))


@pytest.mark.parametrize(
    ("window", "sinks", "recomputed"),
    [(None, 0, 9), (None, 3, 9), (12, 3, 9), (9, 3, 9), (8, 3, 5), (7, 1, 6), (6, 3, 3), (6, 0, 6)],
)
def test_a_hard_switch_recomputes_the_visible_past_and_sinks_unless_frames_are_gone(dit, window, sinks, recomputed):
    prompts = [Prompt(text(1)), Prompt(text(2), 3)]
    seen = passes(dit, prompts, window=window, sink_frames=sinks)
    ordinary = passes(dit, text(1), window=window, sink_frames=sinks)
    assert seen[: len(ordinary) - 2] + seen[len(ordinary) - 1 :] == ordinary
    assert seen[len(ordinary) - 2] == (0.0, recomputed, True)


@pytest.mark.parametrize("switch", ["soft", "cut"])
def test_soft_switches_and_cuts_cost_no_pass(dit, switch):
    assert passes(dit, [Prompt(text(1)), Prompt(text(2), 2, switch)]) == passes(dit, text(1))


CUT = 6  # the first frame of chunk 2


def after_cut(frame):
    return frame + 42 * (frame >= CUT)


@pytest.mark.parametrize(
    ("shown", "options"),
    [
        (lambda past, length: {after_cut(frame): frame for frame in range(past)}, {}),
        (
            # A sink that follows is directly before the oldest of the newest frames.
            lambda past, length: (
                ({after_cut(max(1, past + length - 5)) - 1: 0} if past else {})
                | {after_cut(frame): frame for frame in range(max(1, past + length - 5), past)}
            ),
            {"window": 6, "sink_frames": 1, "sink_rope": "follow"},
        ),
    ],
)
def test_a_cut_moves_its_chunk_and_all_later_ones_away_from_the_past(shown, options):
    prompts = [Prompt(text(1)), Prompt(text(1), 2, "cut")]
    assert_video_sees(shown, 15, prompts=prompts, place=after_cut, frames_per_chunk=3, **options)


def test_pinned_frames_of_a_cut_stay_visible():
    seen = {0: [], 3: range(3), 6: range(6), 9: range(3, 9), 12: range(6, 12), 15: [6, 7, 8, *range(12, 15)]}
    prompts = [Prompt(text(1)), Prompt(text(1), 2, "cut", pin=3)]

    def shown(past, length):
        return {after_cut(frame): frame for frame in seen[past]}

    assert_video_sees(shown, 18, prompts=prompts, place=after_cut, frames_per_chunk=3, window=9)


def test_cuts_act_on_the_negative_prompt_and_leave_a_hard_switch_its_positions(dit):
    prompts = [Prompt(text(1)), Prompt(text(2), 1, "cut"), Prompt(text(1), 2, "cut", pin=3), Prompt(text(3), 3)]
    plain = list(run(dit, prompts, window=9))
    guided = list(run(dit, prompts, window=9, cfg=2.0, negative=text(4)))
    assert not torch.equal(plain[-1].latents, guided[-1].latents)
    for options in ({}, {"replay": "window"}):
        rest = list(run(dit, prompts, window=9, finished=[one.latents for one in plain[:3]], **options))
        assert torch.equal(rest[0].latents, plain[3].latents)


def test_frames_that_a_later_pin_lets_go_are_read_again_as_they_are(dit, monkeypatch):
    """A hard switch after two pins, so late that the first pin's frames are far behind the window."""
    cuts = [Prompt(text(1), chunk, "cut", pin=3) for chunk in (1, 13)]
    seen, frames = [], []
    real = KVCache.reopen

    def reopen(self):
        real(self)
        frames.append(list(self.current_frames))

    def denoise(x, sigma, passes):
        seen.append(x)
        return 0.5 * x

    monkeypatch.setattr(KVCache, "reopen", reopen)
    made = video(run(dit, [Prompt(text(1)), *cuts, Prompt(text(2), 14)], frames=48, window=9, denoise=denoise))
    assert frames == [[3, 4, 5, 36, 37, 38]]
    assert any(x.shape[2] == 6 and torch.equal(x, made[:, :, frames[0]]) for x in seen)


def test_a_cut_at_the_start_is_none(dit):
    options = {"window": 9, "sink_frames": 3, "sink_rope": "follow"}
    plain, cut = (video(run(dit, [Prompt(text(1), 0, switch, pin=3)], **options)) for switch in ("hard", "cut"))
    assert torch.equal(plain, cut)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (Prompt(text(2), 1, "cut"), {"attention": ROLLING}, "switch 'cut' cannot end a scene that rolling_sink brings"),
        (Prompt(text(2), 1, "cut"), {"window": 9, "sink_frames": 4}, "'cut' at chunk 1 is inside the first 4 frames"),
        (Prompt(text(2), 1, "cut", pin=3), {"window": 5}, "window 5 cannot hold 3 sink frames and a chunk of 3"),
        (Prompt(text(2), 1, "cut", pin=3), {"attention": ROLES}, "pin 3 would take the place of frames"),
    ],
)
def test_cuts_that_cannot_work_are_refused(dit, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        run(dit, [Prompt(text(1)), prompt], **options)


def test_replaying_the_window_runs_only_sinks_and_visible_frames_and_sees_the_same(dit, monkeypatch):
    for replay, replayed in (("all", 7), ("window", 3)):  # chunk 0 has the sink, frames 15…20 the other 6 places
        seen = []
        original = KVCache.open

        def spy(self, frames, original=original, seen=seen):
            original(self, frames)
            seen.append(sorted(self.slot_frames))

        monkeypatch.setattr(KVCache, "open", spy)
        given = torch.randn(1, 16, 21, *SIZE)
        options = {"frames": 27, "window": 7, "sink_frames": 1, "initial_latents": given, "replay": replay}
        list(run(dit, text(1), **options))
        monkeypatch.setattr(KVCache, "open", original)
        assert len(seen) == replayed + 2
        assert seen[-2:] == [[0, 18, 19, 20, 21, 22, 23], [0, 21, 22, 23, 24, 25, 26]]


@pytest.mark.parametrize("rope", ["average", "average_float32"])
def test_sinks_change_alike_in_memory_of_other_kinds(dit, rope):
    options = {"window": 9, "sink_frames": 3, "sink_rope": rope, "frames": 18}
    kinds = KVOptions(), KVOptions(host=True), KVOptions("int8")
    plain, far, small = (video(run(dit, text(1), kv=kv, **options)) for kv in kinds)
    assert torch.equal(plain, far)
    assert 0 < (plain - small).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(("rope", "replayed"), [("follow", 3), ("average", 7)])
def test_sinks_that_change_need_the_whole_past(dit, rope, replayed):
    options = {"window": 9, "sink_frames": 3, "sink_rope": rope, "frames": 24, "replay": "window"}
    given = torch.randn(1, 16, 21, *SIZE)
    assert passes(dit, text(1), initial_latents=given, **options)[:-2] == [(0.0, 3, True)] * replayed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_frames": 2}, "sink_rope 'average' averages chunks of 3 into 2 sink frames; use 3 sink_frames"),
        ({"sink_frames": 3, "window": 10}, "window 10 lets parts of chunks leave, and 'average' averages whole ones"),
        ({"sink_frames": 3, "attention": ROLES}, "'average' changes sinks, and forcing_kv keeps frames of its own"),
    ],
)
def test_averages_that_cannot_work_are_refused(dit, options, message):
    with pytest.raises(ValueError, match=message):
        run(dit, text(1), **{"window": 9, "sink_rope": "average", **options})


def test_guidance_is_a_mix_of_two_predictions(dit):
    alone = video(run(dit, text(1), frames=3, sigmas=[1.0, 0.0]))
    negative = video(run(dit, text(2), frames=3, sigmas=[1.0, 0.0]))
    guided = video(run(dit, text(1), frames=3, sigmas=[1.0, 0.0], cfg=3.0, negative=text(2)))
    torch.testing.assert_close(guided, negative + 3.0 * (alone - negative), rtol=0, atol=1e-4)


def test_guidance_with_the_prompt_itself_changes_nothing(dit):
    plain = video(run(dit, text(1), growth=[0.0, 0.5]))
    guided = video(run(dit, text(1), growth=[0.0, 0.5], cfg=4.0, negative=text(1)))
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-5)
    assert torch.equal(plain, video(run(dit, text(1), growth=[0.0, 0.5], cfg=1.0, negative=text(2))))


def test_a_caller_may_mix_the_predictions_of_a_step(dit):
    options = {"growth": [0.0, 0.5], "cfg": 3.0, "negative": text(2)}
    committed = []

    def mix(x, sigma, passes):
        timestep = torch.full((1,), 1000.0 * sigma)
        alone, *others = (x - sigma * one(dit, x, timestep) for one in passes)
        committed.extend(one.state.guide for one in passes if one.commits)
        return others[0] + 3.0 * (alone - others[0]) if others else alone

    assert torch.equal(video(run(dit, text(1), denoise=mix, **options)), video(run(dit, text(1), **options)))
    assert committed == [0, 1] * 3


@pytest.mark.parametrize(
    ("per_chunk", "given", "steps"),
    [
        *((3, 0, [4, 1, 1, 1]), (1, 0, [4, *[1] * 11])),
        *((1, 1, [4, *[1] * 10]), (3, 1, [4, 1, 1, 1]), (3, 2, [4, 1, 1, 1])),  # an image is no chunk of a run
        *((3, 3, [1, 1, 1]), (3, 4, [1, 1, 1]), (1, 2, [1] * 10)),  # and a run that is continued has had its first
    ],
)
def test_the_first_generated_chunk_may_take_other_steps(dit, per_chunk, given, steps):
    events, options = [], {"first_sigmas": few_step_sigmas(), "sigmas": few_step_sigmas((1000,))}
    initial = torch.zeros(1, 16, given, *SIZE) if given else None
    list(run(dit, text(1), frames_per_chunk=per_chunk, initial_latents=initial, on_step=events.append, **options))
    assert [(e.chunk, e.step) for e in events] == [
        (chunk, step) for chunk, of in enumerate(steps) for step in range(of)
    ]
    assert [(e.done, e.total) for e in events] == [(1 + i, sum(steps)) for i in range(sum(steps))]


def test_one_chunk_may_have_its_own_seed(dit):
    plain = video(run(dit, text(1), seed=1))
    other = video(run(dit, text(1), noise=seeded_noise(1, {2: 99})))
    assert torch.equal(plain[:, :, :6], other[:, :, :6])
    assert not torch.equal(plain[:, :, 6:9], other[:, :, 6:9])


LIVE = [
    {},
    {"window": 9, "sink_frames": 1, "sink_rope": "follow"},
    {"attention": ROLLING, "window": 9},
    {"cfg": 2.0, "negative": text(4)},
]


@pytest.mark.parametrize("options", LIVE)
@pytest.mark.parametrize("switch", ["hard", "soft", "blend", "cut"])
def test_prompts_given_while_the_video_is_made_equal_a_timeline_of_them(dit, switch, options):
    """One prompt comes before the first chunk; one replaces a planned one; the last are a cut's pin and its use."""
    if switch == "cut" and options.get("attention") is ROLLING:
        switch = "hard"
    pin = {"pin": 3} if switch == "cut" and options.get("window") else {}
    given = {
        0: Prompt(text(3), 0),
        3: Prompt(text(2), 3, switch, 2, **pin),
        5: Prompt(text(5), 5, "soft"),
        6: Prompt(text(6), 6, "hard"),
    }
    followed = []

    def direct(recipe, chunk):
        followed.append(recipe.with_prompt(given[chunk]) if chunk in given else recipe)
        return followed[-1]

    planned = [Prompt(text(1)), Prompt(text(7), 5), Prompt(text(8), 7, "soft")]
    live = video(run(dit, planned, frames=27, direct=direct, **options))
    timeline = followed[-1].prompts
    assert [one.start_chunk for one in followed[-1].guides[0].prompts] == [0, 3, 5, 6, 7]
    assert torch.equal(live, video(run(dit, timeline, frames=27, **options)))
    assert not torch.equal(live, video(run(dit, planned, frames=27, **options)))


def test_a_continued_video_is_directed_from_its_next_chunk_on(dit):
    made, asked = list(run(dit, text(1)))[:2], []

    def direct(recipe, chunk):
        asked.append(chunk)
        return recipe.with_prompt(Prompt(text(2), chunk)) if chunk == 2 else recipe

    rest = video(run(dit, text(1), finished=made, direct=direct))
    assert asked == [2, 3]
    assert torch.equal(rest, video(run(dit, [Prompt(text(1)), Prompt(text(2), 2)], finished=made)))
