"""Where finished chunks go while a run continues: decoded, into the video file, the IMAGE batch and the live view."""

import logging
from types import TracebackType

from torch import Tensor

from ...lightforcing_core.rollout.runtime import Chunk, StepEvent
from ..comfy import raise_if_interrupted
from ..decode import FRAMES_AT_ONCE, FrameDecoder
from ..video_output import VideoFiles
from .live_view import LiveView

log = logging.getLogger(__name__)


class ChunkOutputs:
    """Decodes chunks in order and hands their frames on; called by the chunk sampler.

    Frames may be made while the next chunk is sampled: they are handed on after the first step that finds them ready,
    and `finish` waits for the last. A context manager, so that a run that breaks off hands on what was being made.

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

    def __enter__(self) -> "ChunkOutputs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        try:
            self.finish()
        except Exception as second:  # what broke the run is what the user shall read
            log.warning("[Light Forcing] the last frames of a run that broke off are lost: %s", second)

    def __call__(self, chunk: Chunk, done: int, total: int) -> None:
        self.add_before(chunk.latents.shape[0])
        self._add(chunk.latents, normalised=True)
        if done >= total:  # nothing follows that could be done meanwhile
            self.finish()

    def add_before(self, batch: int) -> None:
        """Decode what the video has already, once."""
        if self._before is None:
            return
        before, self._before = self._before.expand(batch, -1, -1, -1, -1), None
        for piece in before.split(FRAMES_AT_ONCE, dim=2):
            raise_if_interrupted()
            self._add(piece, normalised=self._normalised)

    def step(self, event: StepEvent) -> None:
        """A denoising step is done."""
        self._live.step(event)
        self._hand_on(self._frames.arrived())

    def finish(self) -> None:
        """Hand on what is still being made."""
        self._hand_on(self._frames.rest())

    def _add(self, latents: Tensor, *, normalised: bool) -> None:
        ready = self._frames.put(latents, normalised=normalised)
        try:
            self._hand_on(ready)
        except BaseException:
            self._frames.drop()  # a chunk that is given up here must not get frames later
            raise

    def _hand_on(self, ready: list[Tensor]) -> None:
        for frames in ready:
            if self._files is not None:
                self._files.write(frames)
            self._live.add_frames(frames, self._made)
            self._made += frames.shape[1]
            self._live.show()
