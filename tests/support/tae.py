"""The decoder of taew2_1 as a plain module tree with the published names, and random weights for it."""

import torch
from torch import nn

LATENT_CHANNELS = 16
_WIDTHS = (256, 128, 64, 64)  # channels of the four resolutions, smallest size first
_DOUBLES_TIME = (False, True, True)  # which of the three up-samplings also double the frame rate


class SoftClamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """A residual block that sees the frame before: three convolutions over both, added to the frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, *others = (nn.Conv2d(width, channels, 3, padding=1) for width in (2 * channels, channels, channels))
        self.conv = nn.Sequential(first, nn.ReLU(), others[0], nn.ReLU(), others[1])
        self.skip = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x, past):
        """x and past, its frames one earlier (zeros before the first): [N, C, H, W] → the same shape."""
        return self.act(self.conv(torch.cat([x, past], dim=1)) + self.skip(x))


class TGrow(nn.Module):
    """`stride` frames out of each one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class TaeDecoder(nn.Module):
    """Latents → RGB in 0…1, 8 times larger and 4 times faster; `decoder` is a plain row of layers."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, _WIDTHS[0], 3, padding=1), nn.ReLU()]
        for level, doubles_time in enumerate(_DOUBLES_TIME):
            width, narrower = _WIDTHS[level : level + 2]
            layers += [MemBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TGrow(width, 2 if doubles_time else 1)]
            layers.append(nn.Conv2d(width, narrower, 3, padding=1, bias=False))
        layers += [nn.ReLU(), nn.Conv2d(_WIDTHS[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)


def tae_from_state_dict(weights, dtype=torch.float32):
    with torch.device("meta"):
        tae = TaeDecoder()
    tae.load_state_dict({name: weights[name].to(dtype) for name in tae.state_dict()}, assign=True)
    return tae.eval().requires_grad_(False)


def random_tae_state_dict(seed=0):
    """A random decoder under the published names whose frames lie inside 0…1."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in TaeDecoder().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    gains = {name: 0.05 if name.endswith("bias") else shape[1:].numel() ** -0.5 for name, shape in shapes.items()}
    made = {name: gains[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["decoder.22.weight"] *= 0.2
    made["decoder.22.bias"] += 0.5
    return made
