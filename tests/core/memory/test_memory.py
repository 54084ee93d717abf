"""The memory estimate against exact counts, and which choices are made when a run does not fit, and their effect."""

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from laboratory.memory import MemoryCase, estimated, measured_peak
from lightforcing.benchmarks.settings import Model, Picture
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.checkpoint.load import WanSize
from lightforcing.lightforcing_core.memory.estimate import (
    AllocationPeak,
    MemoryEstimate,
    decode_bytes,
    estimate,
    meta_wan,
    size_of,
)
from lightforcing.lightforcing_core.memory.plan import HEADROOM, plan_memory
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout.recipe import Guidance, Recipe, few_step_sigmas
from lightforcing.lightforcing_core.rollout.schedule import Schedule

TINY = size_of(meta_wan(256, 512, 3, 64, torch.bfloat16))
WAN = size_of(meta_wan(1536, 8960, 30, 4096, torch.bfloat16))
SPARSE = {"target": 0.5, "base": 0.7}
WINDOW = Schedule(9, window=6, sink_frames=1, sink_rope="follow", **SPARSE)


def tiny(schedule=None, *, cfg=1.0, size=(8, 12), **options):
    """The estimate for 64×96 pixels; recipes on the meta device are enough."""
    schedule, text = schedule or Schedule(12), torch.empty(1, 512, 64, device="meta")
    recipe = Recipe(
        latent_shape=(1, 16, schedule.latent_frames, *size),
        sigmas=few_step_sigmas(),
        context=text,
        guidance=Guidance(cfg, text),
        **schedule.arguments(),
    )
    return estimate(TINY, recipe, weights=1, **options)


@pytest.mark.parametrize(
    "case",
    [
        MemoryCase("dense", Schedule(9), Picture(128, 192), Model(256, 1536, 3), text_dim=64),
        MemoryCase("window, sinks", WINDOW, Picture(64, 96), Model(256, 1536, 2)),
        MemoryCase("ragged frames", Schedule(6, **SPARSE), Picture(80, 112), text_dim=64, backend="reference"),
        MemoryCase("decode", Schedule(6), Picture(64, 96), Model(128, 256, 1), text_dim=64, vae_dim=24),
        MemoryCase(
            "guided, batch 2", Schedule(6, **SPARSE), Picture(64, 96), Model(256, 1536, 2), 512, 64, batch=2, cfg=2.0
        ),
    ],
    ids=lambda case: case.name,
)
def test_estimate_is_within_ten_percent_of_what_the_allocator_held(case):
    place = torch.device("cpu"), torch.bfloat16
    expected, _ = estimated(case, *place)
    assert expected.total == pytest.approx(measured_peak(case, *place), rel=0.10)


def test_cache_is_the_stated_formula_plus_pooled_keys_and_sink_originals_of_a_window_that_moves():
    dense, sparse = tiny(), tiny(Schedule(12, **SPARSE))
    keys_and_values = 2 * 3 * 12 * 24 * 2 * 128 * 2  # layers, frames, tokens, heads, head dim, bytes
    assert dense.cache == keys_and_values
    assert sparse.cache == keys_and_values + 3 * 12 * (1 + 1) * 2 * 128 * 2  # a block mean and a frame mean per frame
    window = {"window": 6, "sink_frames": 2}
    fixed, follow = (tiny(Schedule(12, sink_rope=rope, **window)) for rope in ("fixed", "follow"))
    assert follow.cache - fixed.cache == 3 * 2 * 24 * 2 * 128 * 2
    assert tiny(Schedule(6, sink_rope="follow", **window)).cache == tiny(Schedule(6)).cache  # nothing is evicted


@pytest.mark.parametrize(("policy", "kept"), [("rolling_sink", 18), ("echo_forcing", 12 + 21)])
def test_frames_that_come_back_are_kept_once_more_on_the_device_or_in_cpu_memory(policy, kept):
    shape, text = (1, 16, 60, 60, 104), torch.empty(1, 512, 4096, device="meta")
    recipe = Recipe(shape, 3, few_step_sigmas(), text, attention=AttentionOptions(policy=policy))
    near, far = (estimate(WAN, recipe, weights=1, kv=KVOptions(host=host)) for host in (False, True))
    slot = 287_539_200  # bytes of a latent frame's keys and values
    assert near.cache == (21 + kept) * slot
    assert (far.cache, far.host) == (21 * slot * 2 // 30, (21 + kept) * slot)


def test_persistent_blocks_take_the_memory_of_their_frames_with_means():
    shape, text = (1, 16, 21, 64, 96), torch.empty(1, 512, 4096, device="meta")
    pool, none = (
        estimate(WAN, Recipe(shape, 3, [1, 0], text, (0.5,), 9, attention=AttentionOptions(policy=policy)), weights=1)
        for policy in ("pbsa", "topk")
    )
    rows = 2 * 1536 + 24 + 1  # keys, values, means of 24 blocks and of a frame
    assert pool.cache - none.cache == 3 * rows * 1536 * 30 * 2
    assert pool.step == none.step


def test_chunks_denoised_at_once_need_one_more_layer_and_the_activations_of_all():
    shape, text = (1, 16, 60, 60, 104), torch.empty(1, 512, 4096, device="meta")
    steps, sinks = few_step_sigmas((1000, 800, 600, 400, 200)), {"sink_frames": 3, "sink_rope": "follow"}
    plain, joint = (
        Recipe(shape, 3, steps, text, window=21, attention=AttentionOptions(policy=policy), **sinks)
        for policy in ("dense", "rolling_forcing")
    )
    plain, near = (estimate(WAN, recipe, weights=1) for recipe in (plain, joint))
    slot = 287_539_200  # bytes of a latent frame's keys and values
    assert near.cache == (21 + 3) * slot + 21 * slot // 30
    assert 4.5 * plain.step < near.step < 5.5 * plain.step
    far = estimate(WAN, joint, weights=1, kv=KVOptions("int8", host=True))
    assert far.host < near.cache < far.host * 2


def test_guidance_keeps_a_second_cache_and_prompt_and_length_costs_nothing_once_the_window_is_full():
    long, longer = (tiny(Schedule(frames, window=6, sink_frames=1)) for frames in (12, 1200))
    assert long == longer
    plain, guided = tiny(), tiny(cfg=2.0)
    assert (guided.cache, guided.prompt) == (2 * plain.cache, 2 * plain.prompt)
    assert (guided.step, guided.weights) == (plain.step, plain.weights)


def test_ranks_share_the_cache_by_heads_and_the_step_by_tokens():
    recipe = Recipe((1, 16, 21, 60, 104), 3, few_step_sigmas(), torch.empty(1, 512, 4096, device="meta"))
    one, *more = (estimate(WAN, recipe, weights=1, ranks=ranks) for ranks in (1, 2, 4, 8))
    assert [round(12 * each.cache / one.cache) for each in more] == [6, 3, 2]  # of 12 heads
    assert [each.weights for each in more] == [1, 1, 1]
    for ranks, each in zip((2, 4, 8), more, strict=True):
        assert one.step / ranks < each.step < 1.8 * one.step / ranks


def test_sizes_are_those_of_the_module():
    assert WanSize(1536, 8960, 30, 4096, 1_418_996_800) == WAN  # the published 1.3B


def test_step_and_decode_are_held_by_turns():
    parts = {"weights": 1, "cache": 20, "prompt": 300, "step": 4000, "vae": 50000, "history": 600000}
    assert MemoryEstimate(**parts, decode=1000).total == 654321
    assert MemoryEstimate(**parts, decode=7000).total == 657321
    assert MemoryEstimate(**parts, decode=1000, overlapped=True).total == 655321
    assert MemoryEstimate(**parts, decode=1000, graph=4000).total == 658321


def test_peak_counts_what_is_alive_and_no_views():
    with AllocationPeak() as peak:
        first = torch.zeros(1000)
        first.view(10, 100).add_(1)
        assert peak.peak == 4000
        second = first + 1
        del first
        third = second + 1
        assert peak.peak == 8000
        del second, third
        peak.reset()
        assert peak.peak == 0
        torch.ones(500).sum()
        assert peak.peak == 2004


@functools.cache
def estimate_of(kv, tiles):
    """The 1.3B model, 81 frames at 480×832, decoded by the full VAE."""
    case = MemoryCase("", Schedule(21, target=0.6, base=0.7), Picture(480, 832))
    recipe = case.recipe(case.schedule, torch.bfloat16, "meta")
    decoding = decode_bytes((1, 16, 3, *recipe.latent_shape[3:]), 96, torch.bfloat16, tiles)
    return replace(estimate(WAN, recipe, weights=2 * WAN.parameters, kv=kv), **decoding)


def plans(*, most_tiles=3, latents=200 << 20, **options):
    """The plan for less and less memory."""
    return [
        plan_memory(estimate_of, free << 28, most_tiles=most_tiles, latents=latents, **options)
        for free in range(96, 4, -6)
    ]


def test_a_run_that_fits_with_some_memory_left_gives_nothing_up():
    plan = plan_memory(estimate_of, 80 << 30, most_tiles=3)
    assert (plan.fits, plan.given_up) == (True, [])
    needed, fits = plan.needed, []
    for share in (1, 1.05, 1.1):
        fits.append(not plan_memory(estimate_of, int(share * needed), ladder=[KVOptions()]).given_up)
    assert fits == [False, False, True]


def test_less_memory_never_gives_up_less_and_every_choice_is_needed_and_enough():
    made = plans()
    for more, less in pairwise(made):
        assert len(less.given_up) >= len(more.given_up)
        assert less.needed <= more.needed
    kinds = {tuple(word.split(" in ")[0].split(" (")[0] for word in plan.given_up) for plan in made}
    assert len(kinds) >= 4  # tiles, then eight bits, then latents, on the way down
    for plan in made:
        if not plan.fits:
            continue
        assert plan.needed * (1 + HEADROOM) <= plan.free
        if plan.decode_tiles > 1 and plan.kv == KVOptions() and plan.latents_on_device:
            fewer = estimate_of(KVOptions(), plan.decode_tiles - 1).total + plan.latents
            assert fewer * (1 + HEADROOM) > plan.free
        if plan.kv == KVOptions("int8", host=True):
            assert (estimate_of(KVOptions("int8"), plan.decode_tiles).total + plan.latents) * (1 + HEADROOM) > plan.free


def test_what_only_saves_time_is_given_up_first():
    at_once, plain = (estimate_of(KVOptions(), tiles) for tiles in (0, 1))
    most = at_once.sped_up(overlap=True, cuda_graph=True).total
    beside = plain.total + min(plain.step, plain.decode)
    both = beside + plain.step + plain.decode
    made = [
        plan_memory(estimate_of, int(room * (1 + HEADROOM)) + 1, most_tiles=3, overlap=True, cuda_graph=True)
        for room in (most, most - 2, both - 2, beside - 2, plain.total - 2)
    ]
    graph, overlap, one = "no CUDA graphs", "decode between the chunks", "decode frame by frame"
    assert [plan.given_up for plan in made] == [
        [],
        [one],
        [graph, one],
        [graph, overlap, one],
        [graph, overlap, "decode in 2×2 tiles"],
    ]
    speeds = [(plan.overlap, plan.cuda_graph) for plan in made]
    assert speeds == [*[(True, True)] * 2, (True, False), *[(False, False)] * 2]
    assert all(plan.fits for plan in made)
    assert [plan.needed for plan in made[:4]] == [most, both, beside, plain.total]


def test_a_chosen_cache_is_kept_and_nothing_is_given_up_that_was_not_asked_for():
    for kv in (KVOptions(), KVOptions("fp8"), KVOptions(host=True)):
        made = plans(ladder=[kv], latents=0)
        assert {plan.kv for plan in made} == {kv}
        assert not any("graph" in word or "between" in word for plan in made for word in plan.given_up)
        assert all(plan.latents_on_device for plan in made)  # there are none to move


def test_an_8_bit_cache_follows_its_formula_in_any_dtype_and_leaves_two_layers_on_the_device():
    recipe = MemoryCase("", Schedule(6), Picture(256, 256)).recipe(Schedule(6), torch.bfloat16, "meta")
    means, layer = 30 * 12 * 128 * 4, 2 * 6 * 12 * (256 * 128 + 4 * 4)
    for dtype in (torch.float32, torch.bfloat16):
        near, far = (
            estimate(WAN, recipe, weights=1, kv=KVOptions("fp8", host=host), dtype=dtype) for host in (False, True)
        )
        assert (near.cache, near.host) == (means + 30 * layer, 0)
        assert (far.cache, far.host) == (means + 2 * layer, 30 * layer)


def test_a_choice_that_saves_nothing_is_left_out():
    """Decoding is not what takes most here, so tiles would only cost time."""
    small = replace(estimate_of(KVOptions(), 1), decode=1)
    plan = plan_memory(lambda kv, tiles: small, small.total, most_tiles=4)
    assert not plan.fits
    assert plan.given_up == []
