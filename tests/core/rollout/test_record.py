"""What a run's record holds: the plan that ran, the blocks that were read, the time and the reasons."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from lightforcing.lightforcing_core.attention.selection import SelectionPlan
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout import record as run_record
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.rollout.record import RunRecorder
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import FINE, TEXT, roll, text

SIZE = (12, 8)  # 6 × 4 = 24 tokens per frame: a block of 16 and a ragged one of 8
SIGMAS = few_step_sigmas((1000, 500))
GROWTH = [0.0, 0.4, 0.6, 0.7, 0.7]


@pytest.fixture(scope="module")
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=3, text_dim=TEXT))


def run(dit, context, recorder=None, *, frames=12, batch=1, chunk=2, **options):
    defaults = {"growth": GROWTH, "window": 7, "sink_frames": 1, "attention": FINE, "sigmas": SIGMAS}
    return roll(
        dit,
        context,
        latent_shape=(batch, 16, frames, *SIZE),
        frames_per_chunk=chunk,
        recorder=recorder,
        **{**defaults, **options},
    )


def recorded(dit, context, recorder=None, **options):
    recorder = recorder or RunRecorder()
    for _ in run(dit, context, recorder, **options):
        pass
    return recorder.finish()


@pytest.fixture(scope="module")
def record(dit, context):
    return recorded(dit, context, batch=2)


def test_chunks_hold_what_the_plan_says(record):
    assert [(chunk.index, chunk.start_frame, chunk.frames) for chunk in record.chunks] == [
        (index, 2 * index, 2) for index in range(6)
    ]
    assert [chunk.visible for chunk in record.chunks] == [  # the sink and the window
        (0, 1),
        (0, 1, 2, 3),
        (0, 1, 2, 3, 4, 5),
        (0, *range(2, 8)),
        (0, *range(4, 10)),
        (0, *range(6, 12)),
    ]
    assert [chunk.sparsity for chunk in record.chunks] == [0.0, 0.4, 0.6, 0.7, 0.7, 0.7]
    assert [chunk.steps for chunk in record.chunks] == [2] * 6
    assert (record.batch, record.layers, record.heads, record.grid) == (2, 3, 2, (6, 4))


def test_density_is_the_share_of_blocks_that_the_plan_keeps(record):
    blocks = [2 * len(chunk.visible) for chunk in record.chunks]
    kept = [blocks[0], *(int((1 - s) * n) for s, n in zip([*GROWTH[1:], 0.7], blocks[1:], strict=True))]
    for chunk, n, k in zip(record.chunks, blocks, kept, strict=True):
        assert chunk.layer_density == pytest.approx([k / n] * 3)


def test_what_keys_decide_is_reported_once_it_was_read(dit, context):
    """The density of a step is that of the chunk before, and a record's that of its own chunk."""
    events, recorder = [], RunRecorder()
    attention = replace(FINE, policy="vmoba")
    record = recorded(dit, context, recorder, attention=attention, on_step=events.append)
    read = [chunk.density for chunk in record.chunks]
    assert all(0.0 < share < 1.0 for share in read[1:])
    assert [chunk.sparsity for chunk in record.chunks] == [0.0, *[None] * 5]
    assert [event.density for event in events[::2]] == pytest.approx([1.0, None, *read[1:-1]])
    assert len({density for chunk in record.chunks for density in chunk.layer_density}) > 3


def test_maps_are_the_selections_of_the_last_step(dit, context, monkeypatch):
    """Recomputed from every selection that was made, through the mask form and the slots' frames."""
    seen = []
    select = SelectionPlan.select

    def spy(plan, *arguments, **named):
        selection = select(plan, *arguments, **named)
        seen.append(selection.to_mask(arguments[1].shape[1]))
        return selection

    monkeypatch.setattr(SelectionPlan, "select", spy)
    slots, chunks = [], []

    class Spy(RunRecorder):
        def open(self, index, recipe, state):
            super().open(index, recipe, state)
            slots.append(list(state.cache.slot_frames))
            chunks.append(len(seen))

    record = recorded(dit, context, Spy(), batch=2)
    checked = 0
    for number, chunk in enumerate(record.chunks[1:], 1):
        first = chunks[number]
        for layer in range(3):
            mask = seen[first + 3 + layer]  # the second of two steps, three layers each
            counts = mask.sum((0, 2))  # [heads, blocks in slot order]
            for place, frame in enumerate(chunk.visible):
                slot = slots[number].index(frame)
                assert torch.equal(chunk.block_map[layer, :, place].long(), counts[:, 2 * slot : 2 * slot + 2])
                checked += 1
        assert chunk.query_blocks == mask.shape[0] * mask.shape[2]
    assert checked == 3 * (4 + 6 + 7 + 7 + 7)
    assert record.chunks[0].block_map is None
    assert record.chunks[4].visible != tuple(slots[4]), "no slot order that differs from time was tried"
    assert not torch.equal(record.chunks[3].block_map[0], record.chunks[3].block_map[2])


def test_recording_changes_no_bit_of_the_video(dit, context):
    plain = torch.cat([chunk.latents for chunk in run(dit, context)], dim=2)
    watched = torch.cat([chunk.latents for chunk in run(dit, context, RunRecorder())], dim=2)
    assert torch.equal(plain, watched)


def test_reasons_name_why_a_chunk_or_a_call_ran_dense(dit, context, record):
    assert record.chunks[0].why_dense == "it has no past frames"
    assert [chunk.why_dense for chunk in record.chunks[1:]] == [None] * 5
    assert record.attention == ("reference (reference was asked for)",)
    mixed = recorded(
        dit,
        [Prompt(context), Prompt(text(2), start_chunk=2, switch="hard")],
        growth=[0.0, 0.0, 0.01, 0.6],
        frames=8,
        window=None,
        sink_frames=0,
    )
    assert mixed.chunks[1].why_dense == "its scheduled sparsity is 0"
    assert mixed.chunks[2].density == pytest.approx(11 / 12)
    assert mixed.notes == ("the hard prompt switch at chunk 2 read 4 frames again",)
    assert mixed.seconds["recompute"] > 0
    whole = recorded(dit, context, growth=None)
    assert {chunk.why_dense for chunk in whole.chunks[1:]} == {"its scheduled sparsity is 0"}
    assert whole.attention == ()
    assert all(chunk.density == 1.0 for chunk in whole.chunks)


def test_time_is_told_per_stage_and_chunk(dit, context, monkeypatch):
    """What the receiver of a chunk does is output time."""
    clock = count()
    monkeypatch.setattr(run_record, "_now", lambda device: float(next(clock)))
    recorder = RunRecorder()
    for _ in run(dit, context, recorder, frames=6):
        next(clock)
    record = recorder.finish()
    assert [chunk.seconds for chunk in record.chunks] == [
        {"denoise": 1.0, "output": 2.0, "clean pass": 1.0},
        {"denoise": 1.0, "output": 2.0, "clean pass": 1.0},
        {"denoise": 1.0, "output": 2.0},
    ]
    assert record.seconds == {"denoise": 3.0, "output": 6.0, "clean pass": 2.0}


def test_given_frames_are_replayed_and_are_no_chunks(dit, context):
    given = torch.randn(1, 16, 4, *SIZE)
    record = recorded(dit, context, initial_latents=given, frames=8)
    assert [(chunk.index, chunk.start_frame) for chunk in record.chunks] == [(2, 4), (3, 6)]
    assert record.seconds["replay"] > 0
    assert "replay" not in record.chunks[0].seconds


def test_guidance_records_the_prompt_and_not_the_negative_one(dit, context):
    record = recorded(dit, context, cfg=3.0, negative=-context, frames=6)
    assert record.chunks[2].block_map.shape == (3, 2, 6, 2)
    assert record.chunks[2].layer_density == pytest.approx([4 / 12] * 3)


def test_a_run_that_ends_early_records_its_finished_chunks(dit, context):
    recorder = RunRecorder({"seed": "7"})
    chunks = run(dit, context, recorder)
    for _ in range(3):
        next(chunks)
    chunks.close()
    record = recorder.finish()
    assert [chunk.index for chunk in record.chunks] == [0, 1, 2]
    assert record.facts["seed"] == "7"
    assert [chunk.index for chunk in recorder.finish(frames=4).chunks] == [0, 1]


def test_a_step_that_fails_leaves_no_half_chunk(dit, context):
    calls = []

    def denoise(x, sigma, passes):
        calls.append(sigma)
        if len(calls) == 5:
            raise MemoryError
        return x

    recorder = RunRecorder()
    with pytest.raises(MemoryError):
        list(run(dit, context, recorder, denoise=denoise))
    assert [chunk.index for chunk in recorder.finish().chunks] == [0]


def test_maps_of_long_runs_are_thinned_to_a_bound(dit, context):
    one_map = 3 * 2 * 14 * 2  # layers, heads, blocks of seven frames, two bytes
    record = recorded(dit, context, RunRecorder(map_bytes=3 * one_map), frames=24)
    kept = [chunk.index for chunk in record.chunks if chunk.block_map is not None]
    assert kept == [4, 8]
    assert len(record.chunks) == 12
    assert all(chunk.layer_density == pytest.approx([4 / 14] * 3) for chunk in record.chunks[3:])
    none = recorded(dit, context, RunRecorder(map_bytes=0), frames=8)
    assert all(chunk.block_map is None for chunk in none.chunks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_time_the_device(dit, context):
    record = recorded(dit.to("cuda"), context.to("cuda"))
    assert record.seconds["denoise"] > 0
