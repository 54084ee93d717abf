"""Streaming decode with a Wan 2.1 VAE, LightVAE or TAE, in memory that does not grow with the video."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lightforcing_core import machine
from ...lightforcing_core.memory.estimate import decode_bytes, gib
from ...lightforcing_core.model.cuda_capture import CudaRecorder
from ...lightforcing_core.refusal import check_finite
from ...lightforcing_core.rollout.schedule import video_frames_of
from ...lightforcing_core.vae.graph import PassGraph
from ...lightforcing_core.vae.overlap import OverlappedDecoder
from ...lightforcing_core.vae.streaming import FRAMES_AT_ONCE, StreamingDecoder
from ...lightforcing_core.vae.taehv import TaeLatents, is_tae, tae_latents_of
from ...lightforcing_core.vae.tiled import TiledDecoder, most_tiles, tile_spans
from ..comfy import (
    ProgressBar,
    file_of,
    is_interrupted,
    load_if_away,
    load_on_device,
    memory_for_a_run,
    raise_if_interrupted,
    result_dtype,
    show_text,
    weights_of,
)
from ..texts import node_schema

log = logging.getLogger(__name__)

# Elements alive at the peak of a TAE's decode, per output pixel: 662 counted with three latent frames at once, 854 with
# the copies that convolutions make of input and output.
TAE_ELEMENTS_PER_PIXEL = 900
MOST_TILES = 4


class LightForcingDecode(io.ComfyNode):
    """Decode a latent video of any length with bounded memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingDecode",
            inputs=[
                io.Latent.Input("samples"),
                io.Vae.Input("vae"),
                io.Combo.Input(
                    "tae_latents", options=["auto", "normalised", "raw"], default="auto", optional=True, advanced=True
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
        )

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: Any, tae_latents: TaeLatents | Literal["auto"] = "auto"
    ) -> io.NodeOutput:
        latents = samples["samples"]
        if latents.ndim != 5:
            raise ValueError(f"the latent has shape {list(latents.shape)}; expected [batch, 16, frames, height, width]")
        check_finite("the latent", latents, "sample it again: NaN would decode to black")
        frames = FrameDecoder(vae, latents.shape, tae_latents=tae_latents)
        frames.load()
        progress = ProgressBar(latents.shape[2])
        for piece in latents.split(FRAMES_AT_ONCE, dim=2):
            raise_if_interrupted()
            frames.put(piece, normalised=False)
            progress.update(piece.shape[2])
        return io.NodeOutput(frames.images())


class FrameDecoder:
    """Decodes a video's frames as its latents arrive, and collects them.

    latent_shape: [B, 16, frames, h, w] of the whole video.
    keep: whether frames are collected for `images`.
    tae_latents: the latents that a TAE was made for; "auto" asks `latents_of`.
    Raises ValueError for a VAE that cannot stream.
    """

    def __init__(
        self, vae: Any, latent_shape: Any, *, keep: bool = True, tae_latents: TaeLatents | Literal["auto"] = "auto"
    ) -> None:
        vae.throw_exception_if_invalid()
        module = vae.first_stage_model
        self._is_tae = is_tae(module)
        if self._is_tae and tae_latents == "auto":
            tae_latents = latents_of(vae)
        self._vae, self._shape, self._keep, self._done = vae, tuple(latent_shape), keep, 0
        self._tae_latents: TaeLatents | None = None if tae_latents == "auto" else tae_latents
        self._frames: Tensor | None = None
        try:
            tree = self._stream().tree
        except ValueError as error:
            raise ValueError(
                f"this VAE cannot decode piece by piece: {error}. Connect one of those, or use VAE Decode on the latent"
            ) from None
        self._weights = weights_of(vae.patcher, tree)
        self.cut(0)

    def cut(self, tiles: int, *, overlap: bool = False, cuda_graph: bool = False) -> None:
        """Decode in `tiles` × `tiles` overlapping tiles, see `estimate`; call it before `put`.

        cuda_graph: record an untiled decode if that is faster, and the VAE's weights stay on the GPU.
        overlap: decode untiled while sampling continues, if the VAE's weights stay on the GPU; see `OverlappedDecoder`.
        """
        self._tiles, device, graph = tiles, self._vae.device, None
        if tiles > 1:
            self._decoder = OverlappedDecoder(TiledDecoder(lambda: self._stream(at_once=1), tiles), None)
            return
        if cuda_graph and CudaRecorder.why_not(device) is None:
            measuring = partial(machine.measuring, show_text, is_interrupted)
            graph = PassGraph(CudaRecorder(device, lane="decode"), self._weights, measuring)
        weights = self._weights if graph or overlap else None
        stream = self._stream(at_once=None if tiles == 0 else 1, graph=graph)
        self._decoder = OverlappedDecoder(stream, weights, concurrent=overlap)

    def _stream(self, **options: Any) -> StreamingDecoder:
        vae = self._vae
        return StreamingDecoder(
            vae.first_stage_model, dtype=vae.vae_dtype, device=vae.device, tae_latents=self._tae_latents, **options
        )

    @property
    def can_overlap(self) -> bool:
        """Whether the VAE can decode on a second CUDA stream."""
        return self._vae.device.type == "cuda"

    @property
    def most_tiles(self) -> int:
        """How far `cut` may go."""
        return min(MOST_TILES, most_tiles(*self._shape[-2:]))

    def load(self) -> None:
        """Load the VAE, with the fewest tiles that fit into memory."""
        free = memory_for_a_run(self._vae.device)
        for tiles in range(self.most_tiles + 1):
            self.cut(tiles)
            if sum(self.bytes_of(tiles).values()) <= free:
                break
        if self._tiles > 1:
            log.info("[Light Forcing] decode in %d×%d tiles, %s GiB free", self._tiles, self._tiles, gib(free))
        load_on_device(self._vae.patcher, self.bytes_needed)

    @property
    def bytes_needed(self) -> int:
        """Bytes that decoding takes besides weights; the same for every length."""
        needed = self.bytes_of(self._tiles)
        return needed["history"] + needed["decode"]

    def bytes_of(self, tiles: int) -> dict[str, Any]:
        """vae, history and decode of `MemoryEstimate`, for `tiles` × `tiles` tiles."""
        batch, channels, _, height, width = self._shape
        vae = {"vae": self._vae.patcher.model_size()}
        if not self._is_tae:
            shape = (batch, channels, FRAMES_AT_ONCE, height, width)
            dim, on_host = self._vae.first_stage_model.dim, self._vae.device.type == "cpu"
            with torch.inference_mode(False):  # inference mode hides the copies that a convolution makes
                return decode_bytes(shape, dim, self._vae.vae_dtype, tiles, on_host=on_host) | vae
        tile = [max(stop - start for start, stop in tile_spans(size, tiles)) for size in (height, width)]
        frames = 4 * FRAMES_AT_ONCE * 3 * batch * 64 * height * width * torch.float32.itemsize
        alive = TAE_ELEMENTS_PER_PIXEL * batch * 64 * tile[0] * tile[1] * self._vae.vae_dtype.itemsize
        return vae | {"history": 0, "decode": alive + frames}

    def put(self, latents: Tensor, *, normalised: bool) -> list[Tensor]:
        """Decode latents [B, 16, f, h, w]; the frames [B, n, H, W, 3] that are ready."""
        load_if_away(self._vae.patcher, self.bytes_needed)  # another model may have taken the memory
        return [self._kept(pixels) for pixels in self._decoder.put(latents, normalised=normalised)]

    def first_frame(self, latents: Tensor) -> Tensor:
        """The first frame [1, H, W, 3] of a video [1, 16, f, h, w] of normalised latents; `put` does not notice."""
        return self._stream().decode(latents[:, :, :1], trusted=True)[0]

    def arrived(self) -> list[Tensor]:
        return [self._kept(pixels) for pixels in self._decoder.arrived()]

    def rest(self) -> list[Tensor]:
        return [self._kept(pixels) for pixels in self._decoder.rest()]

    def drop(self) -> None:
        self._decoder.drop()

    def _kept(self, pixels: Tensor) -> Tensor:
        if not self._keep:
            return pixels
        if self._frames is None:
            batch, _, frames, _, _ = self._shape
            self._frames = torch.empty(
                (batch, video_frames_of(frames), *pixels.shape[2:]),
                device=self._vae.output_device,
                dtype=result_dtype(),
            )
        new = self._frames[:, self._done : self._done + pixels.shape[1]]
        new.copy_(pixels)
        self._done += pixels.shape[1]
        return new

    def images(self) -> Tensor | None:
        """The frames so far, [B · frames, H, W, 3], video after video, or None."""
        return None if self._frames is None else self._frames[:, : self._done].flatten(0, 1)


def latents_of(vae: Any) -> TaeLatents:
    """The latents that a TAE was made for, by its file, see `tae_latents_of`.

    ComfyUI takes a float16 TAE for HunyuanVideo's and gives it that model's latent format; nothing else shows the
    stored dtype after loading. The format's scaling is not applied here, because this pack calls the layers itself.
    """
    name = Path(file_of(vae.patcher)).name
    stored = torch.float16 if getattr(vae.first_stage_model, "latent_format", None) is not None else None
    latents = tae_latents_of(name, stored)
    log.info("[Light Forcing] TAE %s takes %s latents", name or "of an unknown file", latents)
    return latents
