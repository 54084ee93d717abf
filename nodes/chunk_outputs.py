"""Where finished chunks go while a run continues: decoded, into the video file, the IMAGE batch and the live view."""

import comfy.model_management
from torch import Tensor

from ..lightforcing_core.rollout import Chunk
from .decode import FRAMES_AT_ONCE, FrameDecoder
from .live_view import LiveView
from .video_output import VideoFiles


class ChunkOutputs:
    """Decodes chunks in order and hands their frames on; called by the chunk sampler.

    before: latents [B or 1, 16, frames, h, w] that the video has already and that are decoded first, `normalised` or
    in the VAE's space. live: what shows them. files: where frames are written, if anywhere.
    """

    def __init__(
        self,
        frames: FrameDecoder,
        before: Tensor | None,
        *,
        normalised: bool,
        live: LiveView,
        files: VideoFiles | None = None,
    ) -> None:
        self._frames, self._before, self._normalised, self._files = frames, before, normalised, files
        self._live, self._made = live, 0

    def __call__(self, chunk: Chunk, done: int, total: int) -> None:
        self.add_before(chunk.latents.shape[0])
        self._add(chunk.latents, normalised=True)

    def add_before(self, batch: int) -> None:
        """Decode what the video has already, once."""
        if self._before is None:
            return
        before, self._before = self._before.expand(batch, -1, -1, -1, -1), None
        for piece in before.split(FRAMES_AT_ONCE, dim=2):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._add(piece, normalised=self._normalised)

    def _add(self, latents: Tensor, *, normalised: bool) -> None:
        frames = self._frames.add(latents, normalised=normalised)
        if self._files is not None:
            self._files.write(frames)
        self._live.add_frames(frames, self._made)
        self._made += frames.shape[1]
        self._live.show()
