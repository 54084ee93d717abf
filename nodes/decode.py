"""Streaming decode: a Wan 2.1 VAE or LightVAE run chunk by chunk in memory that does not grow with the video."""

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..lightforcing_core.schedule import video_frames_of
from ..lightforcing_core.streaming import StreamingDecoder

# Elements alive at the peak of one latent frame's decode, per output pixel and unit of the VAE's width: 45 counted
# for widths 24 and 96 at two sizes, the rest is room for the convolutions' workspace.
ELEMENTS_PER_PIXEL = 60
FRAMES_AT_ONCE = 4


class LightForcingDecode(io.ComfyNode):
    """Decode a latent video of any length with bounded memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingDecode",
            display_name="Light Forcing Decode",
            category="Light Forcing",
            description="Decodes a video latent piece by piece with the full Wan 2.1 VAE or LightVAE. Memory stays the "
            "same for any length; the frames equal a decode in one go.",
            inputs=[
                io.Latent.Input("samples", tooltip="A video latent of Wan 2.1 (16 channels)."),
                io.Vae.Input(
                    "vae",
                    tooltip="Wan 2.1 VAE (best) or LightVAE lightvaew2_1 (about a quarter of the memory, a little "
                    "softer). For other VAEs use VAE Decode.",
                ),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="All frames, first to last.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        latents = samples["samples"]
        if latents.ndim != 5:
            raise ValueError(f"the latent has shape {list(latents.shape)}; expected [batch, 16, frames, height, width]")
        if not torch.isfinite(latents).all():
            raise ValueError("the latent holds NaN or infinity, which would decode to black; sample it again")
        frames = FrameDecoder(vae, latents.shape)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=frames.bytes_needed)
        progress = comfy.utils.ProgressBar(latents.shape[2])
        for piece in latents.split(FRAMES_AT_ONCE, dim=2):
            comfy.model_management.throw_exception_if_processing_interrupted()
            frames.add(piece, normalised=False)
            progress.update(piece.shape[2])
        return io.NodeOutput(frames.images())


class FrameDecoder:
    """Decodes a video's frames as its latents arrive, and collects them.

    latent_shape: [B, 16, frames, h, w] of the whole video. keep: whether frames are collected for `images`. Raises
    ValueError for a VAE that cannot stream.
    """

    def __init__(self, vae: Any, latent_shape: Any, *, keep: bool = True) -> None:
        vae.throw_exception_if_invalid()
        try:
            self._decoder = StreamingDecoder(vae.first_stage_model, dtype=vae.vae_dtype, device=vae.device)
        except ValueError:
            raise ValueError(
                f"this VAE ({type(vae.first_stage_model).__name__}) cannot decode piece by piece; connect the Wan 2.1 "
                f"VAE or LightVAE (lightvaew2_1), or use VAE Decode on the latent"
            ) from None
        self._vae, self._shape, self._keep, self._done = vae, tuple(latent_shape), keep, 0
        self._frames: Tensor | None = None

    @property
    def bytes_needed(self) -> int:
        """Memory that decoding takes beside the VAE's weights; the same for every length."""
        batch, _, _, height, width = self._shape
        elements = ELEMENTS_PER_PIXEL * self._vae.first_stage_model.dim * batch * 64 * height * width
        return elements * self._vae.vae_dtype.itemsize

    def add(self, latents: Tensor, *, normalised: bool) -> Tensor:
        """Decode the next latent frames [B, 16, f, h, w]; the new video frames [B, n, H, W, 3]."""
        pixels = self._decoder.decode(latents, normalised=normalised)
        if not self._keep:
            return pixels
        if self._frames is None:
            batch, _, frames, _, _ = self._shape
            self._frames = torch.empty(
                (batch, video_frames_of(frames), *pixels.shape[2:]),
                device=self._vae.output_device,
                dtype=comfy.model_management.intermediate_dtype(),
            )
        new = self._frames[:, self._done : self._done + pixels.shape[1]]
        new.copy_(pixels)
        self._done += pixels.shape[1]
        return new

    def images(self) -> Tensor | None:
        """The frames so far as an IMAGE batch [B · frames, H, W, 3], one video after the other; None without any."""
        return None if self._frames is None else self._frames[:, : self._done].flatten(0, 1)
