"""Streaming decode and encode against a whole-clip evaluation written from the equations, without any cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder, StreamingEncoder
from lightforcing.lightforcing_core.vae.tiled import TiledDecoder
from lightforcing.lightforcing_core.vae.wan_vae import (
    LATENT_MEAN,
    LATENT_STD,
    denormalise_latents,
    random_vae_state_dict,
    vae_from_state_dict,
)

DIM = 4


def weights(dtype=torch.float64, dim=DIM, seed=0):
    """Random weights whose gammas are not all one."""
    state_dict = random_vae_state_dict(dim=dim, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state_dict.items():
        if name.endswith("gamma"):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return {name: tensor.to(dtype) for name, tensor in state_dict.items()}


def clip(frames, *, batch=1, height=4, width=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, frames, height, width, generator=generator, dtype=torch.float64).to(dtype)


class WholeClip:
    """The Wan VAE over a whole clip at once, straight from the tensors: every convolution padded with past zeros."""

    def __init__(self, state_dict):
        self.sd = state_dict

    def conv3d(self, name, x):
        weight = self.sd[name + ".weight"]
        time, height, width = weight.shape[2:]
        padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2, time - 1, 0))
        return F.conv3d(padded, weight, self.sd[name + ".bias"])

    def conv2d(self, name, x, **options):
        weight, bias = self.sd[name + ".weight"], self.sd[name + ".bias"]
        return torch.stack([F.conv2d(frame, weight, bias, **options) for frame in x.unbind(2)], dim=2)

    def norm(self, name, x):
        gamma = self.sd[name + ".gamma"].flatten().view(1, -1, 1, 1, 1)
        return x / x.square().mean(1, keepdim=True).sqrt() * gamma

    def residual(self, name, x):
        y = self.conv3d(name + ".residual.2", F.silu(self.norm(name + ".residual.0", x)))
        y = self.conv3d(name + ".residual.6", F.silu(self.norm(name + ".residual.3", y)))
        return y + (self.conv3d(name + ".shortcut", x) if name + ".shortcut.weight" in self.sd else x)

    def attention(self, name, x):
        b, c, t, h, w = x.shape
        q, k, v = self.conv2d(name + ".to_qkv", self.norm(name + ".norm", x)).flatten(3).chunk(3, dim=1)
        scores = torch.einsum("bctp,bcts->btps", q, k) / c**0.5
        mixed = torch.einsum("btps,bcts->bctp", scores.softmax(-1), v)
        return x + self.conv2d(name + ".proj", mixed.view(b, c, t, h, w))

    def middle(self, name, x):
        return self.residual(f"{name}.2", self.attention(f"{name}.1", self.residual(f"{name}.0", x)))

    def head(self, name, x):
        return self.conv3d(name + ".2", F.silu(self.norm(name + ".0", x)))

    def upsample(self, name, x):
        if name + ".time_conv.weight" in self.sd:
            first, rest = x[:, :, :1], x[:, :, 1:]
            frames = [first]
            if rest.shape[2]:
                doubled = self.conv3d(name + ".time_conv", rest)
                even, odd = doubled.chunk(2, dim=1)
                frames += [t for pair in zip(even.split(1, 2), odd.split(1, 2), strict=True) for t in pair]
            x = torch.cat(frames, dim=2)
        big = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv2d(name + ".resample.1", big, padding=1)

    def downsample(self, name, x):
        x = self.conv2d(name + ".resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
        if name + ".time_conv.weight" in self.sd and x.shape[2] > 1:
            weight, bias = self.sd[name + ".time_conv.weight"], self.sd[name + ".time_conv.bias"]
            x = torch.cat([x[:, :, :1], F.conv3d(x, weight, bias, stride=(2, 1, 1))], dim=2)
        return x

    def decode(self, latents):
        mean, std = (latents.new_tensor(v).view(1, 16, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        x = self.conv3d("decoder.conv1", self.conv3d("conv2", latents * std + mean))
        x = self.middle("decoder.middle", x)
        for i in range(15):
            layer = self.upsample if i in (3, 7, 11) else self.residual
            x = layer(f"decoder.upsamples.{i}", x)
        x = self.head("decoder.head", x)
        return ((x + 1) / 2).permute(0, 2, 3, 4, 1)

    def encode(self, frames):
        x = self.conv3d("encoder.conv1", frames.permute(0, 4, 1, 2, 3) * 2 - 1)
        for i in range(11):
            layer = self.downsample if i in (2, 5, 8) else self.residual
            x = layer(f"encoder.downsamples.{i}", x)
        x = self.head("encoder.head", self.middle("encoder.middle", x))
        mean, std = (x.new_tensor(v).view(1, 16, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        return (self.conv3d("conv1", x)[:, :16] - mean) / std


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_streamed_decode_equals_the_whole_clip_evaluation(at_once):
    latents = clip(6, batch=2)
    expected = WholeClip(weights()).decode(latents)
    decoder = StreamingDecoder(vae_from_state_dict(weights()), at_once=at_once)
    frames = torch.cat([decoder.decode(piece) for piece in latents.split((2, 4), dim=2)], dim=1)
    assert expected.min() > 0, "clamping would hide a difference"
    assert expected.max() < 1, "clamping would hide a difference"
    assert expected.std() > 0.01
    assert frames.dtype == torch.float64
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-10)
    decoder.reset()
    raw = decoder.decode(denormalise_latents(latents), normalised=False)
    torch.testing.assert_close(raw, frames, rtol=0, atol=1e-12)


def test_encode_in_any_cut_equals_the_whole_clip_evaluation():
    frames = torch.rand(2, 13, 24, 16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, vae = WholeClip(weights()).encode(frames), vae_from_state_dict(weights())
    latents = StreamingEncoder(vae).encode(frames)
    assert latents.shape == (2, 16, 4, 3, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-10)
    raw = StreamingEncoder(vae).encode(frames, normalised=False)
    torch.testing.assert_close(raw, denormalise_latents(latents), rtol=0, atol=1e-12)
    encoder = StreamingEncoder(vae)
    assert torch.equal(torch.cat([encoder.encode(piece) for piece in frames.split((1, 8, 4), dim=1)], dim=2), latents)
    with pytest.raises(ValueError, match=r"5 video frames are not 0 \+ 4k; use 4 or 8"):
        encoder.encode(frames[:, :5])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [(3, 3, 1, 2), (1,) * 9, (2, 7), (8, 1)])
def test_any_cut_of_a_clip_decodes_bit_for_bit_as_the_whole(cut, dtype, device):
    latents = clip(9, batch=2, height=2, width=3, dtype=torch.float32)
    decoder = StreamingDecoder(vae_from_state_dict(weights(dtype), device=device), at_once=1)
    whole = decoder.decode(latents)
    decoder.reset()
    pieces = [decoder.decode(piece) for piece in latents.split(list(cut), dim=2)]
    assert pieces[0].shape[1] == 4 * cut[0] - 3
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3, 4), (2, 0, 3, 4, 1), (4, 3, 2, 1, 0)])
def test_the_memory_layout_of_the_latents_does_not_change_a_bit(permutation):
    latents = clip(3, dtype=torch.float32)
    decoder = StreamingDecoder(vae_from_state_dict(weights(torch.float32)))
    whole = decoder.decode(latents)
    decoder.reset()
    inverse = [permutation.index(axis) for axis in range(5)]
    assert torch.equal(decoder.decode(latents.permute(permutation).contiguous().permute(inverse)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frames_are_float32_and_clamped_to_0_1_whatever_the_modules_dtype(dtype):
    state_dict = weights(dtype)
    state_dict["decoder.head.2.bias"] = torch.tensor([5.0, -5.0, 0.0], dtype=dtype)
    vae = vae_from_state_dict(state_dict)
    seen = []
    vae.decoder.head[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    frames = StreamingDecoder(vae).decode(clip(2, dtype=torch.float32))
    assert set(seen) == {dtype}
    assert frames.dtype == torch.float32
    assert (frames[..., 0] == 1).all()
    assert (frames[..., 1] == 0).all()
    assert 0.2 < frames[..., 2].mean() < 0.8


def test_cache_does_not_grow_with_length_and_pins_no_larger_tensor():
    decoder = StreamingDecoder(vae_from_state_dict(weights(torch.float32)))
    sizes = []
    for piece in clip(7, dtype=torch.float32).split(1, dim=2):
        decoder.decode(piece)
        sizes.append(decoder.cache_bytes)
    # Two past frames in front of each cached convolution; positions per frame times channels, by size: conv1 and two
    # middle blocks, then three blocks per size with a time_conv after two of them.
    channels = 16 + 16 * (4 + 6 + 1), 8 + 16 + 16 * 4 + 16, 8 * 6, 4 * 6 + 4
    values = sum(24 * 4**level * count for level, count in enumerate(channels))
    assert sizes[2:] == [2 * 4 * values] * 5
    decoder.reset()
    assert decoder.cache_bytes == 0
    assert decoder.decode(clip(1, height=2, width=2, dtype=torch.float32)).shape == (1, 1, 16, 16, 3)


def test_a_call_that_broke_off_ends_the_clip_until_reset():
    vae = vae_from_state_dict(weights(torch.float32))
    decoder = StreamingDecoder(vae)
    latents = clip(3, dtype=torch.float32)
    expected = decoder.decode(latents)
    decoder.reset()
    decoder.decode(latents[:, :, :1])
    runs = []

    def run_out_of_memory(module, args):
        runs.append(module)
        if len(runs) == 2:
            raise MemoryError("no room")

    with vae.decoder.head[2].register_forward_pre_hook(run_out_of_memory), pytest.raises(MemoryError, match="no room"):
        decoder.decode(latents[:, :, 1:])
    assert decoder.cache_bytes == 0
    with pytest.raises(RuntimeError, match=r"failed; call reset\(\)"):
        decoder.decode(latents[:, :, 1:])
    decoder.reset()
    assert torch.equal(decoder.decode(latents), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["decoder.head.2.bias", "decoder.conv1.bias", "encoder.head.2.bias"])
def test_a_vae_that_makes_nan_or_infinity_is_named_with_its_dtype(bad, name):
    state_dict = weights(torch.float32)
    state_dict[name][1] = bad
    vae = vae_from_state_dict(state_dict)
    runs = [lambda: StreamingEncoder(vae).encode(torch.rand(1, 1, 16, 16, 3))]
    if name.startswith("decoder"):
        tiled = TiledDecoder(lambda: StreamingDecoder(vae), 2)
        latents = clip(1, dtype=torch.float32, width=24)
        runs = [lambda: StreamingDecoder(vae).decode(latents), lambda: tiled.decode(latents)]
    for run in runs:
        with pytest.raises(ValueError, match=r"video holds NaN or infinity; .*the VAE computes in torch\.float32"):
            run()


def test_latents_that_cannot_continue_the_clip_are_refused_and_it_goes_on():
    decoder = StreamingDecoder(vae_from_state_dict(weights(torch.float32)))
    latents = clip(2, dtype=torch.float32)
    whole = decoder.decode(latents)
    decoder.reset()
    decoder.decode(latents[:, :, :1])
    for shape, message in (
        ((16, 3, 4, 6), r"\(16, 3, 4, 6\) are not \[B, 16, frames, h, w\]"),
        ((1, 48, 3, 4, 6), r"\(1, 48, 3, 4, 6\) are not \[B, 16"),
        ((1, 16, 0, 4, 6), "are empty"),
        ((2, 16, 1, 4, 6), r"\(2, 4, 6\) do not continue a clip of \(1, 4, 6\); call reset\(\)"),
        ((1, 16, 1, 4, 8), r"\(1, 4, 8\) do not continue a clip of \(1, 4, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode(torch.zeros(shape))
    assert torch.equal(decoder.decode(latents[:, :, 1:]), whole[:, 1:])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 82, 16, 16, 3), r"82 video frames are not 1 \+ 4k; use 81 or 85"),
        ((1, 1, 500, 16, 3), "height 500 is not a multiple of 8; use 496 or 504"),
        ((1, 1, 16, 7, 3), "width 7 is not a multiple of 8; use 8"),
        ((1, 1, 16, 16, 4), r"not \[B, frames, H, W, 3\]"),
        ((1, 16, 16, 3), r"not \[B, frames, H, W, 3\]"),
        ((1, 0, 16, 16, 3), r"\(1, 0, 16, 16, 3\) are not"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused_with_the_nearest_that_can(shape, message):
    with pytest.raises(ValueError, match=message):
        StreamingEncoder(vae_from_state_dict(weights(torch.float32))).encode(torch.zeros(shape))


def test_modules_that_are_no_wan_vae_are_refused():
    with pytest.raises(ValueError, match="Linear is not a Wan VAE"):
        StreamingDecoder(nn.Linear(2, 2))
    wan22, layered = (vae_from_state_dict(weights(torch.float32)) for _ in range(2))
    wan22.conv2 = nn.Conv3d(48, 48, 1)
    with pytest.raises(ValueError, match="48 latent channels instead of 16"):
        StreamingDecoder(wan22)
    layered.decoder.head[2] = nn.Conv3d(DIM, 12, 3)
    with pytest.raises(ValueError, match="decodes to 12 channels instead of 3"):
        StreamingEncoder(layered).encode(torch.zeros(1, 1, 8, 8, 3))
