"""The memory estimate against exact counts, and what it must follow."""

import math

import pytest
import torch

from laboratory.memory import MemoryCase, estimated, measured_peak
from lightforcing.benchmarks.settings import Model, Picture
from lightforcing.lightforcing_core.memory.estimate import (
    AllocationPeak,
    MemoryEstimate,
    ModelSize,
    estimate,
    meta_wan,
)
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.recipe import Guidance, Recipe, few_step_sigmas
from lightforcing.lightforcing_core.rollout.schedule import Schedule

TINY = ModelSize.of_module(meta_wan(256, 512, 3, 64, torch.bfloat16))
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
    return estimate(TINY, recipe, **options)


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


def test_guidance_keeps_a_second_cache_and_prompt_and_length_costs_nothing_once_the_window_is_full():
    long, longer = (tiny(Schedule(frames, window=6, sink_frames=1)) for frames in (12, 1200))
    assert long == longer
    plain, guided = tiny(), tiny(cfg=2.0)
    assert (guided.cache, guided.prompt) == (2 * plain.cache, 2 * plain.prompt)
    assert (guided.step, guided.weights) == (plain.step, plain.weights)


def test_weights_are_those_of_the_module_and_a_real_model_is_known_from_its_widths_alone():
    dit = wan_from_state_dict(random_state_dict(dim=256, ffn_dim=512, layers=3, text_dim=64), dtype=torch.bfloat16)
    assert ModelSize.of_module(dit) == TINY
    assert TINY.weight_bytes == sum(tensor.nbytes for tensor in dit.state_dict().values())
    size = ModelSize.of_module(meta_wan(1536, 8960, 30, 4096, torch.bfloat16))
    case = MemoryCase("real", Schedule(21, target=0.88, base=0.98), Picture(480, 832))
    expected = estimate(size, case.recipe(case.schedule, torch.bfloat16, "meta"), vae_dim=24)
    assert size.weight_bytes == pytest.approx(2 * 1.419e9, rel=0.001)  # 1.3B's 1,418,996,800 parameters
    assert expected.cache == pytest.approx(21 * 287.5e6, rel=0.02)  # and the pooled keys
    assert expected.total < 10.5e9


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
        assert math.isclose(float(torch.ones(500).sum()), 500)
        assert peak.peak == 2004


def test_unknown_backend_is_refused():
    with pytest.raises(Refusal, match="backend 'magic' is not known; use one of 'triton'"):
        tiny(backend="magic")
