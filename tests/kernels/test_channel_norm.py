"""The decoder's norm kernel against the VAE's own modules in float64, and the decoders that run it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_iter

pytest.importorskip("triton")

from laboratory.launches import Launches
from lightforcing.kernels import channel_norm, device
from lightforcing.lightforcing_core.vae import norm
from lightforcing.lightforcing_core.vae.streaming import StreamingDecoder
from lightforcing.lightforcing_core.vae.wan_vae import ChannelNorm, WanVAE, random_vae_state_dict, vae_from_state_dict

from ..support.attention_problems import DEVICE

EPS = 1e-12
HALF_ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7.99, torch.float16: 2**-10.99}


def problem(batch, channels, frames, height, width, dtype):
    """(past, x, norm): positions of zeros, of huge and of tiny values among ordinary ones."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, 2 + frames, height, width, generator=generator)
    x[..., 0, 0], x[..., 0, -1], x[..., -1, -1] = 0.0, 3e-5 * x[..., 0, -1], 6e3 * x[..., -1, -1]
    past, x = (
        part.to(DEVICE, dtype).contiguous(memory_format=channel_norm.LAYOUT) for part in (x[:, :, :2], x[:, :, 2:])
    )
    module = ChannelNorm(channels, 3).to(DEVICE, dtype).requires_grad_(False)
    module.gamma += 0.3 * torch.randn(module.gamma.shape, generator=generator).to(DEVICE, dtype)
    return past, x, module


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 4, 1, 2, 3), (1, 24, 2, 5, 7), (1, 96, 3, 9, 5), (2, 384, 3, 1, 3), (1, 8, 12, 17, 16), (1, 1, 1, 1, 1)],
)
def test_kernel_and_torch_round_the_modules_result_once_behind_the_kept_frames(size, dtype, monkeypatch):
    past, x, module = problem(*size, dtype)
    exact = F.silu(module.double()(x.double()))
    module.to(dtype)
    for devices in (norm.DEVICES, (DEVICE,)):
        monkeypatch.setattr(norm, "DEVICES", devices)
        kept = past.clone()
        # A layout of its own costs a copy, and nothing else.
        given = x.clone(memory_format=torch.contiguous_format) if size[0] == 2 else x
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        got = norm.joined(kept, given, module)
        torch.use_deterministic_algorithms(False)
        assert got.is_contiguous(memory_format=channel_norm.LAYOUT)
        assert torch.equal(got[:, :, :2], past)
        assert torch.equal(kept, got[:, :, -2:])
        far = (got[:, :, 2:].double() - exact).abs()
        assert (far <= HALF_ULP[dtype] * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_decoder_with_the_kernel_is_as_close_to_float64_as_one_without(at_once, monkeypatch):
    state_dict = random_vae_state_dict(dim=8)
    latents = torch.randn(1, 16, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    exact = StreamingDecoder(vae_from_state_dict(state_dict, dtype=torch.float64, device=DEVICE)).decode(latents)
    errors = []
    for devices in ((), (DEVICE,)):
        monkeypatch.setattr(norm, "DEVICES", devices)
        decoder = StreamingDecoder(
            vae_from_state_dict(state_dict, dtype=torch.bfloat16, device=DEVICE), at_once=at_once
        )
        frames = torch.cat([decoder.decode(piece) for piece in latents.split((3, 3), dim=2)], dim=1)
        errors.append((frames - exact).square().mean().sqrt())
    assert errors[1] <= 1.1 * errors[0] <= 0.01


def test_launcher_refuses_with_the_value():
    with pytest.raises(ValueError, match=r"past must be torch.float32 \(1, 4, 2, 3, 4\)"):
        channel_norm.norm_silu_behind(*(torch.zeros(1, 4, 2, 3, n, device=DEVICE) for n in (3, 4)), None, 2.0, EPS)


class Traffic(Launches):
    """Also the bytes that the kernels read and write; convolutions keep their input's layout, as they do on a GPU."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.count.total()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default:
            layouts = {4: torch.channels_last, 5: channel_norm.LAYOUT}
            out = out.contiguous(memory_format=layouts[out.ndim])
        if self.count.total() > before:
            self.add(args, kwargs, out)
        return out

    def add(self, *tensors):
        self.moved += sum(x.nbytes for x in tree_iter(tensors) if isinstance(x, torch.Tensor))

    def __getitem__(self, grid):  # the kernel, which reads and replaces the kept frames
        def launch(x, past, gamma, out, *_, **__):
            self.count["_norm_silu"] += 1
            self.add(x, past, past, out)

        return launch


@pytest.mark.parametrize(("dim", "gigabytes"), [(24, 50.7), (96, 193.0)])
def test_a_chunk_takes_a_sixth_of_the_launches_and_less_than_half_of_the_traffic(dim, gigabytes, monkeypatch):
    """Before, 946 launches and so many gigabytes for three latent frames at 480×832."""
    traffic = Traffic()
    monkeypatch.setattr(norm, "DEVICES", ("meta",))
    monkeypatch.setattr(channel_norm, "_norm_silu", traffic)
    monkeypatch.setattr(device, "why_not", lambda *_: None)
    with torch.device("meta"):
        decoder = StreamingDecoder(WanVAE(dim).to(torch.bfloat16), at_once=3)
        chunk = torch.empty(1, 16, 3, 60, 104)
    decoder.decode(chunk)
    traffic.count.clear()
    traffic.moved = 0
    with traffic:
        decoder.decode(chunk, trusted=True)
    assert traffic.count["_norm_silu"] == 29
    assert traffic.count.total() <= 946 / 6
    assert traffic.moved <= 1e9 * gigabytes / 2
