"""Streaming encode: the frames that a video starts or ends with, four at a time."""

from typing import Any, Literal

import torch
from comfy_api.latest import io
from torch import Tensor

from ...lightforcing_core.memory.estimate import gib
from ...lightforcing_core.refusal import check_size
from ...lightforcing_core.vae.streaming import StreamingEncoder
from ..comfy import (
    ProgressBar,
    is_out_of_memory,
    load_on_device,
    memory_for_a_run,
    out_of_memory,
    raise_if_interrupted,
    result_device,
)
from ..texts import node_schema

LESS = 0.8  # of the memory, if ComfyUI estimates that there is enough
# Latent frames of a still that are encoded before an end and then left out. A VAE encodes the first frame by itself,
# which is still visible in the following frames if there are fewer; more make no difference.
BEFORE_END = 2


class LightForcingEncode(io.ComfyNode):
    """Encode an image, or a video of any length with bounded memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingEncode",
            search_aliases=["extend video"],
            inputs=[
                io.Image.Input("pixels"),
                io.Vae.Input("vae"),
                io.Combo.Input("place", options=["start", "end"], default="start", optional=True),
            ],
            outputs=[io.Latent.Output(display_name="LATENT")],
        )

    @classmethod
    def execute(cls, pixels: Tensor, vae: Any, place: Literal["start", "end"] = "start") -> io.NodeOutput:
        _, height, width, _ = pixels.shape
        check_size(height, width)
        vae.throw_exception_if_invalid()
        try:
            encoder = StreamingEncoder(vae.first_stage_model, dtype=vae.vae_dtype, device=vae.device)
        except ValueError as error:
            raise ValueError(f"this VAE cannot encode piece by piece: {error}. Or use VAE Encode") from None
        needed = vae.memory_used_encode((1, 3, 5, height, width), vae.vae_dtype)
        load_on_device(vae.patcher, needed)
        kept = (as_an_end(pixels) if place == "end" else as_a_start(pixels))[None, ..., :3]
        progress, latents = ProgressBar(kept.shape[1]), []
        try:
            for group in kept.split([1] + [4] * (kept.shape[1] // 4), dim=1):
                raise_if_interrupted()
                latents.append(encoder.encode(group, normalised=False).cpu())
                progress.update(group.shape[1])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free = memory_for_a_run(vae.device)
            smaller = "×".join(map(str, _smaller((width, height), free / max(needed, 1))))
            raise out_of_memory(
                f"out of memory while encoding frame {4 * len(latents)} of {kept.shape[1]} at {width}×{height}, which "
                f"needs about {gib(needed)} GiB of the {gib(free)} GiB there are; lower the size to {smaller}, or use "
                f"LightVAE (lightvaew2_1), which takes about a quarter of the memory"
            ) from error
        kept_latents = latents[BEFORE_END:] if place == "end" else latents
        return io.NodeOutput({"samples": torch.cat(kept_latents, dim=2).to(result_device())})


def as_a_start(pixels: Tensor) -> Tensor:
    """Of frames [n, H, W, C] the last 1 + 4·k, which a Wan VAE encodes."""
    return pixels[(len(pixels) - 1) % 4 :]


def as_an_end(pixels: Tensor) -> Tensor:
    """Frames [n, H, W, C] after a still, filled to `BEFORE_END` latents and 4·k."""
    still = 1 + 4 * (BEFORE_END - 1) + -len(pixels) % 4
    return torch.cat([pixels[:1].expand(still, -1, -1, -1), pixels])


def _smaller(size: tuple[int, int], share: float) -> list[int]:
    """A smaller size, in steps of 16 pixels, for at most `share` of the memory."""
    scale = min(share, LESS) ** 0.5
    return [max(16, int(side * scale) // 16 * 16) for side in size]
