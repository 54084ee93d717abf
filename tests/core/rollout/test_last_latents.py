"""A video that ends with given latents: with exactly those, its last chunk leads to them, the rest is as ever."""

import pytest
import torch

from lightforcing.lightforcing_core.demo.captions import context_of_caption
from lightforcing.lightforcing_core.demo.model import SHIPPED, load_demo_model
from lightforcing.lightforcing_core.model import causal as causal_wan
from lightforcing.lightforcing_core.model.causal import GIVEN_NOISE
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas, seeded_noise
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import FINE, roll, text, video

SIZE = (4, 6)
SIGMAS = few_step_sigmas((1000, 750, 500))


def latents(frames, batch=1, seed=4):
    return torch.randn(batch, 16, frames, *SIZE, generator=torch.Generator().manual_seed(seed))


def run(dit, frames=9, batch=1, context=None, **options):
    arguments = {"frames_per_chunk": 3, "sigmas": SIGMAS, "attention": FINE, **options}
    return roll(dit, text(1) if context is None else context, latent_shape=(batch, 16, frames, *SIZE), **arguments)


CASES = {
    "dense": {},
    "sparse": {"growth": [0.0, 0.5, 0.6]},
    "a window with sinks": {"window": 5, "sink_frames": 1, "sink_rope": "follow"},
    "guided": {"cfg": 3.0, "negative": text(2)},
    "other steps for the first chunk": {"first_sigmas": few_step_sigmas()},
    "context noise": {"context_noise": 125.0},
    "a prompt that changes hard at the last chunk": {"context": [Prompt(text(1)), Prompt(text(2), 2, "hard")]},
    "two videos": {"batch": 2},
    "two frames for each video of a batch": {"batch": 2, "last_latents": latents(2, batch=2)},
    "a short last chunk": {"frames": 8},
    "a start image": {"frames": 7, "initial_latents": latents(1, seed=8)},
    "all but the last chunk given": {"initial_latents": latents(6, seed=8)},
    "a single chunk": {"frames": 3, "first_sigmas": few_step_sigmas()},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_video_ends_with_what_was_given_and_only_its_last_chunk_changes(dit, case):
    case = {"last_latents": latents(1), **case}
    given = case["last_latents"]
    plain, ended = list(run(dit, **case | {"last_latents": None})), list(run(dit, **case))
    assert [chunk.start_frame for chunk in ended] == [chunk.start_frame for chunk in plain]
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(plain[:-1], ended[:-1], strict=True))
    last, end = ended[-1].latents, given.shape[2]
    assert torch.equal(last[:, :, -end:], given.expand(last.shape[0], -1, -1, -1, -1))
    assert not torch.allclose(last[:, :, :-end], plain[-1].latents[:, :, :-end], atol=1e-2)


def test_given_frames_are_seen_with_less_noise_than_the_others(dit):
    """From outside, with noise and predictions of our choosing: what the model is shown, and the time it is told."""
    shown, told = [], []

    def denoise(x, sigma, passes):
        if passes[0].state.chunk.start_frame == 6 and not passes[0].commits:
            shown.append((sigma, x[:, :, -1:].clone()))
        passes[0](dit, x, torch.full((1,), sigma * 1000.0))
        return 0.5 * x

    sinusoid = causal_wan._sinusoid
    given, draws = latents(1), seeded_noise(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_wan, "_sinusoid", lambda dim, position: told.append(position) or sinusoid(dim, position))
        list(run(dit, denoise=denoise, noise=draws, last_latents=given))
    assert [sigma for sigma, _ in shown] == SIGMAS[:-1]
    for step, (sigma, x) in enumerate(shown):
        noise, less = draws(2, step, (1, 16, 3, *SIZE))[:, :, -1:], GIVEN_NOISE * sigma
        torch.testing.assert_close(x, (1 - less) * given + less * noise)
    assert [len(times) for times in told] == [1] * 8 + [3] * 3  # two chunks with their clean passes, then the last
    for sigma, times in zip(SIGMAS, told[8:], strict=False):
        torch.testing.assert_close(times, 1000 * sigma * torch.tensor([1.0, 1.0, GIVEN_NOISE]))


def test_every_step_that_is_told_ends_with_what_was_given(dit):
    events, given = [], latents(1)
    list(run(dit, on_step=events.append, last_latents=given))
    assert [event.index for event in events] == [0] * 3 + [1] * 3 + [2] * 3
    assert [torch.equal(event.x0[:, :, -1:], given) for event in events] == [False] * 6 + [True] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_latents": latents(3)}, "3 latent frames, and a chunk of 3 can end with at most 2; give one image"),
        ({"last_latents": latents(1), "frames_per_chunk": 1}, "frame-wise model.*use a chunk-wise checkpoint"),
        (
            {"last_latents": latents(1), "frames": 7},
            "of 25 frames ends with a chunk of 1; make the video 33 frames long .9 latent.",
        ),
        (
            {"last_latents": latents(2), "frames": 3, "initial_latents": latents(1)},
            "make the video 13 frames long .4 latent.",
        ),
        ({"last_latents": latents(0)}, r"last_latents has shape \[1, 16, 0, 4, 6\]"),
        (
            {"last_latents": latents(1)[..., :4]},
            "last_latents is 32×32 and the video 48×32; resize",
        ),
        (
            {"last_latents": latents(1, batch=3), "batch": 2},
            "a batch of 3 and the video one of 2; use a batch of 1 or 2",
        ),
        ({"last_latents": torch.full((1, 16, 1, *SIZE), torch.nan)}, "last_latents holds NaN"),
    ],
)
def test_bad_requests_fail_before_anything_runs(dit, options, message):
    with pytest.raises(ValueError, match=message):
        run(dit, **options)


@torch.no_grad()
def test_the_last_chunk_leads_to_the_given_frame():
    """With the model that comes along: the end of a video that it has made itself draws other noise toward it."""
    model = load_demo_model(SHIPPED)
    captions = [
        f"on a plain background a {thing}"
        for thing in ("red circle moves right slowly", "blue square moves down slowly")
    ]
    context = torch.cat([context_of_caption(model.table, caption) for caption in captions])
    sizes = {"frames_per_chunk": 3, "sigmas": few_step_sigmas(), "attention": FINE}
    shape = (2, 16, 9, model.video.height // 8, model.video.width // 8)

    def made(seed, **options):
        return video(roll(model.dit, context, latent_shape=shape, seed=seed, **sizes, **options))

    truth = made(0)
    far = {}
    for name, options in {"without": {}, "with": {"last_latents": truth[:, :, -1:]}}.items():
        ends = [made(seed, initial_latents=truth[:, :, :6], **options) for seed in range(1, 5)]
        far[name] = sum(float((end[:, :, :2] - truth[:, :, 6:8]).square().mean()) for end in ends)
    assert far["with"] < 0.95 * far["without"]
