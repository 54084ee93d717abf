"""Decode beside the sampling: the same frames in the same order, one chunk later, and nothing that waits on the way."""

from unittest.mock import MagicMock
from unittest.mock import call as call_of

import pytest
import torch

from lightforcing.lightforcing_core.vae import overlap
from lightforcing.lightforcing_core.vae.overlap import OverlappedDecoder, SideStream
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.tiled import TiledDecoder
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def vae():
    return vae_from_state_dict(random_vae_state_dict(dim=8, seed=1))


@pytest.fixture(scope="module")
def chunks():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 16, frames, 4, 6, generator=generator) for frames in (1, 2, 2, 2)]


class LateStream:
    """A second stream that does nothing before it must, as a slow device would."""

    made: list["LateStream"] = []  # noqa: RUF012

    def __init__(self, device):
        self.device, self.joined, self.ready = device, 0, 0
        self.made.append(self)

    def start(self, decode, latents):
        return LateFrames(self, decode)

    def join(self):
        self.joined += 1


class LateFrames:
    def __init__(self, stream, decode):
        self.stream, self.decode = stream, decode

    def is_there(self):
        return self.stream.ready > 0

    def wait(self):
        self.stream.ready -= 1
        return self.decode()


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(overlap, "SideStream", LateStream)
    monkeypatch.setattr(LateStream, "made", [])
    return LateStream.made


def at_once(vae, chunks):
    decoder = StreamingDecoder(vae)
    return [decoder.decode(latents) for latents in chunks]


def assert_equal(frames, expected):
    assert len(frames) == len(expected)
    assert all(map(torch.equal, frames, expected))


def test_on_a_cpu_every_chunk_is_decoded_at_once(vae, chunks, late):
    decoder = OverlappedDecoder(StreamingDecoder(vae), "cpu")
    for latents, expected in zip(chunks, at_once(vae, chunks), strict=True):
        assert_equal(decoder.put(latents), [expected])
        assert decoder.arrived() == decoder.rest() == []
    decoder.drop()
    assert not late


def test_where_nothing_shall_overlap_any_decoder_will_do(vae, chunks, late):
    tiled = OverlappedDecoder(TiledDecoder(lambda: StreamingDecoder(vae), 2), CUDA, concurrent=False)
    assert_equal([frames for latents in chunks for frames in tiled.put(latents)], at_once(vae, chunks))
    assert not late


def test_frames_come_with_the_next_chunk_and_the_last_ones_at_the_end(vae, chunks, late):
    expected = at_once(vae, chunks)
    decoder = OverlappedDecoder(StreamingDecoder(vae), CUDA)
    assert decoder.put(chunks[0]) == []
    for latents, before in zip(chunks[1:], expected, strict=False):
        assert decoder.arrived() == []
        assert_equal(decoder.put(latents), [before])
    assert_equal(decoder.rest(), expected[-1:])
    assert decoder.rest() == []
    assert [stream.device for stream in late] == [CUDA]


def test_frames_that_have_arrived_are_there_before_the_next_chunk(vae, chunks, late):
    expected = at_once(vae, chunks)
    decoder = OverlappedDecoder(StreamingDecoder(vae), CUDA)
    for latents, own in zip(chunks, expected, strict=True):
        assert decoder.put(latents) == []
        late[0].ready = 1
        assert_equal(decoder.arrived(), [own])
        assert decoder.arrived() == []


def test_frames_of_the_chunk_before_outlive_memory_that_runs_out(vae, chunks, late, monkeypatch):
    expected = at_once(vae, chunks)
    decoder = OverlappedDecoder(StreamingDecoder(vae), CUDA)
    decoder.put(chunks[0])

    def full(self, decode, latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LateStream, "start", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.put(chunks[1])
    assert_equal(decoder.rest(), expected[:1])


def test_latents_that_are_not_finite_are_named_with_their_frames(vae, chunks, late):
    decoder = OverlappedDecoder(StreamingDecoder(vae), CUDA)
    decoder.put(chunks[0])
    assert len(decoder.put(torch.full_like(chunks[1], torch.nan))) == 1
    with pytest.raises(ValueError, match="the decoded video holds NaN or infinity"):
        decoder.rest()
    with pytest.raises(ValueError, match="the latent holds NaN or infinity"):
        OverlappedDecoder(StreamingDecoder(vae), "cpu").put(torch.full_like(chunks[0], torch.inf))


def test_what_is_dropped_never_comes(vae, chunks, late):
    decoder = OverlappedDecoder(StreamingDecoder(vae), CUDA)
    decoder.put(chunks[0])
    decoder.drop()
    assert late[0].joined == 1
    assert decoder.rest() == decoder.arrived() == []


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
    overlap._second_stream.cache_clear()
    yield card
    overlap._second_stream.cache_clear()


def test_the_side_stream_waits_for_the_latents_keeps_them_and_never_waits_on_the_cpu(card):
    card.decode.return_value = torch.ones(5), torch.tensor([0.0, 1.0])
    arrival = SideStream(CUDA).start(card.decode, torch.zeros(1, 2).as_subclass(OnCard))
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


def test_the_device_continues_only_when_the_side_stream_is_done(card):
    SideStream(CUDA).join()
    card.current_stream.return_value.wait_stream.assert_called_with(card.Stream.return_value)


def test_a_copy_to_the_host_is_pinned_where_it_can_be_and_else_waits(monkeypatch):
    asked = []
    empty = torch.empty

    def pinned(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pinned)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(overlap.to_cpu(x), x)
    assert asked == [True]

    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    assert torch.equal(overlap.to_cpu(x), x)
