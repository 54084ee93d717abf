"""Frames of finished chunks while a run continues: decoded, then sent to the video file and the live view."""

import contextlib
import logging
from collections.abc import Sequence

from torch import Tensor

from ...lightforcing_core.files.video import VideoWriter
from ...lightforcing_core.memory.plan import MemoryPlan
from ...lightforcing_core.refusal import NotFinite
from ...lightforcing_core.rollout.runtime import Chunk, StepEvent
from ...lightforcing_core.rollout.state import RunState
from ...lightforcing_core.vae.streaming import FRAMES_AT_ONCE
from ..comfy import raise_if_interrupted
from ..vae.decode import FrameDecoder
from .live_view import LiveView
from .observer import Observer

log = logging.getLogger(__name__)


class FrameOutput(Observer):
    """Decodes chunks in order and passes their frames on.

    Frames may be decoded while the next chunk is sampled: they are passed on after the first step by which they are
    ready, and the last ones once nothing follows.

    before: latents [B or 1, 16, frames, h, w] that the video already has and that are decoded first, `normalised` or
        in the VAE's space.
    live: shows the frames.
    videos: open files, one for each video of the batch, or none.
    """

    def __init__(
        self,
        decoder: FrameDecoder,
        before: Tensor | None,
        *,
        normalised: bool,
        live: LiveView,
        videos: Sequence[VideoWriter],
    ) -> None:
        self._decoder, self._before, self._normalised = decoder, before, normalised
        self._live, self._videos = live, videos

    def finish_failed(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Exit callback of a stack: keep the frames that a failed run was decoding."""
        if error is None:
            return
        try:
            self._pass_on(self._decoder.rest())
        except Exception as second:  # the user must see the first error
            log.warning("[Light Forcing] the last frames of a run that failed are lost: %s", second)

    def begin(self, run: RunState, plan: MemoryPlan) -> None:
        self._decoder.cut(plan.decode_tiles, overlap=plan.overlap, cuda_graph=plan.cuda_graph)

    def step(self, event: StepEvent) -> None:
        self._pass_on(self._decoder.arrived())

    def chunk(self, chunk: Chunk, *, is_last: bool) -> None:
        self.add_before(chunk.latents.shape[0])
        self._add(chunk.latents, normalised=True)
        if is_last:  # no step follows that could collect its frames
            self._pass_on(self._decoder.rest())

    def cut(self, reason: str) -> None:
        with contextlib.suppress(NotFinite):  # the run has its reason, and its latents are kept
            self._pass_on(self._decoder.rest())
        self._decoder.drop()  # frames behind such ones, which nothing collects any more

    def add_before(self, batch: int) -> None:
        """Decode the latents that the video already has, once."""
        if self._before is None:
            return
        before, self._before = self._before.expand(batch, -1, -1, -1, -1), None
        for piece in before.split(FRAMES_AT_ONCE, dim=2):
            raise_if_interrupted()
            self._add(piece, normalised=self._normalised)

    def _add(self, latents: Tensor, *, normalised: bool) -> None:
        ready = self._decoder.put(latents, normalised=normalised)
        try:
            self._pass_on(ready)
        except BaseException:
            self._decoder.drop()  # this chunk is discarded, so its frames must not follow later
            raise

    def _pass_on(self, ready: list[Tensor]) -> None:
        for frames in ready:
            for video, own in zip(self._videos, frames, strict=False):
                video.write(own)
            self._live.add_frames(frames)
            self._live.show()
