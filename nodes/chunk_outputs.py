"""Where finished chunks go while a run continues: decoded, into the video file, the IMAGE batch and the preview."""

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..lightforcing_core.rollout import Chunk
from .decode import FRAMES_AT_ONCE, FrameDecoder
from .video_output import VideoFiles

PREVIEW_SIDE = 512


class ChunkOutputs:
    """Decodes chunks in order and hands their frames on; called by the chunk sampler.

    before: latents [B or 1, 16, frames, h, w] that the video has already and that are decoded first, `normalised` or
    in the VAE's space. files: where frames are written, if anywhere.
    """

    def __init__(
        self, frames: FrameDecoder, before: Tensor | None, *, normalised: bool, files: VideoFiles | None = None
    ) -> None:
        self._frames, self._before, self._normalised, self._files = frames, before, normalised, files
        self._progress = comfy.utils.ProgressBar(1)

    def __call__(self, chunk: Chunk, done: int, total: int) -> None:
        self.add_before(chunk.latents.shape[0])
        last = self._add(chunk.latents, normalised=True)[0, -1]
        picture = Image.fromarray((last.float().cpu() * 255).round().to(torch.uint8).numpy())
        self._progress.update_absolute(done, total, ("JPEG", picture, PREVIEW_SIDE))

    def add_before(self, batch: int) -> None:
        """Decode what the video has already, once."""
        if self._before is None:
            return
        before, self._before = self._before.expand(batch, -1, -1, -1, -1), None
        for piece in before.split(FRAMES_AT_ONCE, dim=2):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._add(piece, normalised=self._normalised)

    def _add(self, latents: Tensor, *, normalised: bool) -> Tensor:
        frames = self._frames.add(latents, normalised=normalised)
        if self._files is not None:
            self._files.write(frames)
        return frames
