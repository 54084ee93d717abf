"""The tiny autoencoder's decoder (TAE) as a plain module tree, for use without ComfyUI: `taew2_1`, `lighttaew2_1`.

The tree only holds weights and runs one layer at a time; `streaming.py` drives it through time. Both files have the
same tensors in the same shapes and differ in what they decode, which no tensor tells: see `tae_latents_of`.
Source: taehv (MIT) and LightX2V's autoencoders (Apache-2.0).
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from .wan_vae import LATENT_CHANNELS

# What a TAE was made to decode: the DiT's normalised latents (taew2_1), or the VAE's own (lighttaew2_1).
TaeLatents: TypeAlias = Literal["normalised", "raw"]

_WIDTHS = (256, 128, 64, 64)  # channels of the four resolutions, smallest size first
_DOUBLES_TIME = (False, True, True)  # which of the three up-samplings also double the frame rate
_GET_THE_FILE = "use taew2_1 or lighttaew2_1"


class SoftClamp(nn.Module):
    """Bends values beyond ±3 back, so that no latent is out of range."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """A residual block that sees the frame before: three convolutions over both, added to the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def convolution(width: int) -> nn.Conv2d:
            return nn.Conv2d(width, channels, 3, padding=1)

        self.conv = nn.Sequential(
            convolution(2 * channels), nn.ReLU(), convolution(channels), nn.ReLU(), convolution(channels)
        )
        self.skip = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x and past, its frames one earlier (zeros before the first): [N, C, H, W] → the same shape."""
        return self.act(self.conv(torch.cat([x, past], dim=1)) + self.skip(x))


class TGrow(nn.Module):
    """`stride` frames out of each one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N · stride, C, H, W], the frames of one side by side."""
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class TaeDecoder(nn.Module):
    """Latents → RGB in 0…1, 8 times larger and 4 times faster; `decoder` is a plain row of layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, _WIDTHS[0], 3, padding=1), nn.ReLU()]
        for level, doubles_time in enumerate(_DOUBLES_TIME):
            width, narrower = _WIDTHS[level : level + 2]
            layers += [MemBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TGrow(width, 2 if doubles_time else 1)]
            layers.append(nn.Conv2d(width, narrower, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(_WIDTHS[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)


def tae_latents_of(file_name: str, stored_dtype: torch.dtype | None) -> TaeLatents:
    """Which latents a TAE file was made for: its name decides, and where that says nothing its stored dtype.

    `lighttae…` takes raw latents and `taew…` normalised ones. Without a telling name float16, in which taew2_1 is
    published, means normalised, any other dtype raw (lighttaew2_1 is published in bfloat16). Raises ValueError for
    a file whose name belongs to another video model.
    """
    stem = PurePath(file_name).stem.lower()
    if "lighttae" in stem:
        return "raw"
    if re.search(r"taew(?:an)?_?2", stem):
        return "normalised"
    if "taehv" in stem and "wan" not in stem:
        raise ValueError(f"{PurePath(file_name or '').name} is the TAE of HunyuanVideo; {_GET_THE_FILE}")
    return "normalised" if stored_dtype == torch.float16 else "raw"


def tae_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TaeDecoder:
    """Build the decoder that a TAE file's tensors describe; its encoder is not read.

    Without `dtype` and `device` the module shares the given tensors. It is in eval mode and needs no gradients.
    Raises ValueError when the tensors are not a whole TAE of Wan 2.1, saying what is wrong.
    """
    with torch.device("meta"):
        tae = TaeDecoder()
    expected = tae.state_dict()
    if "decoder.22.bias" not in state_dict:
        raise ValueError(f"not a TAE of Wan 2.1: no decoder.22.bias among {len(state_dict)} tensors; {_GET_THE_FILE}")
    for name, want in expected.items():
        if name not in state_dict:
            raise ValueError(f"the TAE lacks {name}; download the file again")
        if state_dict[name].shape != want.shape:
            found = tuple(state_dict[name].shape)
            raise ValueError(
                f"{name} has shape {found} where a TAE of Wan 2.1 has {tuple(want.shape)}; {_GET_THE_FILE}"
            )
    dtype = dtype or state_dict["decoder.22.bias"].dtype
    tae.load_state_dict({name: state_dict[name].to(device=device, dtype=dtype) for name in expected}, assign=True)
    return tae.eval().requires_grad_(False)


def is_tae(module: nn.Module) -> bool:
    """Whether a module tree, ours or the host's, is a TAE of any video model."""
    layers = getattr(module, "decoder", None)
    return isinstance(layers, nn.Sequential) and any(is_mem_block(layer) for layer in layers)


def check_tae(tae: Any) -> None:
    """Raise ValueError unless a TAE, ours or the host's, is one of Wan 2.1."""
    convolutions = [layer for layer in tae.decoder if isinstance(layer, nn.Conv2d)]
    latent, colours = convolutions[0].in_channels, convolutions[-1].out_channels
    if latent != LATENT_CHANNELS:
        raise ValueError(f"the TAE has {latent} latent channels instead of {LATENT_CHANNELS}; {_GET_THE_FILE}")
    if colours != 3:
        raise ValueError(f"the TAE decodes to {colours} channels instead of 3; {_GET_THE_FILE}")


def is_mem_block(layer: nn.Module) -> bool:
    """Whether a layer of the row wants the frame before besides its own."""
    return hasattr(layer, "skip")


def random_tae_state_dict(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random decoder under the published names whose frames lie inside 0…1, for demonstrations and tests."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in TaeDecoder().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        gain = 0.05 if name.endswith("bias") else shape[1:].numel() ** -0.5
        made[name] = (0.2 * gain if name.startswith("decoder.22") else gain) * values
    made["decoder.22.bias"] += 0.5
    return {name: tensor.to(dtype) for name, tensor in made.items()}
