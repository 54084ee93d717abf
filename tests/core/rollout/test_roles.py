"""Whole rollouts of the policies that read by roles of heads: what each chunk reads, and that every option runs."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies.heads import ForcingKV
from lightforcing.lightforcing_core.checkpoint.load import WanSize
from lightforcing.lightforcing_core.memory.estimate import estimate
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.cost import flops_ratio, recipe_costs
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import Recipe
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.runtime import Runtime
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import FINE, recipe_of, roll, text, video

SIZE = 16, 24  # frames of 96 tokens: six key blocks, one in each segment
POLICIES = "forcing_kv", "dummy_forcing"
ROLES = {"forcing_kv": ((1, 1), (0, 1)), "dummy_forcing": ((0, 1), (2, 1))}
# Static heads of each layer of the Self Forcing checkpoint, as published with Forcing-KV.
STATIC = [5, 4, 5, 4, 3, 8, 4, 6, 8, 4, 3, 4, 8, 1, 6, 1, 3, 8, 1, 4, 8, 6, 1, 3, 1, 2, 5, 6, 6, 6]
PUBLISHED = {
    "forcing_kv": tuple((0,) * static + (1,) * (12 - static) for static in STATIC),
    "dummy_forcing": ((0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2),) * 30,
}
IMAGE = {"initial_latents": torch.zeros(1, 16, 1, *SIZE), "frames": 13}
FRAME_WISE = {"frames_per_chunk": 1, "frames": 9}


def options_of(policy, *, frames=15, size=SIZE, batch=1, roles=(), **options):
    """Arguments of a video; `attention` holds fields of AttentionOptions, and the rest is as in `roll`."""
    attention = replace(FINE, policy=policy, roles=roles, **options.pop("attention", {}))
    defaults = {"frames_per_chunk": 3, "sigmas": (1.0, 0.5, 0.0), "growth": (0.0, 0.5), "context": text(1)}
    return {"latent_shape": (batch, 16, frames, *size), "attention": attention, **defaults, **options}


def run(dit, policy, finished=(), **options):
    """The chunks, and the record."""
    recorder = RunRecorder()
    chunks = list(roll(dit, finished=finished, recorder=recorder, **options_of(policy, **options)))
    return chunks, recorder.finish()


def frames_read(record):
    """For each chunk the whole frames' worth of blocks that each head of each layer reads: [layers][heads]."""
    read = []
    for chunk in record.chunks:
        if chunk.block_map is None:
            read.append({float(len(chunk.visible))})
        else:
            per_frame = chunk.block_map.shape[-1] * chunk.query_blocks
            read.append((chunk.block_map.sum((2, 3)) / per_frame).tolist())
    return read


def all_heads(frames):
    return [[frames] * 2] * 2


KV_5, KV_6, DUMMY = all_heads(5), [[5, 5], [5, 6]], [[4, 6], [4, 6]]


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("forcing_kv", {}, [{3}, KV_5, KV_5, KV_6, KV_6]),
        ("dummy_forcing", {}, [{3}, {6}, DUMMY, DUMMY, DUMMY]),
        ("forcing_kv", IMAGE, [all_heads(4), KV_5, KV_5, KV_6]),
        ("dummy_forcing", IMAGE, [{4}, {7}, DUMMY, DUMMY]),
        ("forcing_kv", FRAME_WISE, [{1}, all_heads(2), *[all_heads(3)] * 5, *[[[3, 3], [3, 4]]] * 2]),
        ("dummy_forcing", FRAME_WISE, [{1}, {2}, {3}, {4}, {5}, {5}, *[[[2, 4], [2, 4]]] * 3]),
    ],
)
def test_first_chunks_read_what_is_published(dit, policy, options, expected):
    """With roles given; the cache holds no more than what is read, and the schedule makes the first chunk dense."""
    _, record = run(dit, policy, roles=ROLES[policy], **options)
    assert frames_read(record) == expected


@pytest.mark.parametrize(("policy", "visible"), [("forcing_kv", [3, 6, 8]), ("dummy_forcing", [3, 6])])
def test_everything_visible_is_read_until_the_roles_are_known(dit, policy, visible):
    _, record = run(dit, policy)
    read = frames_read(record)
    assert read[: len(visible)] == [{float(frames)} for frames in visible]
    allowed = {5.0, 6.0} if policy == "forcing_kv" else {4.0, 6.0}
    assert all({frames for layer in chunk for frames in layer} <= allowed for chunk in read[len(visible) :])
    assert record.chunks[1].why_dense.startswith(("the roles of its heads are not known", "roles decide only after 6"))
    assert sum(int(one.split()[-1]) for one in record.facts["roles of heads"].split(",")) == 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": {"tiles": True}, "size": (14, 20)},
        {"kv": KVOptions("int8", host=True), "attention": {"tail": True}},
        {"size": (10, 14)},
        {"context": [Prompt(text(1)), Prompt(text(2), 4, "hard")]},
        {"window": 6, "sink_frames": 2},
        {"window": 4},
        {"initial_latents": torch.zeros(1, 16, 9, *SIZE)},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_roles_are_decided_alike_when_a_run_continues(dit, policy, options, tmp_path):
    """Roles are decided anew when a saved run continues, from what its finished chunks show."""
    whole, record = run(dit, policy, **options)
    reasons = [chunk.why_dense for chunk in record.chunks]
    if options.get("window", 12) < 7:
        assert all(reasons)
    else:
        assert reasons[-1] is None
    arguments = options_of(policy, **options)
    runtime = {name: arguments.pop(name) for name in ("kv",) if name in arguments}
    state = RunState(recipe_of(**arguments), "tiny")
    for done, chunk in enumerate(whole[:-1], start=1):
        state = state.extended_by(chunk)
        if done in (1, 3):
            loaded = load_run_state(save_run_state(state, tmp_path / "run.safetensors"))
            rest = rollout(dit, loaded.recipe, Runtime(**runtime), loaded.finished)
            assert torch.equal(video(rest), video(whole[done:]))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_reads_only_its_window_again_decides_the_same_roles(dit, policy):
    whole, record = run(dit, policy, frames=24)
    _, rest = run(dit, policy, whole[:7], frames=24, replay="window")
    assert rest.facts["roles of heads"] == record.facts["roles of heads"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frames", [6, 9, 12])
def test_a_lengthened_video_equals_a_long_one(dit, policy, frames):
    short, _ = run(dit, policy, frames=frames)
    long, _ = run(dit, policy)
    assert torch.equal(video(short), video(long)[:, :, :frames])


def test_changed_segments_are_found_anew_when_a_prompt_switch_reads_the_past_again(dit, monkeypatch):
    """From the chunk at frame 6 on, and by both guides with the first one's roles."""
    found, real = [], ForcingKV.changed

    def changed(self, keys_of, layout, roles):
        keys = keys_of(1)
        found.append((len(keys) // 96, roles, keys.sum().item()))
        return real(self, keys_of, layout, roles)

    monkeypatch.setattr(ForcingKV, "changed", changed)
    prompts = [Prompt(text(1)), Prompt(text(2), 4, "hard")]
    run(dit, "forcing_kv", context=prompts, cfg=2.0, negative=text(3))
    assert [frames for frames, *_ in found] == [8] * 5  # two commits of two guides, and the prompt's recompute
    assert len({roles for _, roles, _ in found}) == 1
    assert len({total for *_, total in found}) == 5


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_roles_of_another_model_are_refused_before_the_run(dit, sizes):
    with pytest.raises(Refusal, match=rf"are of {sizes[0]} layers and {sizes[1]} heads, and the model has 2 and 2"):
        run(dit, "forcing_kv", roles=((0,) * sizes[1],) * sizes[0])


@pytest.mark.parametrize(("policy", "share", "slots"), [("forcing_kv", 0.4218, 8), ("dummy_forcing", 0.3750, 7)])
def test_published_roles_cost_what_is_published(policy, share, slots):
    """81 frames at 480×832 of the 1.3B model: shares of 84 pairs of chunks and frames, and slots of 287.5 MB."""
    options = options_of(policy, frames=21, size=(60, 104), roles=PUBLISHED[policy], growth=[0.0] + [0.5] * 6)
    options["context"] = torch.empty(1, 512, 4096, device="meta")
    recipe = Recipe(**{**options, "attention": replace(options["attention"], block=(64, 64))})
    pairs = sum(cost.attention_pairs() for cost in recipe_costs(recipe))
    assert round(pairs / (3 * sum(accumulate([3] * 7))), 4) == share
    assert round(flops_ratio(recipe_costs(recipe)), 4) == share
    assert recipe.ring == (slots, 1)
    wan = WanSize(1536, 8960, 30, 4096, 1_418_996_800)
    whole = replace(recipe, attention=AttentionOptions(policy="window"))
    assert [estimate(wan, one, weights=0).cache for one in (recipe, whole)] == [slots * 287_539_200, 21 * 287_539_200]
