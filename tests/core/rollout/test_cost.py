"""FLOPs of a schedule against dense attention, as published for one clip and as runs of any length read blocks."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout.cost import (
    ChunkCost,
    clip_flops,
    flops_ratio,
    model_ratio,
    recipe_costs,
    schedule_costs,
)
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Recipe
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.runtime import Runtime
from lightforcing.lightforcing_core.rollout.schedule import Schedule


def test_dense_clip_costs_what_is_published():
    costs = schedule_costs([0.0] * 7, [3] * 7, None)
    assert clip_flops(costs, tokens_per_frame=1536) == pytest.approx((548e12, 403e12), rel=2e-3)
    assert flops_ratio(costs) == model_ratio(costs) == 1.0


def test_chunks_count_by_their_queries_and_visible_keys_and_linears_cost_the_same():
    sparsities, lengths = [0.0, 0.5, 0.75], [1, 3, 3]
    costs, dense = (schedule_costs(shares, lengths, 4) for shares in (sparsities, [0.0] * 3))
    assert costs == [ChunkCost(1, 1, 1.0), ChunkCost(3, 4, 0.5), ChunkCost(3, 4, 0.25)]
    assert flops_ratio(costs) == pytest.approx((1 + 12 * 0.5 + 12 * 0.25) / 25)
    assert model_ratio(costs) == pytest.approx(sum(clip_flops(costs)) / sum(clip_flops(dense)))
    whole = schedule_costs([0.0] * 3, lengths, None)
    assert clip_flops(dense)[0] / clip_flops(whole)[0] == pytest.approx(25 / (1 + 12 + 21))


@pytest.fixture(scope="module")
def small():
    return wan_from_state_dict(random_state_dict(dim=128, ffn_dim=128, layers=1, text_dim=32))


def recorded(dit, recipe, *, runs=False):
    """The record of a run by the plans that it makes, or if the model `runs`, by the blocks that it reads."""
    recorder = RunRecorder(reads_blocks=runs)
    runtime = Runtime(recorder=recorder, denoise=None if runs else lambda x, sigma, passes: x)
    for _ in rollout(dit, recipe, runtime):
        pass
    return recorder.finish()


def recipe_of(schedule, given=0, *, size=(10, 16), block=16, **attention):
    """A recipe for frames of 40 tokens in three key blocks, the last one ragged, if nothing else is asked for."""
    shape, start = (1, 16, schedule.latent_frames, *size), torch.zeros(1, 16, given, *size) if given else None
    options = AttentionOptions(backend="reference", block=(block, block), **attention)
    text, arguments = torch.zeros(1, 1, 32), schedule.arguments(given)
    return Recipe(shape, sigmas=(1.0, 0.0), context=text, attention=options, initial_latents=start, **arguments)


def mean_sparsity(costs):
    """Weighted by key frames, as for a target."""
    weights = [cost.kv_frames for cost in costs]
    return sum((1 - cost.density) * weight for cost, weight in zip(costs, weights, strict=True)) / sum(weights)


@st.composite
def recipes(draw):
    per_chunk, frames = draw(st.integers(1, 8)), draw(st.integers(3, 201))
    target = draw(st.floats(0.3, 0.9))
    sinks = draw(st.integers(0, 3))
    window = draw(st.none() | st.integers(sinks + per_chunk, 24))
    budget = {"keep_frames": draw(st.integers(2, 8)), "sink_frames": 1, "near_frames": draw(st.integers(0, 1))}
    schedule = Schedule(
        frames,
        per_chunk,
        window,
        sinks,
        target=target,
        base=draw(st.floats(target, 1.0)),
        dense_chunks=draw(st.integers(0, 2)),
        reference=draw(st.sampled_from([None, 21, 63])),
    )
    policy = draw(st.sampled_from(["light_forcing", "light_forcing", "topk", "window", "svg1"]))
    return recipe_of(schedule, draw(st.integers(0, 2)), policy=policy, **budget)


@settings(max_examples=100)
@given(recipes())
@example(recipe_of(Schedule(121, target=0.6, base=0.7)))
@example(recipe_of(Schedule(61, 1, target=0.6, base=0.7)))
def test_plans_read_what_is_stated_at_any_length(small, recipe):
    record = recorded(small, recipe)
    measured = flops_ratio(chunk.cost for chunk in record.chunks)
    assert flops_ratio(recipe_costs(recipe)) == pytest.approx(measured, abs=1e-3)
    if recipe.attention.policy in ("window", "svg1"):  # whole frames, and as much as it reads at any sparsity
        return
    lengths = recipe.chunk_lengths()
    growth = [recipe.sparsity(index) for index in range(len(lengths))]
    drawn = schedule_costs(growth, lengths, recipe.window, blocks_per_frame=3)[recipe.first_index :]
    assert flops_ratio(drawn) == pytest.approx(measured, abs=1e-3)
    asked = schedule_costs(growth, lengths, recipe.window)[recipe.first_index :]
    for chunk, wanted in zip(record.chunks, asked, strict=True):
        blocks = 3 * len(chunk.visible)
        assert wanted.density - 1 / blocks - 1e-9 < chunk.density <= max(wanted.density, 1 / blocks) + 1e-9


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of(Schedule(12, target=0.6, base=0.7), keep_frames=2, sink_frames=1, near_frames=1),
        recipe_of(Schedule(15, 3, 9, 1, target=0.5, base=0.8), 1, policy="topk"),
        recipe_of(Schedule(8, 1, target=0.7, base=0.7, dense_chunks=2), keep_frames=3),
        recipe_of(Schedule(12, target=0.6, base=0.7), policy="radial"),
    ],
)
def test_a_model_reads_the_blocks_that_are_stated(small, recipe):
    costs = []
    for chunk in recorded(small, recipe, runs=True).chunks:
        density, blocks = 1.0, chunk.block_map
        if chunk.why_dense is None:
            density = blocks.sum().item() / (chunk.query_blocks * blocks.numel())
        costs.append(ChunkCost(chunk.frames, len(chunk.visible), density))
    assert min(cost.density for cost in costs) < 0.6
    assert flops_ratio(recipe_costs(recipe)) == pytest.approx(flops_ratio(costs), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("given", [0, 1, 4])
def test_a_longer_video_starts_the_same(family, given):
    reference = family.sparse.reference
    growths = []
    for frames in (9, reference, reference + 2, 121):
        schedule = Schedule.of_family(family, frames)
        recipe = recipe_of(schedule, given)
        growths.append([recipe.sparsity(index) for index in range(121)])
        assert growths[0] == growths[-1]
        assert schedule.sparsities(given) == growths[0][: len(recipe.chunk_lengths())]
    whole = Schedule.of_family(family, reference)
    costs = schedule_costs(whole.sparsities(), whole.chunk_lengths(), whole.window)
    assert mean_sparsity(costs[1:]) == pytest.approx(family.target)


def test_dense_chunks_count_from_the_one_after_the_image():
    short = Schedule.of_family(FAMILIES["light_forcing_short"], 22)
    published = Schedule.of_family(FAMILIES["light_forcing_short"], 21).sparsities()
    assert short.sparsities(1) == [0.0, *published]
    assert short.sparsities(2) == [0.0, *published]
    assert short.sparsities(3) == [*published, published[-1]], "whole chunks continue a run"
    assert short.sparsities(4) == [0.0, *published], "one that began with an image, too"
    single = Schedule.of_family(FAMILIES["causal_forcing_framewise"], 21)
    assert single.sparsities(1) == [0.0, 0.0, *single.sparsities()[2:]]
    custom = Schedule(22, target=0.6, base=0.7, dense_chunks=2)
    values = custom.sparsities(1)
    assert values[:3] == [0.0] * 3
    assert mean_sparsity(schedule_costs(values, custom.chunk_lengths(1), None)[3:]) == pytest.approx(0.6)
