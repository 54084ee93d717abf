"""A recipe is checked once, when it is made, and a refusal carries what a front end needs to say it."""

import pytest
import torch

from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Guidance, Recipe

from ...support.rollouts import recipe_of

SHAPE, TEXT = (1, 16, 8, 4, 4), torch.ones(1, 5, 32)
SIGMAS = (1.0, 0.5, 0.0)


def test_a_refusal_carries_field_problem_and_remedy():
    with pytest.raises(Refusal) as caught:
        recipe_of(latent_shape=SHAPE, frames_per_chunk=3, sigmas=SIGMAS, context=TEXT, window=4, sink_frames=2)
    refusal = caught.value
    assert (refusal.field, refusal.remedy) == ("window", "use at least 5 latent frames")
    assert str(refusal) == f"window {refusal.problem}; {refusal.remedy}"
    assert str(refusal.named("the schedule's window")) == f"the schedule's window {refusal.problem}; {refusal.remedy}"


def test_a_recipe_does_not_follow_a_list_that_is_changed_later():
    sigmas, growth = list(SIGMAS), [0.0, 0.5]
    recipe = recipe_of(latent_shape=list(SHAPE), frames_per_chunk=3, sigmas=sigmas, context=TEXT, growth=growth)
    sigmas[0], growth[1] = 7.0, 7.0
    assert (recipe.sigmas, recipe.growth, recipe.latent_shape) == (SIGMAS, (0.0, 0.5), SHAPE)
    assert [recipe.sparsity(index) for index in range(4)] == [0.0, 0.5, 0.5, 0.5]


def test_tensors_without_data_are_enough_for_a_recipe():
    text = torch.empty(1, 5, 32, device="meta")
    recipe = Recipe(SHAPE, 3, SIGMAS, text, guidance=Guidance(2.0, text))
    assert len(recipe.guides) == 2


def test_finished_chunks_are_not_made_again_as_chunks_or_as_latents(dit):
    recipe = recipe_of(latent_shape=SHAPE, frames_per_chunk=3, sigmas=SIGMAS, context=TEXT, growth=[0.0, 0.5])
    whole = list(rollout(dit, recipe))
    for finished in (whole[:2], [chunk.latents for chunk in whole[:2]]):
        (last,) = rollout(dit, recipe, finished=finished)
        assert (last.index, last.start_frame) == (2, 6)
        assert torch.equal(last.latents, whole[2].latents)
