"""Persistent blocks (PBSA): worked numbers, videos against brute force, continued runs, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lightforcing.kernels.layer_memory import LayerMemory
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies import FrameBudget, PersistentBlocks, View
from lightforcing.lightforcing_core.attention.policies.pool import importance
from lightforcing.lightforcing_core.model import causal
from lightforcing.lightforcing_core.model.block_pool import keep_best
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout.cost import recipe_costs
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import recipe_of, roll, text, video
from .pool_by_hand import Memory

POOL = AttentionOptions("reference", (16, 16), policy="pbsa", settings=(("persistent", 2),))
SWITCH = [Prompt(text(1)), Prompt(text(2), 5, "hard")]
QUERIES = torch.tensor([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
KEYS = torch.tensor([(2.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (1.0, 1.0), (0.0, -1.0), (3.0, -1.0)])


def test_importance_and_the_blocks_that_stay_are_those_of_the_worked_example():
    one = FrameBlocks(1, 1)
    scores = importance(QUERIES[None, :, None], KEYS[None, :, None], one)
    wanted = [0.587712, 0.745411, 0.166877, 0.577527, 0.141198, 0.781275]
    torch.testing.assert_close(scores[0, 0], torch.tensor(wanted), rtol=0, atol=5e-7)
    for many, stay in ((2, [0, 5]), (3, [0, 3, 5])):
        memory = LayerMemory(*(torch.cat([KEYS, torch.zeros(many, 2)])[None, :, None] for _ in "kv"))
        keep_best(memory, one, [0, 2, 3, 5], 6, many, scores)
        assert torch.equal(memory.keys[0, 6:, 0], KEYS[stay])


@pytest.mark.parametrize(("sparsity", "rows"), [(0.75, [[5], [1], [1]]), (0.5, [[3, 5], [1, 3], [1, 3]])])
def test_the_window_is_read_as_in_the_worked_example_and_the_pool_by_all(sparsity, rows):
    local = [1, 3, 4, 5]
    view = View(range(4), 1, FrameBlocks(3, 1), FrameBlocks(1, 1), 1, 1, pool=2)
    plan = PersistentBlocks(2).plan(view, sparsity, FrameBudget())
    keys = KEYS[None, local, None]
    read, counts = plan.select(QUERIES[None, :, None], keys, keys)
    assert [[local[i] for i in row if i < 4] for row in read[0, 0].tolist()] == rows
    assert [row[-2:] for row in read[0, 0].tolist()] == [[4, 5]] * 3
    assert counts.unique().tolist() == [plan.kept] == [len(rows[0]) + 2]
    assert plan.density == plan.kept / 4


def run(dit, prompts, frames=21, finished=(), **options):
    """A video of chunks of 3 in a window of 6 that keeps the blocks of 2 frames; a frame has 16 and 4 tokens."""
    size, steps = (options.pop("batch", 1), 16, frames, 8, 10), few_step_sigmas((1000, 500))
    options = {"frames_per_chunk": 3, "sigmas": steps, "window": 6, "attention": POOL, "growth": [0.5], **options}
    return roll(dit, prompts, finished, latent_shape=size, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 2, "sink_frames": 1, "growth": [0.0, 0.0, 0.7]},
        {"initial_latents": torch.ones(1, 16, 1, 8, 10), "frames": 22, "window": 7},
        {"frames_per_chunk": 1, "window": 4, "frames": 10},
        {"tail": True, "growth": [1e-17]},
    ],
    ids=["plain", "batch, sink, dense chunks", "image", "single frames", "all and a tail"],
)
def test_a_video_is_that_of_lists_of_blocks(dit, monkeypatch, options):
    tail = options.pop("tail", False)
    fast = video(run(dit, text(1), attention=replace(POOL, tail=tail), **options))
    sparsities, per_chunk = options.get("growth", [0.5]), options.get("frames_per_chunk", 3)
    given = "initial_latents" in options
    memories = [Memory(options.get("window", 6), options.get("sink_frames", 0), 16, (2, 2)) for _ in dit.blocks]

    def attended(q, q_means, layer, state, watch=None):
        chunk, cache, memory = state.chunk, state.cache, memories[layer]
        slots = [cache.slot_frames.index(frame) for frame in cache.current_frames]
        held = cache.visible(layer)
        keys, values = ([state.cache.storage.layout.real(x).split(20, 1)[slot] for slot in slots] for x in held[:2])
        memory.see(chunk.start_frame, keys, values)
        index = (chunk.start_frame + 2 * given) // per_chunk
        sparsity = sparsities[min(index, len(sparsities) - 1)]
        return torch.cat(memory.read(q.split(20, 1), sparsity, chunk.masses is not None), 1)

    monkeypatch.setattr(causal, "attended", attended)
    torch.testing.assert_close(fast, video(run(dit, text(1), **options)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv": KVOptions("int8"), "batch": 2},
        {"kv": KVOptions("fp8", host=True), "cfg": 2.0, "negative": text(3)},
        {"initial_latents": torch.ones(1, 16, 1, 8, 10), "frames": 22, "sink_frames": 1},
    ],
    ids=["plain", "int8", "host, cfg", "image"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(dit, options):
    whole = list(run(dit, SWITCH, **options))
    plain = list(run(dit, SWITCH, **options, attention=AttentionOptions("reference", (16, 16), policy="topk")))
    equal = [torch.equal(a.latents, b.latents) for a, b in zip(whole, plain, strict=True)]
    assert [equal[0], *equal[2:]] == [True] + [False] * 5  # from the first chunk on that frames leave for
    for done in (3, 6):
        assert torch.equal(video(run(dit, SWITCH, finished=whole[:done], **options)), video(whole[done:]))


def test_host_memory_and_rows_of_whole_blocks_change_nothing(dit):
    near, far = (video(run(dit, text(1), kv=KVOptions(host=host))) for host in (False, True))
    assert torch.equal(near, far)
    padded = video(run(dit, text(1), attention=replace(POOL, backend="flex")))
    torch.testing.assert_close(near, padded, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prompts", [text(1), SWITCH], ids=["one", "switch"])
def test_record_and_cost_count_the_pool(dit, prompts):
    recorder = RunRecorder()
    attention = replace(POOL, settings=(("persistent", 5),))
    list(run(dit, prompts, recorder=recorder, attention=attention))
    recipe = recipe_of(
        latent_shape=(1, 16, 21, 8, 10),
        frames_per_chunk=3,
        sigmas=[1, 0],
        context=prompts,
        growth=[0.5],
        window=6,
        attention=attention,
    )
    record = recorder.finish()
    read = [chunk.density for chunk in record.chunks]
    assert read == pytest.approx([cost.density for cost in recipe_costs(recipe)])
    pools = [0, 0, 3, 5, 5, 3 if prompts is SWITCH else 5, 5]  # a hard switch empties it
    assert read == pytest.approx([1.0, *(0.5 + pool / 6 for pool in pools[1:])])
    assert record.chunks[-1].block_map.shape[2] == 6
    assert record.facts["persistent blocks"].startswith("10 of each head")


def test_a_run_has_its_window_and_pool_and_keeps_them_when_saved(tmp_path):
    make = partial(recipe_of, frames_per_chunk=3, sigmas=[1, 0], context=text(1), growth=[0.5])
    recipe = make(latent_shape=(1, 16, 30, 4, 6), attention=AttentionOptions(policy="pbsa"))
    saved = load_run_state(save_run_state(RunState(recipe, "model"), tmp_path / "run")).recipe
    shape = saved.cache_shape(layers=1, heads=1, head_dim=128, dtype=torch.float32)
    assert (saved.window, shape.slots, shape.pool, saved.attention) == (9, 9, 3, recipe.attention)
    short = make(latent_shape=(1, 16, 9, 4, 6), attention=AttentionOptions(policy="pbsa"))
    assert short.cache_shape(layers=1, heads=1, head_dim=128, dtype=torch.float32).pool == 0  # nothing leaves


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"persistent": 0}, {}, "persistent 0 keeps no block; use 1 latent frame or more, or policy topk"),
        ({}, {"window": 3}, "window 3 shows a chunk of 3 nothing of its past to choose from; use 6"),
        ({}, {"window": None, "frames_per_chunk": 9}, "window 9 shows a chunk of 9 nothing"),
        ({}, {"context": [Prompt(text(1)), Prompt(text(2), 3, "cut")]}, "'cut' cannot end a scene that pbsa brings"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(settings, options, message):
    context = options.pop("context", text(1))
    with pytest.raises(ValueError, match=message):
        run(None, context, attention=AttentionOptions(policy="pbsa", settings=(*settings.items(),)), **options)
