"""Chunk-wise VAE: decode latents as they arrive, and encode video by pieces.

The layers keep the last frames they saw, so a clip cut into any calls decodes bit for bit as it does in one. They are
reached by the published attribute names, so ComfyUI's module trees and ours both work.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from ..refusal import NotFinite, check_finite, check_size, is_finite
from .graph import PassGraph
from .norm import joined
from .taehv import TaeLatents, check_tae, is_mem_block, is_tae
from .wan_vae import LATENT_CHANNELS, check_channels, denormalise_latents, normalise_latents

Tree: TypeAlias = Any  # a module tree with the published attribute names: ComfyUI's or ours

PAST_FRAMES = 2  # a causal kernel of 3 looks back at two frames
FRAMES_AT_ONCE = 3  # latent frames that a GPU decodes at once: a third of the kernels, for more memory
CHANNELS_LAST = torch.channels_last_3d  # the layout in which convolutions and norms are fastest


class StreamingDecoder:
    """Decode one clip over any number of calls: Wan 2.1 VAE, LightVAE or TAE.

    dtype, device: the module's own by default.
    tae_latents: the latents that a TAE decodes, see `tae_latents_of`; ignored for the others, which take raw ones.
    graph: runs passes after a clip's first two, see `PassGraph`.
    at_once: latent frames per pass through the layers; by default 1 on a CPU, where a pass's length changes rounding.

    Raises ValueError if the module is none of these, or a TAE without `tae_latents`.
    """

    extremes: Tensor  # of the last call's frames, before they were clamped
    tree: nn.ModuleList  # the layers that decode

    def __init__(
        self,
        vae_module: Tree,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tae_latents: TaeLatents | None = None,
        at_once: int | None = None,
        graph: PassGraph | None = None,
    ) -> None:
        self._stack: _CausalStack | _TaeStack
        self._takes_normalised = False
        if is_tae(vae_module):
            check_tae(vae_module)
            if tae_latents is None:
                raise ValueError("a TAE does not tell which latents it decodes; pass tae_latents, see tae_latents_of")
            self._takes_normalised = tae_latents == "normalised"
            self.tree, self._lowest = nn.ModuleList(vae_module.decoder), 0.0
            self._stack = _TaeStack(self.tree)
        else:
            _check_wan_vae(vae_module, "use the Wan 2.1 VAE, LightVAE, taew2_1 or lighttaew2_1")
            decoder, first = vae_module.decoder, vae_module.conv2
            self.tree = nn.ModuleList((first, decoder.conv1, *decoder.middle, *decoder.upsamples, decoder.head))
            self._stack, self._lowest = _CausalStack(self.tree), -1.0
        self._place = _place(vae_module, dtype, device)
        self._at_once = at_once or (FRAMES_AT_ONCE if self._place[1].type == "cuda" else 1)
        self._graph = graph
        self.reset()

    def reset(self) -> None:
        """Forget the clip and free its cache; the next latent frame is a first one."""
        self._stack.reset()
        if self._graph:
            self._graph.free()
        self._shape: tuple[int, int, int] | None = None
        self._seen = 0  # latent frames
        self._broken = False

    @property
    def cache_bytes(self) -> int:
        """Bytes held between calls; constant from the third latent frame on."""
        return sum(past.untyped_storage().nbytes() for past in self._stack.past.values())

    def move_cache(self, device: torch.device | str | None = None) -> None:
        """Move the cache to `device`; None moves it back, which a decode needs."""
        for layer, past in self._stack.past.items():
            # A dry run on the meta device has nothing to move.
            self._stack.past[layer] = past if past.is_meta else past.to(device or self._place[1])

    @torch.no_grad()
    def decode(self, latents: Tensor, *, normalised: bool = True, trusted: bool = False) -> Tensor:
        """Decode the clip's next latent frames.

        [B, 16, f, h, w] → [B, video frames, 8h, 8w, 3] in 0…1, float32 (float64 from a float64 module). A clip's first
        latent frame gives 1 video frame, each later one 4. normalised: latents are in the DiT's space, not the VAE's
        own. trusted: skip the checks that latents and frames are finite, which wait for the device; `check` does the
        latter with `extremes`. Raises ValueError for a wrong or changing shape, and for NaN and infinity (NotFinite if
        they are the VAE's own), RuntimeError if an earlier call of the clip failed.
        """
        self._accept(latents, trusted)
        dtype, device = self._place
        wide = torch.promote_types(torch.float32, dtype)
        batch, _, count, height, width = latents.shape
        total = 4 * count - (3 if self._stack.at_start else 0)
        frames = torch.empty(batch, total, 8 * height, 8 * width, 3, dtype=wide, device=device)
        done = 0
        try:
            for latent in latents.split(self._passes(count), dim=2):
                z = latent.to(device=device, dtype=wide)
                if normalised != self._takes_normalised:
                    z = denormalise_latents(z) if normalised else normalise_latents(z)
                # The same memory layout for every split, so that the same kernels run.
                z = z.to(dtype).clone(memory_format=CHANNELS_LAST)
                pixels = self._pixels(z)
                new = frames[:, done : done + pixels.shape[2]]
                new.copy_(rearrange(pixels, "b c t h w -> b t h w c"))
                done += pixels.shape[2]
            self.extremes = torch.stack(frames.aminmax())
            if not trusted:
                self.check(self.extremes)
        except BaseException:
            self.reset()
            self._broken = True
            raise
        return frames.sub_(self._lowest).div_(1 - self._lowest).clamp_(0, 1)

    def _pixels(self, z: Tensor) -> Tensor:
        if self._graph is None or self._stack.at_start:
            return self._stack(z)
        return self._graph(self._stack, z, self._stack.past)

    def _passes(self, count: int) -> list[int]:
        """Latent frames per pass: cut after the first and at multiples of `at_once`, whatever the calls."""
        start, end = self._seen, self._seen + count
        self._seen = end
        cuts = [frame for frame in range(start + 1, end) if frame == 1 or frame % self._at_once == 0]
        return [after - before for before, after in pairwise([start, *cuts, end])]

    def check(self, extremes: Tensor) -> None:
        if not is_finite(extremes):
            raise NotFinite("the decoded video", "holds NaN or infinity", _remedy(self._place[0]))

    def _accept(self, latents: Tensor, trusted: bool) -> None:
        if self._broken:
            raise RuntimeError("an earlier decode() of this clip failed; call reset() and decode from its first frame")
        shape = tuple(latents.shape)
        if len(shape) != 5 or shape[1] != LATENT_CHANNELS or 0 in shape:
            raise ValueError(f"latents of shape {shape} are not [B, {LATENT_CHANNELS}, frames, h, w], or are empty")
        if not trusted:
            check_finite("the latent", latents, "sample it again: NaN would spread to every later frame")
        batch, _, _, height, width = shape
        if self._shape not in (None, (batch, height, width)):
            raise ValueError(
                f"latents of {(batch, height, width)} do not continue a clip of {self._shape}; call reset()"
            )
        self._shape = (batch, height, width)


class StreamingEncoder:
    """Encodes one clip over any number of calls with a Wan 2.1 VAE or LightVAE.

    dtype, device: the module's own by default.

    Raises ValueError if the module is neither.
    """

    def __init__(
        self, vae_module: Tree, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        _check_wan_vae(vae_module, "use the Wan 2.1 VAE or LightVAE")
        encoder, last = vae_module.encoder, vae_module.conv1
        self._stack = _CausalStack((encoder.conv1, *encoder.downsamples, *encoder.middle, encoder.head, last))
        self._place = _place(vae_module, dtype, device)

    @torch.no_grad()
    def encode(self, frames: Tensor, *, normalised: bool = True) -> Tensor:
        """Encode the next frames [B, n, H, W, 3] → latents [B, 16, n / 4, H/8, W/8].

        A clip's first call takes 1 + 4k frames. The mean of the posterior, in the DiT's space unless `normalised` is
        False, float32 (float64 from a float64 module). Raises ValueError for another frame count, a size that is not
        a multiple of 8, a wrong shape, NaN or infinity.
        """
        first = [1] if self._stack.at_start else []
        _check_frames(frames, first=len(first))
        dtype, device = self._place
        wide = torch.promote_types(torch.float32, dtype)
        means = []
        for group in frames.split(first + [4] * (frames.shape[1] // 4), dim=1):
            pixels = rearrange(group.to(device=device, dtype=wide) * 2 - 1, "b t h w c -> b c t h w")
            mean, _ = self._stack(pixels.to(dtype).contiguous(memory_format=CHANNELS_LAST)).chunk(2, dim=1)
            means.append(mean.to(wide))
        latents = torch.cat(means, dim=2)
        check_finite("the encoded video", latents, f"check its frames; {_remedy(dtype)}")
        return normalise_latents(latents) if normalised else latents


class _Stack:
    """Layers that run over a clip piece by piece, with the past frames that they need."""

    def __init__(self, layers: Iterable[Tree]) -> None:
        self._layers = tuple(layers)
        self.reset()

    def reset(self) -> None:
        self.at_start = True
        self.past: dict[nn.Module, Tensor] = {}


class _CausalStack(_Stack):
    """The layers of a Wan VAE."""

    def __call__(self, x: Tensor) -> Tensor:
        """The clip's next frames [B, C, T, H, W]; its first call must bring exactly one."""
        for layer in self._layers:
            x = self._run(layer, x)
        self.at_start = False
        return x

    def _run(self, layer: Tree, x: Tensor) -> Tensor:
        if hasattr(layer, "residual"):
            y = self._run(layer.residual, x)
            shortcut: Tensor = layer.shortcut(x)
            return y + shortcut
        if hasattr(layer, "resample"):
            return self._resample(layer, x)
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] > 1:
            return self._convolve(layer, x)
        if isinstance(layer, nn.Sequential):
            norm = None
            for inner in layer:
                if isinstance(inner, nn.Conv3d):
                    x = self._convolve(inner, x, norm)
                elif hasattr(inner, "gamma"):
                    norm = inner  # the next convolution runs it and the SiLU between them
            return x
        frames: Tensor = layer(x)  # it looks at one frame only
        return frames

    def _convolve(self, conv: Tree, x: Tensor, norm: Tree | None = None) -> Tensor:
        """Run a causal convolution behind the last two frames that it saw, zeros before the first."""
        if conv not in self.past:
            batch, channels, _, height, width = x.shape
            zeros = x.new_zeros(batch, channels, PAST_FRAMES, height, width)
            self.past[conv] = zeros.contiguous(memory_format=CHANNELS_LAST)
        frames = joined(self.past[conv], x, norm)
        y: Tensor
        if conv._forward_hooks or conv._forward_pre_hooks or "forward" in vars(conv):
            y = conv(frames[:, :, PAST_FRAMES:], frames[:, :, :PAST_FRAMES])
        else:  # its own class would copy both together once more
            y = super(type(conv), conv).forward(frames)  # type: ignore[misc]
        return y

    def _resample(self, layer: Tree, x: Tensor) -> Tensor:
        """Double frames, then their size; or halve their size, then frames. A clip's first frame stays one frame."""
        time_conv = getattr(layer, "time_conv", None)
        speeds_up = time_conv is not None and time_conv.stride[0] == 1
        if speeds_up and not self.at_start:
            # The first latent frame is not part of this convolution's past: it starts on zeros at the second.
            doubled = rearrange(self._convolve(time_conv, x), "b (two c) t h w -> b (t two) h w c", two=2)
            x = doubled.movedim(-1, 1)
        frames = x.shape[2]
        x = layer.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        x = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        if time_conv is None or speeds_up:
            return x
        last = self.past.get(time_conv)
        self.past[time_conv] = x[:, :, -1:].clone() if x.shape[2] > 1 else x  # a view would keep all frames alive
        return x if last is None else time_conv(torch.cat([last, x], dim=2))


class _TaeStack(_Stack):
    """A TAE's layers; each memory block keeps the last frame that it saw."""

    def __init__(self, layers: Iterable[Tree]) -> None:
        super().__init__(layers)
        # After the last memory block frames are independent and large, so they run one by one.
        end = 1 + max(index for index, layer in enumerate(self._layers) if is_mem_block(layer))
        self._layers, self._tail = self._layers[:end], nn.Sequential(*self._layers[end:])

    def __call__(self, z: Tensor) -> Tensor:
        """The next latent frames [B, C, T, h, w] → [B, 3, 4 T, 8h, 8w]; a clip's first, alone, gives one frame."""
        batch = z.shape[0]
        x: Tensor = rearrange(z, "b c t h w -> (b t) c h w")
        for layer in self._layers:
            x = self._remembered(layer, x, batch) if is_mem_block(layer) else layer(x)
        x = torch.cat([self._tail(frame) for frame in x.split(1)])
        frames: Tensor = x.unflatten(0, (batch, -1)).transpose(1, 2)
        if self.at_start:  # a clip's first image is the last of its first latent frame's video frames
            frames = frames[:, :, -1:]
        self.at_start = False
        return frames

    def _remembered(self, block: Tree, x: Tensor, batch: int) -> Tensor:
        """A memory block over the next frames [B · T, C, H, W], with the one before them."""
        framed = x.unflatten(0, (batch, -1))
        if block not in self.past:
            self.past[block] = torch.zeros_like(framed[:, :1])
        past = torch.cat([self.past[block], framed[:, :-1]], dim=1).flatten(0, 1)
        self.past[block].copy_(framed[:, -1:])
        y: Tensor = block(x, past)
        return y


def _remedy(dtype: torch.dtype) -> str:
    return f"the VAE computes in {dtype}: use float32 (--fp32-vae in ComfyUI), or download the VAE again"


def _place(vae: Tree, dtype: torch.dtype | None, device: torch.device | str | None) -> tuple[torch.dtype, torch.device]:
    parameter = next(vae.parameters())
    return dtype or parameter.dtype, torch.device(device) if device is not None else parameter.device


def _check_wan_vae(vae: Tree, way_out: str) -> None:
    if not isinstance(getattr(vae, "conv2", None), nn.Conv3d) or not hasattr(vae.decoder, "upsamples"):
        raise ValueError(f"{type(vae).__name__} is not a Wan VAE (no conv2, decoder.upsamples); {way_out}")
    check_channels("VAE", vae.conv2.in_channels, vae.decoder.head[-1].out_channels, way_out)


def _check_frames(frames: Tensor, *, first: int) -> None:
    """ValueError unless frames are [B, first + 4k, H, W, 3], sizes multiples of 8."""
    shape = tuple(frames.shape)
    if len(shape) != 5 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"frames of shape {shape} are not [B, frames, H, W, 3]")
    count = shape[1]
    if (count - first) % 4:
        below = count - (count - first) % 4
        raise ValueError(f"{count} video frames are not {first} + 4k; use {max(below, first or 4)} or {below + 4}")
    check_size(shape[2], shape[3], multiple=8)
