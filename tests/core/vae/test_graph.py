"""Recorded decode gives the frames of normal decode, whatever happens to weights and recordings on the way."""

import pytest
import torch

from lightforcing.lightforcing_core.vae.graph import PassGraph
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

from ...support.tae import random_tae_state_dict, tae_from_state_dict
from ...support.tape import TapeRecorder


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(TapeRecorder, "events", [])
    return TapeRecorder.events


def fail(error):
    def record(*_):
        raise error

    return record


def frames_of(vae, graph=None, moves=()):
    """The frames of chunks of 3 latents; weights have moved before the chunks in `moves`."""
    latents = torch.randn(1, 16, 18, 2, 3, generator=torch.Generator().manual_seed(1))
    decoder = StreamingDecoder(vae, at_once=3, graph=graph and PassGraph(graph, lambda: place), tae_latents="raw")
    place, frames = 0, []
    for number, piece in enumerate(latents.split(3, dim=2)):
        place += number in moves
        frames.append(decoder.decode(piece))
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
def test_a_recorded_decode_equals_a_normal_one_and_is_dropped_when_weights_move(kind, moves, expected, events):
    if kind == "wan":
        vae = vae_from_state_dict(random_vae_state_dict(dim=4))
    else:
        vae = tae_from_state_dict(random_tae_state_dict())
    assert torch.equal(frames_of(vae, TapeRecorder("cpu"), moves), frames_of(vae))
    assert events == expected


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("full"), RuntimeError("not permitted")], ids=repr)
def test_a_recording_that_fails_or_is_wrong_costs_no_frame(error, events, monkeypatch, caplog):
    vae = vae_from_state_dict(random_vae_state_dict(dim=4))
    if error:
        monkeypatch.setattr(TapeRecorder, "record", fail(error))
    else:
        monkeypatch.setattr(TapeRecorder, "spoil", staticmethod(lambda out: out.mul_(1.1)))
    assert torch.equal(frames_of(vae, TapeRecorder("cpu")), frames_of(vae))
    assert "decode is no longer recorded: " in caplog.text
    assert [name for name, _ in events] == ([] if error else ["record", "launch", "free"])
