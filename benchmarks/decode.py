"""`bench decode`: a chunk through LightVAE, Wan's own VAE and a TAE, with random weights."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.pinned import Weights, indexed
from ..lightforcing_core.vae.graph import PassGraph
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.wan_vae import LATENT_CHANNELS, random_vae_state_dict, vae_from_state_dict
from .console import Put
from .layer import FRAMES
from .settings import DecodeBench, Say
from .timing import describe, ratio, spread, take_turns

TAE_WIDTHS = 256, 128, 64, 64  # channels of the four resolutions of taew2_1, the smallest picture first


class MemBlock(nn.Module):
    """A residual block over a frame and the one before it, as `taehv.is_mem_block` knows it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = 2 * channels, channels, channels
        layers = [part for size in sizes for part in (nn.Conv2d(size, channels, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        self.skip = nn.Identity()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def random_tae() -> nn.Module:
    """The decoder of taew2_1 with its published names: `decoder` is a plain row of layers."""
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, TAE_WIDTHS[0], 3, padding=1), nn.ReLU()]
    for width, narrower, frames in zip(TAE_WIDTHS, TAE_WIDTHS[1:], (1, 2, 2), strict=False):
        layers += [MemBlock(width), MemBlock(width), MemBlock(width), nn.Upsample(scale_factor=2)]
        conv = nn.Conv2d(width, frames * width, 1, bias=False)
        split, join = nn.Unflatten(1, (frames, width)), nn.Flatten(0, 1)
        layers.append(nn.Sequential(OrderedDict(conv=conv, split=split, join=join)))
        layers.append(nn.Conv2d(width, narrower, 3, padding=1, bias=False))
    layers += [nn.ReLU(), nn.Conv2d(TAE_WIDTHS[-1], 3, 3, padding=1)]
    return nn.ModuleDict({"decoder": nn.Sequential(*layers)}).eval().requires_grad_(False)


def measure(bench: DecodeBench, put: Put, say: Say = str) -> None:
    """Time each decoder, on a GPU as a graph too."""
    device, dtype = bench.place.prepare()
    describe(put, device, "decode", bench)
    trees: dict[str, nn.Module] = {"TAE": random_tae().to(device, dtype)}
    for dim in bench.vae_dims:
        trees[f"VAE {dim}"] = vae_from_state_dict(random_vae_state_dict(dim=dim), dtype=dtype, device=device)
    shape = 1, LATENT_CHANNELS, FRAMES, *bench.picture.latent
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    arms: dict[str, Callable[[], object]] = {}
    for name, tree in trees.items():
        graphs: list[PassGraph | None] = [None]
        if CudaRecorder.why_not(device) is None:
            weights = Weights(tree, indexed(device))
            weights.hold()
            graphs.append(PassGraph(CudaRecorder(device, lane=f"decode {name}"), weights, None))
        for graph in graphs:
            decoder = StreamingDecoder(tree, tae_latents="normalised", graph=graph)
            arms[f"{name} graph" if graph else name] = partial(decoder.decode, latents, trusted=True)
    taken = take_turns(arms, bench.repeats, device, put)
    for name, ms in taken.items():
        put("decode", name, {"ms per chunk": spread(ms), "times as fast as TAE": ratio(taken["TAE"], ms)})
