"""The TAE against a whole-clip evaluation from the equations, in any cut, and the choice of latents that it gets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightforcing.lightforcing_core.memory.estimate import AllocationPeak
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder, StreamingEncoder
from lightforcing.lightforcing_core.vae.taehv import tae_latents_of
from lightforcing.lightforcing_core.vae.wan_vae import denormalise_latents

from .tae import random_tae_state_dict, tae_from_state_dict


@pytest.fixture(scope="module")
def weights():
    return random_tae_state_dict(seed=0)


def clip(frames, *, batch=1, height=3, width=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 16, frames, height, width, generator=generator).to(dtype)


def decoder_of(weights, tae_latents="normalised", dtype=torch.float32):
    return StreamingDecoder(tae_from_state_dict(weights, dtype=dtype), tae_latents=tae_latents)


def whole_clip(weights, latents):
    """The TAE over all frames at once, straight from the tensors: [B, 16, T, h, w] → all 4·T frames, unclamped."""
    sd = {name: tensor.double() for name, tensor in weights.items()}

    def conv(name, x):
        weight = sd[name + ".weight"]
        return F.conv2d(x, weight, sd.get(name + ".bias"), padding=weight.shape[-1] // 2)

    batch = latents.shape[0]
    x = latents.double().transpose(1, 2).flatten(0, 1)
    x = conv("decoder.1", torch.tanh(x / 3) * 3).relu()
    for first, grow, stride in ((3, 7, 1), (9, 13, 2), (15, 19, 2)):
        for block in range(first, first + 3):
            framed = x.unflatten(0, (batch, -1))
            past = torch.cat([torch.zeros_like(framed[:, :1]), framed[:, :-1]], dim=1).flatten(0, 1)
            y = conv(f"decoder.{block}.conv.0", torch.cat([x, past], dim=1)).relu()
            y = conv(f"decoder.{block}.conv.4", conv(f"decoder.{block}.conv.2", y).relu())
            x = (x + y).relu()
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(f"decoder.{grow}.conv", x)
        x = x.view(x.shape[0] * stride, -1, *x.shape[2:])
        x = conv(f"decoder.{grow + 1}", x)
    frames = conv("decoder.22", x.relu())
    return frames.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [(3, 3, 1), (1,) * 7, (2, 5)])
def test_any_cut_of_a_clip_decodes_bit_for_bit_as_the_whole(weights, cut, dtype):
    latents = clip(7, batch=2)
    decoder = decoder_of(weights, dtype=dtype)
    whole = decoder.decode(latents)
    assert whole.shape == (2, 25, 24, 32, 3)
    assert whole.dtype == torch.float32
    decoder.reset()
    pieces = [decoder.decode(piece) for piece in latents.split(list(cut), dim=2)]
    # One frame per memory block of each of the three sizes is kept.
    assert decoder.cache_bytes == dtype.itemsize * 2 * 3 * 12 * (256 + 4 * 128 + 16 * 64)
    assert [piece.shape[1] for piece in pieces] == [4 * cut[0] - 3, *(4 * frames for frames in cut[1:])]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_each_tae_decodes_the_latents_that_it_was_made_for_less_the_first_three_frames(weights):
    latents = clip(4, batch=2, dtype=torch.float64)
    expected = whole_clip(weights, latents)[:, 3:]
    assert (expected.min() > 0, expected.max() < 1) == (True, True), "clamping would hide a difference"
    assert expected.std() > 0.02
    raw_expected = whole_clip(weights, denormalise_latents(latents))[:, 3:].clamp(0, 1)
    assert (raw_expected - expected).abs().max() > 0.05
    for made_for, frames in (("normalised", expected), ("raw", raw_expected)):
        decoder = decoder_of(weights, made_for, torch.float64)
        torch.testing.assert_close(decoder.decode(latents), frames, rtol=0, atol=1e-10)
        decoder.reset()
        given_raw = decoder.decode(denormalise_latents(latents), normalised=False)
        torch.testing.assert_close(given_raw, frames, rtol=0, atol=1e-10)


def test_a_decode_holds_its_largest_tensors_one_frame_at_a_time(weights):
    tae = tae_from_state_dict({name: tensor.to("meta") for name, tensor in weights.items()}, dtype=torch.bfloat16)
    decoder = StreamingDecoder(tae, tae_latents="raw", at_once=3)
    latents = torch.empty(1, 16, 3, 30, 52, device="meta")
    decoder.decode(latents)
    with AllocationPeak(convolutions_copy=True) as peak:
        frames = decoder.decode(latents)
    # 900 elements per pixel are what the decode node asks the host for; the frames themselves lie elsewhere.
    assert peak.peak - frames.nbytes < 900 * 2 * 240 * 416


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("taew2_1.pth", torch.float16, "normalised"),
        ("taew2_1.safetensors", torch.bfloat16, "normalised"),
        ("my_TAEWan2_1_copy.safetensors", None, "normalised"),
        ("lighttaew2_1.safetensors", torch.bfloat16, "raw"),
        ("vae_approx/lighttaew2_1.pth", torch.float16, "raw"),
        ("tiny.safetensors", torch.float16, "normalised"),
        ("tiny.safetensors", torch.bfloat16, "raw"),
        ("", None, "raw"),
    ],
)
def test_the_name_says_which_latents_a_file_takes_and_where_it_does_not_the_dtype(name, dtype, expected):
    assert tae_latents_of(name, dtype) == expected


def test_taes_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match=r"taehv.pth is the TAE of HunyuanVideo; use taew2_1 or lighttaew2_1"):
        tae_latents_of("models/vae_approx/taehv.pth", torch.float16)
    with pytest.raises(ValueError, match="pass tae_latents"):
        StreamingDecoder(tae_from_state_dict(weights))
    wan22, layered = tae_from_state_dict(weights), tae_from_state_dict(weights)
    wan22.decoder[1] = nn.Conv2d(48, 256, 3)
    layered.decoder[22] = nn.Conv2d(64, 12, 3)
    with pytest.raises(ValueError, match="48 latent channels instead of 16; use taew2_1"):
        StreamingDecoder(wan22, tae_latents="raw")
    with pytest.raises(ValueError, match="decodes to 12 channels instead of 3"):
        StreamingDecoder(layered, tae_latents="raw")
    with pytest.raises(ValueError, match="is not a Wan VAE"):
        StreamingEncoder(tae_from_state_dict(weights))
