"""Live view of a run on its node: decoded frames and drafts.

A page with the pack's JavaScript receives every new picture once and plays them. Any other client gets ComfyUI's own
preview: one sheet of the whole video, whose cells fill up. Pictures take at most `SHARE` of the run's time.
"""

import base64
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...lightforcing_core.rollout.runtime import StepEvent
from ...lightforcing_core.rollout.schedule import latent_frame_at, video_frames_of
from ..browser import watching_page
from ..comfy import ModelPatcher, Preview, ProgressBar, executing_node, running_server
from ..model.patch import required_settings
from ..vae.decode import FrameDecoder
from .observer import Observer

SHARE = 0.02  # of the run's time that pictures may take
PAUSE = 0.4  # seconds between pictures
FPS = 16  # of Wan 2.1
EVERY = 2  # video frames for one picture of decoded video
SIDE = 256  # longest side of a picture in pixels
COLUMNS = 8  # pictures side by side in a strip
CELLS = 40  # at most, in the sheet
SHEET_WIDTH, EMPTY = 640, (32, 36, 42)
MESSAGE = "light_forcing.preview"
DEMO_FAMILY = "demo"


@dataclass
class Stretch:
    """uint8 pictures [n, h, w, 3] of frames `start` to `stop`, each from `at`."""

    start: int
    stop: int
    at: list[int]
    pictures: np.ndarray


class LiveView(Observer):
    """Shows one run on its node; `callback` is for ComfyUI's guider.

    latent_shape: [B, 16, frames, h, w] of the whole video; the first of the batch is shown.
    decoder: will decode the frames. Without one there are only drafts, and only if ComfyUI's previews are on.
    """

    def __init__(self, model: ModelPatcher, latent_shape: Sequence[int], decoder: FrameDecoder | None) -> None:
        self._budget = Budget()
        self._bar, self._done, self._total = ProgressBar(1), 0, 1
        self._decoder, self._preview = decoder, Preview(model)
        self._draft: tuple[Stretch, Any] | None = None  # with the event after which its pictures are on the CPU
        self._decoded = 0  # video frames
        self._shape = tuple(latent_shape)
        # The demo model has a VAE of its own, so Wan's colours are wrong for its latents.
        self._is_demo = required_settings(model).family.id == DEMO_FAMILY

    @cached_property
    def _pictures(self) -> "Strips | Sheet":
        _, _, frames, height, width = self._shape
        server = running_server()
        page = watching_page(server)
        if page is not None and page.plays:
            return Strips(server, video_frames_of(frames))
        return Sheet(frames, width / height)

    @property
    def callback(self) -> Callable[[int, Tensor, Tensor, int], None]:
        """Called by ComfyUI with step, x0 (the whole video so far), x and steps.

        If another pack has replaced ComfyUI's previews by animated ones, those are shown instead of ours.
        """
        return self._preview.callback() if self._preview.is_foreign else self._progress

    def step(self, event: StepEvent) -> None:
        if self._preview.is_foreign:
            return
        self._take_draft()
        must = event.step == event.steps - 1 and self._decoder is None  # otherwise the chunk would never be shown
        wanted = self._decoder is not None or self._preview.is_on
        if self._is_demo:
            wanted = self._decoder is not None and event.start_frame == 0
        if wanted and (must or (self._draft is None and self._budget.allows())):
            with self._budget.spending():
                self._draft = self._drawn(event)
            self._take_draft()

    def add_frames(self, frames: Tensor) -> None:
        """Show the next decoded frames, [B, n, H, W, 3] in [0, 1]."""
        if self._preview.is_foreign:
            return
        start, self._decoded = self._decoded, self._decoded + frames.shape[1]
        self._draft, skipped = None, -start % EVERY
        with self._budget.spending():
            at = list(range(start + skipped, self._decoded, EVERY))
            self._pictures.add(Stretch(start, self._decoded, at, small_pictures(frames[0, skipped::EVERY])))

    def show(self) -> None:
        """Send new pictures, if the budget allows it or the run is over."""
        preview = None
        if self._pictures.is_new and (self._budget.allows() or self._done >= self._total):
            with self._budget.spending(shown=True):
                preview = self._pictures.send()
        self._bar.update_absolute(self._done, self._total, preview)

    def end(self) -> None:
        if self._decoder is not None and not self._preview.is_foreign:
            self._draft = None
            self._pictures.cut(self._decoded)
        if self._pictures.is_new:
            self._done = self._total
            self.show()

    def _progress(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        self._done, self._total = step + 1, steps
        self.show()

    def _take_draft(self) -> None:
        """Add the draft, unless it is still being copied to the CPU."""
        if self._draft is not None and (self._draft[1] is None or self._draft[1].query()):
            with self._budget.spending():
                self._pictures.add(self._draft[0])
            self._draft = None

    def _drawn(self, event: StepEvent) -> tuple[Stretch, Any]:
        """The current chunk's pictures, by a tiny VAE or by approximate colours, spread evenly over its frames.

        The demo model's is one, the first chunk's first frame, which its VAE decodes in a few milliseconds.
        """
        start = video_frames_of(event.start_frame) if event.start_frame else 0
        stop, ready = video_frames_of(event.start_frame + event.x0.shape[2]), None
        if self._is_demo and self._decoder is not None:
            pictures = small_pictures(self._decoder.first_frame(event.x0[:1]))
        elif self._preview.has_tiny_vae and self._budget.allows():
            pictures = small_pictures(self._preview.decode(event.x0[:1]))
        else:
            colours = self._preview.colours(event.x0[0])
            pictures = colours.to("cpu", non_blocking=True).numpy()
            if colours.is_cuda:
                ready = torch.cuda.Event()
                ready.record()
        at = [start + (stop - start) * index // len(pictures) for index in range(len(pictures))]
        return Stretch(start, stop, at, pictures), ready


class Budget:
    """The time that pictures have taken, compared with the time of the run."""

    def __init__(self) -> None:
        self._begun, self._shown, self.spent = time.perf_counter(), -math.inf, 0.0

    def allows(self) -> bool:
        """Whether a picture may be made or sent now; the first always may."""
        now = time.perf_counter()
        is_first = self._shown == -math.inf
        return is_first or (now - self._shown >= PAUSE and self.spent <= SHARE * (now - self._begun))

    @contextmanager
    def spending(self, *, shown: bool = False) -> Iterator[None]:
        """Count the time of the block; `shown`: it sends a picture."""
        begun = time.perf_counter()
        yield
        now = time.perf_counter()
        self.spent += now - begun
        if shown:
            self._shown = now


class Strips:
    """Sends a page each picture once, in strips; later stretches replace earlier, and a reloaded page gets all."""

    def __init__(self, server: Any, frames: int) -> None:
        self._server, self._frames, self._page = server, frames, watching_page(server)
        self._strips, self._unsent = list[dict[str, Any]](), list[dict[str, Any]]()
        self._end: int | None = None

    @property
    def is_new(self) -> bool:
        return bool(self._unsent) or self._end is not None

    def cut(self, stop: int) -> None:
        """The video ends before frame `stop`: discard drafts past it."""
        if any(strip["start"] >= stop for strip in self._strips):
            self._strips, self._unsent = (
                [strip for strip in strips if strip["start"] < stop] for strips in (self._strips, self._unsent)
            )
            self._end = stop

    def add(self, stretch: Stretch) -> None:
        self._strips, self._unsent = (
            [old for old in strips if old["start"] >= stretch.stop or old["stop"] <= stretch.start]
            for strips in (self._strips, self._unsent)
        )
        strip = strip_of(stretch)
        self._strips.append(strip)
        self._unsent.append(strip)

    def send(self) -> None:
        node, page = executing_node(), watching_page(self._server)
        message = {
            "node": node[0] if node else None,
            "prompt_id": node[1] if node else None,
            "frames": self._frames,
            "fps": FPS,
            "strips": self._unsent if page is self._page else self._strips,
            "end": self._end,
        }
        self._page, self._unsent, self._end = page, [], None
        self._server.send_sync(MESSAGE, message, self._server.client_id)


class Sheet:
    """For other clients: one picture of the whole video, whose cells fill up."""

    def __init__(self, latent_frames: int, aspect: float) -> None:
        self._latent_frames, self._cells = latent_frames, min(latent_frames, CELLS)
        self._columns = math.ceil(math.sqrt(1.3 * self._cells / aspect))
        self._width = SHEET_WIDTH // self._columns
        self._height = max(round(self._width / aspect), 1)
        size = self._width * self._columns, self._height * -(-self._cells // self._columns)
        self._image, self.is_new = Image.new("RGB", size, EMPTY), False

    def add(self, stretch: Stretch) -> None:
        self.is_new, filled = True, -1
        for at, picture in zip(stretch.at, stretch.pictures, strict=True):
            cell = latent_frame_at(at) * self._cells // self._latent_frames
            if cell == filled:
                continue
            filled = cell
            small = Image.fromarray(picture).resize((self._width - 1, self._height - 1), Image.Resampling.BILINEAR)
            self._image.paste(small, (cell % self._columns * self._width, cell // self._columns * self._height))

    def cut(self, stop: int) -> None:
        """The video ends before frame `stop`: clear the cells past it."""
        for cell in range(latent_frame_at(stop) * self._cells // self._latent_frames, self._cells):
            left, top = cell % self._columns * self._width, cell // self._columns * self._height
            self._image.paste(EMPTY, (left, top, left + self._width, top + self._height))
            self.is_new = True

    def send(self) -> tuple[str, Image.Image, None]:
        self.is_new = False
        return "JPEG", self._image.copy(), None


def small_pictures(frames: Tensor) -> np.ndarray:
    """Frames [n, H, W, 3] as uint8, no side over `SIDE`; skipping pixels is fast."""
    step = math.ceil(max(frames.shape[1:3]) / SIDE)
    few = frames[:, ::step, ::step].cpu()
    values = few.numpy() if few.dtype in (torch.float32, torch.float16) else few.float().numpy()
    return (values * 255).astype(np.uint8)


def strip_of(stretch: Stretch) -> dict[str, Any]:
    """A stretch as a message: its pictures as one JPEG, `COLUMNS` in a row."""
    count, height, width, _ = stretch.pictures.shape
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, 3), np.uint8)
    grid[:count] = stretch.pictures
    sheet = grid.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    encoded = io.BytesIO()
    Image.fromarray(sheet).save(encoded, "JPEG", quality=80)
    return {
        "start": stretch.start,
        "stop": stretch.stop,
        "at": stretch.at,
        "width": width,
        "height": height,
        "columns": columns,
        "image": "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode(),
    }
