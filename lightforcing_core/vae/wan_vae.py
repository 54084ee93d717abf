"""The Wan 2.1 VAE (dim 96) and LightVAE (dim 24) as a module tree without ComfyUI.

`streaming.py` drives it. Names and shapes are those of `Wan2.1_VAE.pth` and `lightvaew2_1.safetensors`: 194 tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..pinned import to_device

LATENT_CHANNELS = 16

# Per-channel statistics of the VAE's own latents (Wan 2.1). The DiT works on (latent - mean) / std.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

_WIDTHS = (1, 2, 4, 4)  # channels of the four resolutions, full size first, in units of dim
_HALVES_TIME = (False, True, True)  # which of the three down-samplings also halve the frame rate
_OTHER_KINDS = {  # by what a tensor's name begins with
    r".*patch_embedding\.": "a diffusion model (patch_embedding), not a VAE",
    r"taesd|decoder\.1\.|decoder\.3\.conv\.|encoder\.0\.weight": "a tiny autoencoder (TAE)",
    r"decoder\.mid_block\.": "a VAE under diffusers' tensor names",
}
_GET_THE_FILE = "use Wan2.1_VAE.pth, wan_2.1_vae.safetensors or lightvaew2_1.safetensors"


def normalise_latents(latents: Tensor) -> Tensor:
    """VAE latents [B, 16, f, h, w] → the DiT's space."""
    mean, std = _statistics(latents)
    return (latents - mean) / std


def denormalise_latents(latents: Tensor) -> Tensor:
    """Latents [B, 16, f, h, w] in the DiT's space → the VAE's own."""
    mean, std = _statistics(latents)
    return latents * std + mean


def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.tensor([LATENT_MEAN, LATENT_STD], dtype=latents.dtype).view(2, 1, -1, 1, 1, 1)
    # Copied without waiting: a decode on a second stream would wait for the sampling.
    mean, std = to_device(both, latents.device)
    return mean, std


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution padded in time only at its start."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2), **options)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """x [B, C, T, H, W] → T frames; `past`: kernel − 1 frames, else zeros. With a stride, x brings its own."""
        if past is not None:
            x = torch.cat([past, x], dim=2)
        elif self.kernel_size[0] > 1 and self.stride[0] == 1:
            x = F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0))
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Scale each position's channel vector to root mean square 1, then by `gamma`."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.normalize(x, dim=1) * self.scale * self.gamma
        return y


class ResidualBlock(nn.Module):
    """Two normed causal convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_channels, 3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            ChannelNorm(out_channels, 3),
            nn.SiLU(),
            nn.Identity(),  # training's dropout; it holds the place of index 5
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames, height = x.shape[2], x.shape[3]
        flat = rearrange(x, "b c t h w -> (b t) c h w")
        # The fused attention kernels want each token's channels side by side in memory.
        q, k, v = rearrange(self.to_qkv(self.norm(flat)), "n (three c) h w -> three n 1 (h w) c", three=3).contiguous()
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
        y: Tensor = x + rearrange(self.proj(mixed), "(b t) c h w -> b c t h w", t=frames)
        return y


class Upsample(nn.Module):
    """Twice the size, half the channels; with `time_conv` twice the frames."""

    def __init__(self, channels: int, grows_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        if grows_time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))


class Downsample(nn.Module):
    """Half the size; with `time_conv` also half the frames."""

    def __init__(self, channels: int, halves_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if halves_time:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def _head(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, out_channels, (3, 3, 3)))


class Encoder(nn.Module):
    """RGB → mean and log-variance of the latents, 8 times smaller and 4 times slower."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        layers: list[nn.Module] = []
        channels = dim
        for level, width in enumerate(_WIDTHS):
            for _ in range(2):
                layers.append(ResidualBlock(channels, width * dim))
                channels = width * dim
            if level < 3:
                layers.append(Downsample(channels, _HALVES_TIME[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(channels)
        self.head = _head(channels, 2 * LATENT_CHANNELS)


class Decoder(nn.Module):
    """Latents → RGB, 8 times larger and 4 times faster."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        channels = _WIDTHS[-1] * dim
        self.conv1 = CausalConv3d(LATENT_CHANNELS, channels, (3, 3, 3))
        self.middle = _middle(channels)
        layers: list[nn.Module] = []
        for level in reversed(range(4)):
            for _ in range(3):
                layers.append(ResidualBlock(channels, _WIDTHS[level] * dim))
                channels = _WIDTHS[level] * dim
            if level > 0:
                layers.append(Upsample(channels, _HALVES_TIME[level - 1]))
                channels //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(channels, 3)


class WanVAE(nn.Module):
    """Encoder, decoder and the two 1×1×1 convolutions between them and the latents."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1))
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1))
        self.decoder = Decoder(dim)


def check_channels(kind: str, latent: int, colours: int, way_out: str) -> None:
    """ValueError unless a decoder takes Wan 2.1's latents and gives colours."""
    if latent != LATENT_CHANNELS:
        raise ValueError(f"the {kind} has {latent} latent channels instead of {LATENT_CHANNELS}; {way_out}")
    if colours != 3:
        raise ValueError(f"the {kind} decodes to {colours} channels instead of 3; {way_out}")


def vae_from_state_dict(
    state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> WanVAE:
    """Build the Wan 2.1 VAE or LightVAE that a file's tensors describe.

    Without `dtype` and `device` the module shares the tensors. It is in eval mode and needs no gradients.
    Raises ValueError if the tensors are not a complete Wan 2.1 VAE, and names their likely kind.
    """
    if found := _not_a_wan_vae(state_dict):
        raise ValueError(f"not a Wan 2.1 VAE: found {found}; {_GET_THE_FILE}")
    dim = state_dict["decoder.head.0.gamma"].numel()
    with torch.device("meta"):
        vae = WanVAE(dim)
    dtype = dtype or state_dict["conv2.weight"].dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"the VAE's tensors are {dtype}, which cannot be computed in; pass dtype=torch.bfloat16")
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in state_dict.items()}  # memory may run out
    try:
        vae.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip()
        raise ValueError(f"not a whole Wan VAE of dim {dim}: {problem:.300}; {_GET_THE_FILE}") from None
    return vae.eval().requires_grad_(False)


def _not_a_wan_vae(state_dict: Mapping[str, Tensor]) -> str | None:
    """The kind of file that these tensors are instead of a Wan 2.1 VAE, or None."""
    if not state_dict:
        return "no tensors at all"
    for beginning, kind in _OTHER_KINDS.items():
        if any(re.match(beginning, name) for name in state_dict):
            return kind
    for name in ("conv2.weight", "decoder.head.0.gamma"):
        if not isinstance(state_dict.get(name), Tensor):
            return f"no {name} among its {len(state_dict)} entries (first: {next(iter(state_dict))})"
    channels = state_dict["conv2.weight"].shape[0]
    if channels != LATENT_CHANNELS:
        which = "the Wan 2.2 VAE" if channels == 48 else "another model's VAE"
        return f"{which} with {channels} latent channels instead of {LATENT_CHANNELS}"
    return None


def random_vae_state_dict(*, dim: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random Wan VAE of width `dim`, smooth in space: it paints soft colours well inside 0…1 instead of noise."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in WanVAE(dim).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_tensor(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("gamma"):
        return torch.ones(shape)
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.05 * values
    if "upsamples" in name and "time_conv" in name:
        # The two frames that come from one are similar.
        half = shape[0] // 2
        values[half:] = 0.9 * values[:half] + 0.4 * values[half:]
    for axis in range(2, len(shape)):
        if shape[axis] == 3:
            bell = torch.tensor([0.5, 1.0, 0.5]).view(3, *(1,) * (len(shape) - 1 - axis))
            values = (3**0.5 * values.mean(axis, keepdim=True) + 0.3 * values) * bell
    gain = 0.15 if name == "decoder.head.2.weight" else 1.0
    norms: Tensor = values.flatten(1).norm(dim=1).view(-1, *(1,) * (len(shape) - 1))
    return gain * values / norms
