"""Decode beside the sampling: the same frames in the same order, one chunk later, and nothing that waits on the way."""

from unittest.mock import MagicMock
from unittest.mock import call as call_of

import pytest
import torch

from lightforcing.lightforcing_core.pinned import Weights
from lightforcing.lightforcing_core.vae import overlap
from lightforcing.lightforcing_core.vae.overlap import OverlappedDecoder, SideStream
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.tiled import TiledDecoder
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

from ...support.late import LateStream

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def vae():
    return vae_from_state_dict(random_vae_state_dict(dim=8, seed=1))


@pytest.fixture(scope="module")
def chunks():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 16, frames, 4, 6, generator=generator) for frames in (1, 2, 2, 2)]


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(overlap, "side_stream", LateStream)
    monkeypatch.setattr(LateStream, "log", [])
    return LateStream.log


@pytest.fixture
def expected(vae, chunks):
    decoder = StreamingDecoder(vae)
    return [decoder.decode(latents) for latents in chunks]


class HeldWeights(Weights):
    """Weights that note in a log that they may not move."""

    is_held = False

    def hold(self):
        self.is_held = True
        return super().hold()

    def release(self):
        self.is_held = False


def overlapped(vae):
    return OverlappedDecoder(StreamingDecoder(vae), HeldWeights(vae, torch.device("cpu")))


def assert_equal(frames, expected):
    assert len(frames) == len(expected)
    assert all(map(torch.equal, frames, expected))


def test_frames_come_at_once_on_a_cpu_and_with_a_decoder_that_is_not_to_overlap(vae, chunks, expected):
    tiled = OverlappedDecoder(TiledDecoder(lambda: StreamingDecoder(vae), 2), None)
    for decoder in (overlapped(vae), tiled):
        for latents, frames in zip(chunks, expected, strict=True):
            assert_equal(decoder.put(latents), [frames])
            assert decoder.arrived() == decoder.rest() == []
        decoder.drop()


@pytest.mark.parametrize("is_fast", [False, True])
def test_frames_come_when_they_arrive_or_with_the_next_chunk_or_at_the_end(
    is_fast, vae, chunks, expected, late, monkeypatch
):
    monkeypatch.setattr(LateStream, "is_fast", is_fast)
    decoder, made = overlapped(vae), []
    for number, latents in enumerate(chunks):
        made += decoder.put(latents)
        assert len(made) == number
        assert decoder._weights.is_held
        made += decoder.arrived()
        assert len(made) == number + is_fast
        assert decoder._weights.is_held != is_fast
    made += decoder.rest()
    assert_equal(made, expected)
    assert decoder.rest() == decoder.arrived() == []
    assert not decoder._weights.is_held


def test_weights_that_cannot_be_held_are_read_at_once(vae, chunks, expected, late):
    decoder = overlapped(vae)
    assert decoder.put(chunks[0]) == []
    decoder._weights.device = torch.device("meta")
    assert_equal(decoder.put(chunks[1]), expected[:2])
    assert late == ["put", "frames"]


def test_frames_of_the_chunk_before_outlive_memory_that_runs_out(vae, chunks, expected, late, monkeypatch):
    decoder = overlapped(vae)
    decoder.put(chunks[0])

    def full(self, decode, latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LateStream, "start", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.put(chunks[1])
    assert_equal(decoder.rest(), expected[:1])


def test_latents_that_are_not_finite_are_named_with_their_frames(vae, chunks, late):
    decoder = overlapped(vae)
    decoder.put(chunks[0])
    assert len(decoder.put(torch.full_like(chunks[1], torch.nan))) == 1
    with pytest.raises(ValueError, match="the decoded video holds NaN or infinity"):
        decoder.rest()
    assert not decoder._weights.is_held


def test_what_is_dropped_never_comes(vae, chunks, late):
    decoder = overlapped(vae)
    decoder.put(chunks[0])
    decoder.drop()
    assert decoder.rest() == decoder.arrived() == []
    assert late == ["put", "join"]


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def card(monkeypatch):
    """A mock of `torch.cuda` that keeps the order of all calls."""
    card = MagicMock()
    card.copy.side_effect = lambda x: x
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(overlap, "to_cpu", card.copy)
    monkeypatch.setattr(OnCard, "record_stream", card.lend)
    return card


def test_the_side_stream_waits_for_the_latents_keeps_them_and_never_waits_on_the_cpu(card):
    card.decode.return_value = torch.ones(5), torch.tensor([0.0, 1.0])
    stream = SideStream(CUDA)
    arrival = stream.start(card.decode, torch.zeros(1, 2).as_subclass(OnCard))
    in_stream = ["decode", "copy", "copy", "Event", "Event().record"]
    assert [name for name, _, _ in card.mock_calls] == [
        *("Stream", "current_stream", "Stream().wait_stream", "lend"),
        *("stream", "stream().__enter__", *in_stream, "stream().__exit__"),
    ]
    side = card.Stream.return_value
    side.wait_stream.assert_called_with(card.current_stream.return_value)
    for call in (card.lend, card.stream, card.Event.return_value.record):
        call.assert_called_with(side)
    assert arrival.is_there()
    assert torch.equal(arrival.wait()[0], torch.ones(5))
    assert card.mock_calls[-1] == call_of.Event().synchronize()
    stream.join()
    card.current_stream.return_value.wait_stream.assert_called_with(side)


def test_a_copy_to_the_cpu_is_pinned_if_it_can_be_and_else_waits(monkeypatch):
    asked = []
    empty = torch.empty

    def pinned(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        if len(asked) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pinned)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(overlap.to_cpu(x), x)
    assert torch.equal(overlap.to_cpu(x), x)
    assert asked == [True, True]
