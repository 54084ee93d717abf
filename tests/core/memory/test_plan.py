"""Which choices are made when a run does not fit, and that they are what it takes."""

import functools
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from laboratory.memory import MemoryCase
from lightforcing.benchmarks.settings import Picture
from lightforcing.lightforcing_core.memory.estimate import ModelSize, estimate, meta_wan
from lightforcing.lightforcing_core.memory.plan import HEADROOM, plan_memory
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout.schedule import Schedule

WAN = ModelSize.of_module(meta_wan(1536, 8960, 30, 4096, torch.bfloat16))


@functools.cache
def estimate_of(kv, tiles):
    """The 1.3B model, 81 frames at 480×832, decoded by the full VAE."""
    case = MemoryCase("", Schedule(21, target=0.6, base=0.7), Picture(480, 832))
    return estimate(WAN, case.recipe(case.schedule, torch.bfloat16, "meta"), kv=kv, vae_dim=96, decode_tiles=tiles)


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
        fits.append(plan_memory(estimate_of, int(share * needed), ladder=[KVOptions()]).fits)
    assert fits == [False, False, True]
    assert re.match(r"needs about [\d.]+ GiB \(weights 2\.\d+, KV cache 5\.\d+, .*\), 80\.00 GiB free$", str(plan))


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


def test_eight_bits_and_host_memory_save_what_they_promise():
    full, small, far = (estimate_of(kv, 1) for kv in (KVOptions(), KVOptions("int8"), KVOptions("int8", host=True)))
    assert small.cache < 0.54 * full.cache
    assert far.cache < 0.1 * small.cache
    assert far.host == pytest.approx(small.cache - (far.cache - 2 * far.host / 30), rel=0.01)


def test_what_only_saves_time_is_given_up_first():
    plain = estimate_of(KVOptions(), 1)
    beside = plain.total + min(plain.step, plain.decode)
    both = beside + plain.step
    made = [
        plan_memory(estimate_of, int(room * (1 + HEADROOM)) + 1, most_tiles=3, overlap=True, cuda_graph=True)
        for room in (both, both - 2, beside - 2, plain.total - 2)
    ]
    graph, overlap = "no CUDA graphs", "decode between the chunks"
    assert [plan.given_up for plan in made] == [
        [],
        [graph],
        [graph, overlap],
        [graph, overlap, "decode in 2×2 tiles"],
    ]
    assert [(plan.overlap, plan.cuda_graph) for plan in made] == [(True, True), (True, False), *[(False, False)] * 2]
    assert all(plan.fits for plan in made)
    assert [plan.needed for plan in made[:3]] == [both, beside, plain.total]
    in_host_memory = plan_memory(estimate_of, 80 << 30, ladder=[KVOptions(host=True)], cuda_graph=True)
    assert in_host_memory.estimate.graph == 0


def test_a_chosen_cache_is_kept_and_nothing_is_given_up_that_was_not_asked_for():
    for kv in (KVOptions(), KVOptions("fp8"), KVOptions(host=True)):
        made = plans(ladder=[kv], latents=0)
        assert {plan.kv for plan in made} == {kv}
        assert not any("graph" in word or "between" in word for plan in made for word in plan.given_up)
        assert all(plan.latents_on_device for plan in made)  # there are none to move


def test_what_cannot_fit_says_by_how_much():
    plan = plan_memory(estimate_of, 2 << 30, most_tiles=3)
    assert not plan.fits
    assert all(words in str(plan) for words in ("tiles", "8-bit KV cache (int8", " (without: "))
    found = re.search(r"; ([\d.]+) GiB too little, .* lower the size or the window$", str(plan))
    assert float(found[1]) == pytest.approx((plan.needed * (1 + HEADROOM) - (2 << 30)) / 2**30, abs=0.01)


def test_estimate_of_an_eight_bit_cache_in_another_dtype_follows_the_formula():
    recipe = MemoryCase("", Schedule(6), Picture(256, 256)).recipe(Schedule(6), torch.bfloat16, "meta")
    small = estimate(WAN, recipe, kv=KVOptions("fp8"), dtype=torch.float32)
    again = estimate(WAN, recipe, kv=KVOptions("fp8"))
    assert small.cache == again.cache == 2 * 30 * 6 * 12 * (256 * 128 + 4 * 4)


def test_a_choice_that_saves_nothing_is_left_out():
    """Decoding is not what takes most here, so tiles would only cost time."""
    small = replace(estimate_of(KVOptions(), 1), decode=1)
    plan = plan_memory(lambda kv, tiles: small, small.total, most_tiles=4)
    assert not plan.fits
    assert plan.given_up == []
