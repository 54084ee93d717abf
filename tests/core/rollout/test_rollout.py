import gc

import pytest
import torch

from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.refusal import NotFinite, Refusal
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise

from ...support.rollouts import TEXT, recipe_of, roll, text, video

SIZE = (8, 8)
SIGMAS = few_step_sigmas()
SHAPE, STEPS = (1, 16, 8, 4, 4), (1.0, 0.5, 0.0)


def run(dit, context, frames=9, batch=1, **options):
    defaults = {"latent_shape": (batch, 16, frames, *SIZE), "frames_per_chunk": 3, "sigmas": SIGMAS}
    return roll(dit, **{"context": context, **defaults, **options})


def test_few_step_sigmas_are_the_published_ones():
    assert few_step_sigmas() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    assert few_step_sigmas((1000, 500)) == pytest.approx([1, 5 / 6, 0])
    assert few_step_sigmas((1000, 750, 500, 250), shift=8.0) == pytest.approx([1, 0.96, 8 / 9, 8 / 11, 0])


def test_steps_follow_the_few_step_rule(dit, context):
    """x0 = x − σ·flow, then x = (1 − σ')·x0 + σ'·fresh noise: seen from outside, with a flow of our choosing."""
    seen = []

    def denoise(x, sigma, passes):
        seen.append((x.clone(), sigma, passes[0].commits))
        return 0.5 * x

    def noise(chunk, draw, shape):
        return torch.full(shape, float(10 * chunk + draw))

    chunks = list(run(dit, context, frames=6, denoise=denoise, noise=noise))
    assert [sigma for _, sigma, _ in seen] == [*SIGMAS[:4], 0.0, *SIGMAS[:4]]
    assert [clean for *_, clean in seen] == [False] * 4 + [True] + [False] * 4
    for chunk, offset in ((0, 0), (1, 5)):
        value = 10.0 * chunk
        for step in range(4):
            assert seen[offset + step][0].unique().item() == pytest.approx(value)
            value *= 0.5
            if step < 3:
                value = (1 - SIGMAS[step + 1]) * value + SIGMAS[step + 1] * (10 * chunk + step + 1)
        assert chunks[chunk].latents.unique().item() == pytest.approx(value)
    assert seen[4][0].unique().item() == pytest.approx(chunks[0].latents.unique().item())


def test_noise_depends_on_seed_chunk_and_draw_alone(dit, context):
    state = torch.get_rng_state()
    draw = seeded_noise(7)
    assert torch.equal(draw(1, 2, (4, 4)), seeded_noise(7)(1, 2, (4, 4)))
    others = [draw(1, 3, (4, 4)), draw(2, 2, (4, 4)), seeded_noise(8)(1, 2, (4, 4))]
    assert not any(torch.equal(draw(1, 2, (4, 4)), other) for other in others)
    longer, shorter = video(run(dit, context, seed=3)), video(run(dit, context, frames=6, seed=3))
    assert torch.equal(longer[:, :, :6], shorter)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("growth", [None, [0.0, 0.5, 0.6, 0.7]])
def test_ring_as_long_as_the_video_equals_the_full_cache(dit, context, growth):
    full = video(run(dit, context, growth=growth))
    for window in (9, 12):
        assert torch.equal(full, video(run(dit, context, growth=growth, window=window)))


def test_batch_items_equal_single_runs(dit):
    context = torch.randn(2, 7, TEXT)
    draws = seeded_noise(0)

    def noise_of(item):
        return lambda chunk, draw, shape: draws(chunk, draw, (2, *shape[1:]))[item]

    both = video(run(dit, context, batch=2, growth=[0.0, 0.6, 0.7]))
    for item in range(2):
        single = video(
            run(dit, context[item : item + 1], growth=[0.0, 0.6, 0.7], noise=lambda *a, i=item: noise_of(i)(*a)[None])
        )
        torch.testing.assert_close(both[item : item + 1], single, rtol=0, atol=2e-4)


def caches():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is KVCache and thing.storage.device_bytes]


def test_memory_starts_with_iteration_and_ends_with_it(dit, context):
    generator = run(dit, context)
    assert not caches()
    next(generator)
    assert len(caches()) == 1
    generator.close()
    assert not caches()
    list(run(dit, context))
    assert not caches()
    abandoned = run(dit, context)
    chunk = next(abandoned)
    del abandoned
    assert not caches()
    assert torch.isfinite(chunk.latents).all()


def test_an_error_keeps_finished_chunks_and_frees_the_cache(dit, context):
    def on_step(event):
        if event.chunk == 1 and event.step == 2:
            raise RuntimeError("out of memory")

    finished = []
    error = None
    try:
        for chunk in run(dit, context, on_step=on_step):
            finished.append(chunk)
    except RuntimeError as caught:
        error = caught  # still holds the traceback, as a host's logger may
    assert str(error) == "out of memory"
    assert len(finished) == 1
    assert not caches()


def test_steps_are_reported_with_chunk_and_density(dit, context):
    events = []
    list(run(dit, context, growth=[0.0, 0.5, 0.75], on_step=events.append))
    assert {(e.chunks, e.steps) for e in events} == {(3, 4)}
    assert [events[4 * c].density for c in range(3)] == [1.0, 0.5, 2 / 9]  # of 6 and 9 one-block frames


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "five positive"),
        ({"frames_per_chunk": 0}, "frames_per_chunk 0"),
        ({"sigmas": [1.0, 0.5]}, r"sigmas \[1\.0, 0\.5\] does not fall"),
        ({"sigmas": [0.5, 0.7, 0.0]}, "does not fall"),
        ({"sigmas": [1.5, 0.0]}, r"starts at 1\.5"),
        ({"growth": [0.0, 1.0]}, r"growth 1\.0 of chunk 1 is outside"),
        ({"growth": []}, "at least one"),
        ({"sink_frames": -1}, "sink_frames -1"),
        ({"sink_rope": "sideways"}, "sink_rope 'sideways'.*fixed, follow"),
        ({"replay": "some"}, "replay 'some'.*all, window"),
        ({"context": torch.zeros(1, 7, 64)}, "64 wide and the model takes 32"),
        ({"context": torch.full((1, 7, TEXT), torch.nan)}, "NaN"),
        ({"latent_shape": (1, 16, 3, 9, 8)}, "height 72 is not a multiple of 16; use 64 or 80"),
        ({"latent_shape": (1, 16, 9, 8)}, r"\(1, 16, 9, 8\) is not five positive"),
        ({"latent_shape": (1, 4, 9, 8, 8)}, "4 channels; the model takes 16"),
        ({"window": 4, "sink_frames": 2}, "use at least 5"),
        ({"context_noise": -1.0}, r"context_noise -1\.0"),
        ({"cfg": 2.0}, "cfg 2 needs a negative prompt"),
        ({"initial_latents": torch.zeros(1, 16, 9, 8, 8)}, "already fills 9 of the video's 9"),
        ({"initial_latents": torch.zeros(1, 16, 3, 8, 6)}, "48×64 and the video 64×64"),
        ({"initial_latents": torch.full((1, 16, 3, 8, 8), torch.nan)}, "NaN"),
        ({"initial_latents": torch.zeros(3, 16, 3, 8, 8)}, "a batch of 3 and the video one of 1; use a batch of 1"),
    ],
)
def test_bad_requests_fail_before_anything_runs(dit, context, options, message):
    with pytest.raises(ValueError, match=message):
        run(dit, **{"context": context, **options})


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_run_stops_at_the_first_chunk_that_is_not_finite(dit, context, bad):
    made = []

    def denoise(x, sigma, passes):
        return torch.full_like(x, bad) if made else x

    chunks = run(dit, context, denoise=denoise)
    made.append(next(chunks))
    with pytest.raises(NotFinite, match=r"chunk 1 .* NaN or infinity; the model computes in torch\.float32; .* LoRA"):
        next(chunks)
    with pytest.raises(ValueError, match="finished holds NaN or infinity; start a new video"):
        run(dit, context, finished=[torch.full((1, 16, 3, *SIZE), bad)])


def test_noise_of_another_shape_is_named(dit, context):
    with pytest.raises(ValueError, match=r"noise \(0, 0, …\) has shape \[2, 2\]"):
        list(run(dit, context, noise=lambda *_: torch.zeros(2, 2)))


def test_the_clean_pass_runs_at_the_context_noise(dit, context):
    levels = []

    def denoise(x, sigma, passes):
        levels.extend([sigma] * passes[0].commits)
        return x

    list(run(dit, context, denoise=denoise, context_noise=50.0))
    assert levels == [0.05, 0.05]


def test_a_refusal_carries_field_problem_and_remedy():
    with pytest.raises(Refusal) as caught:
        recipe_of(latent_shape=SHAPE, frames_per_chunk=3, sigmas=STEPS, context=text(1), window=4, sink_frames=2)
    refusal = caught.value
    assert (refusal.field, refusal.remedy) == ("window", "use at least 5 latent frames")
    assert str(refusal.named("the schedule's window")) == f"the schedule's window {refusal.problem}; {refusal.remedy}"


def test_a_recipe_does_not_follow_a_list_that_is_changed_later():
    sigmas, growth = list(STEPS), [0.0, 0.5]
    recipe = recipe_of(latent_shape=list(SHAPE), frames_per_chunk=3, sigmas=sigmas, context=text(1), growth=growth)
    sigmas[0], growth[1] = 7.0, 7.0
    assert (recipe.sigmas, recipe.growth, recipe.latent_shape) == (STEPS, (0.0, 0.5), SHAPE)
    assert [recipe.sparsity(index) for index in range(4)] == [0.0, 0.5, 0.5, 0.5]


def test_finished_chunks_are_not_made_again_as_chunks_or_as_latents(dit):
    recipe = recipe_of(latent_shape=SHAPE, frames_per_chunk=3, sigmas=STEPS, context=text(1), growth=[0.0, 0.5])
    whole = list(rollout(dit, recipe))
    for finished in (whole[:2], [chunk.latents for chunk in whole[:2]]):
        (last,) = rollout(dit, recipe, finished=finished)
        assert (last.index, last.start_frame) == (2, 6)
        assert torch.equal(last.latents, whole[2].latents)
