"""Every policy of the registry with every option: it runs, and a saved run continues bit for bit, or it is refused."""

from dataclasses import replace

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies import POLICIES
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.runtime import Runtime
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import recipe_of, roll, text, video

SIZE = 8, 12  # frames of 24 tokens: a whole key block and a ragged one
SINKS = {"sink_frames": 3, "window": 9}
# Fields of AttentionOptions, KVOptions, Recipe and its parts; "frames" and "batch" of the latents.
OPTIONS = {
    "ragged": {},
    "batch 2": {"batch": 2},
    "cfg": {"cfg": 2.0, "negative": text(2)},
    "int8": {"kv": KVOptions("int8")},
    "fp8 in CPU memory": {"kv": KVOptions("fp8", host=True)},
    "lse and tail": {"attention": {"estimator": "lse", "tail": True}},
    "tiles": {"attention": {"tiles": True}},
    "window": {"window": 9},
    "sinks": SINKS,
    "following sinks": SINKS | {"sink_rope": "follow"},
    "changing sinks": SINKS | {"sink_rope": "average"},
    "image": {"initial_latents": torch.zeros(1, 16, 1, *SIZE), "frames": 16},
    "given chunks": {"initial_latents": torch.ones(1, 16, 6, *SIZE)},
    "frame-wise": {"frames_per_chunk": 1, "frames": 7},
    "given end": {"last_latents": torch.zeros(1, 16, 1, *SIZE)},
    "hard switch": {"context": [Prompt(text(1)), Prompt(text(2), 3)]},
    "cut": {"context": [Prompt(text(1)), Prompt(text(2), 2, "cut", jump=8)]},
    "pinned cut": {"context": [Prompt(text(1)), Prompt(text(2), 2, "cut", pin=3)], "window": 9},
}
SETTINGS = {
    "mass with a test": (("similarity", 0.15),),
    "forcing_kv with chosen blocks": (("blocks", 0.5),),
}
REFUSED = {
    ("rolling_sink", "sinks"): "sink_frames 3 would stay visible",
    ("rolling_sink", "following sinks"): "sink_frames 3 would stay visible",
    ("rolling_sink", "changing sinks"): "sink_frames 3 would stay visible",
    ("rolling_sink", "cut"): "'cut' cannot end a scene that rolling_sink brings back",
    ("rolling_sink", "pinned cut"): "'cut' cannot end a scene that rolling_sink brings back",
    **{
        ("echo_forcing", name): "window 9 has no place for first frames"
        for name in OPTIONS
        if OPTIONS[name].get("window")
    },
    ("echo_forcing", "cut"): "'cut' cannot end a scene that echo_forcing brings back",
    ("echo_forcing", "hard switch"): "'hard' would read frames again whose tokens",
    ("echo_forcing", "frame-wise"): "frames_per_chunk 1 could show a token",
    ("echo_forcing", "tiles"): "tiles would mix the rows",
    ("pbsa", "cut"): "'cut' cannot end a scene that pbsa brings back",
    ("pbsa", "pinned cut"): "'cut' cannot end a scene that pbsa brings back",
    **{(policy, "changing sinks"): "'average' changes sinks" for policy in ("forcing_kv", "dummy_forcing")},
    **{(policy, "pinned cut"): "pin 3 would take the place" for policy in ("forcing_kv", "dummy_forcing")},
    ("rolling_forcing", "changing sinks"): "'average' changes sinks",
    ("rolling_forcing", "given end"): "last_latents cannot be met",
    **{("rolling_forcing", name): "context changes" for name in ("hard switch", "cut", "pinned cut")},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("policy", [*POLICIES, *SETTINGS])
def test_a_policy_runs_and_continues_with_an_option_or_is_refused(dit, tmp_path, policy, name):
    options = {"frames": 15, "frames_per_chunk": 3, "context": text(1), **OPTIONS[name]}
    attention = AttentionOptions(
        "reference", (16, 16), 3, 1, 1, policy=policy.split()[0], settings=SETTINGS.get(policy, ())
    )
    options["attention"] = replace(attention, **options.get("attention", {}))
    kv, shape = options.pop("kv", KVOptions()), (options.pop("batch", 1), 16, options.pop("frames"), *SIZE)
    options |= {"latent_shape": shape, "sigmas": (1.0, 0.5, 0.0), "growth": (0.0, 0.5)}
    if expected := REFUSED.get((policy.split()[0], name)):
        with pytest.raises(Refusal, match=expected):
            list(rollout(dit, recipe_of(**options), Runtime(kv=kv)))
        return
    state = RunState(recipe_of(**options), "tiny", kv.dtype)
    whole = list(rollout(dit, state.recipe, Runtime(kv=kv)))
    for done, chunk in enumerate(whole[:-1], start=1):
        state = state.extended_by(chunk)
        if done in (1, 3):
            loaded = load_run_state(save_run_state(state, tmp_path / "run.safetensors"))
            rest = rollout(dit, loaded.recipe, Runtime(kv=kv), loaded.finished, loaded.begun)
            assert torch.equal(video(rest), video(whole[done:]))


def test_where_no_mean_stands_for_its_block_a_run_is_dense(dit):
    options = {"frames_per_chunk": 3, "sigmas": (1.0, 0.5, 0.0), "latent_shape": (1, 16, 12, *SIZE)}
    strict = AttentionOptions("reference", (16, 16), policy="mass", settings=(("similarity", 0.99),))
    sparse, dense = (video(roll(dit, text(1), growth=g, attention=strict, **options)) for g in ((0.0, 0.8), None))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", [*POLICIES, *SETTINGS])
def test_a_continued_run_reads_again_all_that_it_sees(one_layer, policy):
    """In one layer a frame's keys depend on no earlier frame, so nothing changes if those not seen are left out."""
    name, settings = policy.split()[0], SETTINGS.get(policy, ())
    options = {"latent_shape": (1, 16, 30, *SIZE), "sigmas": (1.0, 0.5, 0.0), "growth": (0.0, 0.5)}
    options |= {"frames_per_chunk": 3, "context": text(1), "window": 21 if name == "echo_forcing" else 9}
    recipe = recipe_of(attention=AttentionOptions("reference", (16, 16), 3, policy=name, settings=settings), **options)
    whole = list(rollout(one_layer, recipe))
    rest = rollout(one_layer, recipe, Runtime(replay="window"), whole[:8])
    torch.testing.assert_close(video(rest), video(whole[8:]), rtol=0, atol=1e-5)
