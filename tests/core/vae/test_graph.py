"""Recorded decode gives the frames of normal decode, whatever happens to weights and recordings on the way."""

from contextlib import nullcontext

import pytest
import torch

from lightforcing.lightforcing_core import machine, profile
from lightforcing.lightforcing_core.pinned import Weights
from lightforcing.lightforcing_core.vae.graph import PassGraph
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

from ...support.tape import TapeRecorder
from .tae import random_tae_state_dict, tae_from_state_dict

CPU = torch.device("cpu")


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(TapeRecorder, "events", [])
    return TapeRecorder.events


@pytest.fixture
def vae():
    return vae_from_state_dict(random_vae_state_dict(dim=4))


def frames_of(vae, *, recorded=True, moves=(), measuring=None, width=3):
    """The frames of chunks of 3 latents; weights have moved before the chunks in `moves`."""
    latents = torch.randn(1, 16, 18, 2, width, generator=torch.Generator().manual_seed(1))
    weights, frames = Weights(vae.decoder, CPU), []
    graph = PassGraph(TapeRecorder(CPU), weights, measuring) if recorded else None
    decoder = StreamingDecoder(vae, at_once=3, graph=graph, tae_latents="raw")
    for number, piece in enumerate(latents.split(3, dim=2)):
        if number in moves:
            moved = next(decoder.tree[1].parameters())
            moved.data = moved.data.clone()
        assert weights.hold() is None
        frames.append(decoder.decode(piece))
        weights.release()
    decoder.reset()
    return torch.cat(frames, dim=1)


@pytest.mark.parametrize("kind", ["wan", "tae"])
@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ((), [("record", 1), *[("launch", 1)] * 4, ("free", 1)]),
        ((3,), [("record", 1), ("launch", 1), ("free", 1), ("record", 2), *[("launch", 2)] * 2, ("free", 2)]),
    ],
)
def test_a_recorded_decode_equals_a_normal_one_and_is_dropped_when_weights_move(kind, moves, expected, events, vae):
    if kind == "tae":
        vae = tae_from_state_dict(random_tae_state_dict())
    assert torch.equal(frames_of(vae, moves=moves), frames_of(vae, recorded=False))
    assert events == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("not permitted")], ids=repr)
def test_a_recording_that_fails_costs_no_frame(error, events, monkeypatch, caplog, vae):
    def record(*_):
        raise error

    monkeypatch.setattr(TapeRecorder, "record", record)
    assert torch.equal(frames_of(vae), frames_of(vae, recorded=False))
    assert str(error) in caplog.text
    assert events == []


@pytest.mark.parametrize(
    ("width", "spoil", "graph_seconds", "state"),
    [(2, 1.0, 1.0, "enabled"), (4, 1.0, 3.0, "verified"), (5, 1.1, 1.0, "quarantined")],
)
def test_the_graph_is_used_if_it_was_measured_to_be_right_and_faster(
    width, spoil, graph_seconds, state, events, vae, monkeypatch, tmp_path
):
    def seconds_of(run, device):
        launches = len(events)
        run()
        return graph_seconds if len(events) > launches else 2.0

    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LIGHTFORCING_PROFILE", raising=False)
    monkeypatch.setattr(machine, "SHARE", 1.0)
    monkeypatch.setattr(machine, "seconds_of", seconds_of)
    monkeypatch.setattr(TapeRecorder, "spoil", staticmethod(lambda out: out.mul_(spoil)))
    made = [frames_of(vae, measuring=way, width=width) for way in (nullcontext, machine.measuring, nullcontext)]
    assert all(torch.equal(frames, frames_of(vae, recorded=False, width=width)) for frames in made)
    ((row,),) = (rows.values() for rows in profile.rows(CPU).values())
    assert row.state == state
    *measured, (last, _) = events
    assert last == "free"
    if state == "enabled":  # the last clip is decoded by a recording of its own
        assert measured[-6:] == [("free", 1), ("record", 1), *[("launch", 1)] * 4]
    else:
        assert measured.count(("record", 1)) == 1
