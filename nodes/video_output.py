"""Frames that leave for a video file while the run goes on: the node that asks for it, and the files of one run."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..lightforcing_core.files.output import numbered_path, remove_empty
from ..lightforcing_core.files.video import FORMATS, VideoWriter
from .comfy import metadata_wanted, numbered_output, output_folder

VideoOutputType = io.Custom("LIGHTFORCING_VIDEO_OUTPUT")
MOST_CRF = max(known.worst_crf for known in FORMATS.values())


@dataclass(frozen=True)
class VideoOutput:
    """How a run's frames are written; fields as the node's inputs, crf None being the format's own quality."""

    filename_prefix: str
    format: str
    crf: int | None
    fps: float
    keep_images: bool


class LightForcingVideoOutput(io.ComfyNode):
    """File name, format and quality → a video file that grows with the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingVideoOutput",
            display_name="Light Forcing Video Output",
            category="Light Forcing",
            description="Lets the sampler write each chunk's frames into a video file as soon as they are decoded, so "
            "memory does not limit the length of a video. The sampler needs a VAE for this.",
            inputs=[
                io.String.Input(
                    "filename_prefix",
                    default="video/light_forcing",
                    tooltip="Name in the output folder; a number is added. Fields such as %date:yyyy-MM-dd% work as in "
                    "Save Video.",
                ),
                io.Combo.Input(
                    "format",
                    options=["mp4", "webm"],
                    default="mp4",
                    tooltip="mp4 (H.264) plays everywhere; webm (VP9) is smaller and slower to write.",
                ),
                io.Int.Input(
                    "crf",
                    default=-1,
                    min=-1,
                    max=MOST_CRF,
                    step=1,
                    tooltip="Quality: lower is better and larger. -1 takes 19 for mp4 and 30 for webm.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second of the file; Wan 2.1 makes 16. Another value changes the speed of the "
                    "motion.",
                ),
                io.Boolean.Input(
                    "keep_images",
                    default=False,
                    tooltip="On: the sampler's IMAGE holds all frames too (4.6 GB per minute at 480×832). Off: IMAGE "
                    "stays empty, nodes after it do not run, and memory does not grow with the video.",
                ),
            ],
            outputs=[
                VideoOutputType.Output(
                    display_name="video_output", tooltip="For the video_output input of Light Forcing Sampler."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, filename_prefix: str | None = None, format: str | None = None, crf: int | None = None
    ) -> bool:
        """Refuse what cannot be written before anything runs; what comes over a link is None here.

        Raises ValueError, which the host shows once; a returned reason it repeats for every input.
        """
        if filename_prefix is not None and Path(filename_prefix).name in ("", ".."):
            raise ValueError(f"filename_prefix {filename_prefix!r} names no file; write one such as video/clip")
        if format is not None and f".{format}" not in FORMATS:
            raise ValueError(f"format {format!r} is not known; use {' or '.join(FORMATS)}".replace(".", ""))
        worst = MOST_CRF if format is None else FORMATS[f".{format}"].worst_crf
        if crf is not None and not -1 <= crf <= worst:
            raise ValueError(f"crf {crf} is outside 0 to {worst} of {format}; -1 takes the usual one")
        return True

    @classmethod
    def execute(cls, filename_prefix: str, format: str, crf: int, fps: float, keep_images: bool) -> io.NodeOutput:
        return io.NodeOutput(VideoOutput(filename_prefix, format, None if crf < 0 else crf, fps, keep_images))


class VideoFiles:
    """A context manager: one file for each video of the batch, under its name when the block ends well.

    Otherwise, and after `cut_short`, what was written is kept as `NAME.partial.EXT`. height, width: pixels.
    metadata: what the host stores beside the graph. Raises ValueError and OutputError as `VideoWriter` does.
    """

    def __init__(
        self, output: VideoOutput, *, batch: int, height: int, width: int, metadata: Mapping[str, Any] | None
    ) -> None:
        self._output, self._batch, self._size, self._metadata = output, batch, (height, width), metadata
        self._stack = contextlib.ExitStack()
        self._writers: list[VideoWriter] = []

    def __enter__(self) -> "VideoFiles":
        height, width = self._size
        output, root = self._output, output_folder()
        folder, name = numbered_output(output.filename_prefix, width=width, height=height)
        with contextlib.ExitStack() as stack:
            # The host has made them; where no file came, they go again.
            stack.callback(remove_empty, [one for one in (folder, *folder.parents) if root in one.parents])
            for _ in range(self._batch):
                path = stack.enter_context(numbered_path(folder, name, f".{output.format}"))
                writer = VideoWriter(
                    path, height=height, width=width, fps=output.fps, crf=output.crf, metadata=self._metadata
                )
                self._writers.append(stack.enter_context(writer))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor) -> None:
        """Append frames [B, n, H, W, 3] in 0…1."""
        for writer, own in zip(self._writers, frames, strict=True):
            writer.write(own)

    def cut_short(self, reason: str) -> None:
        """End here, and leave no file under a final name."""
        cut = InterruptedError(reason)
        self._stack.__exit__(InterruptedError, cut, None)

    def shown(self) -> list[ui.SavedResult]:
        """The files there are, as the host's previews want them."""
        root = output_folder()
        results = []
        for path in (writer.partial or writer.path for writer in self._writers):
            if path.exists():
                subfolder = path.resolve().parent.relative_to(root).as_posix().removeprefix(".")
                results.append(ui.SavedResult(path.name, subfolder, io.FolderType.output))
        return results


def graph_metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What restores the graph when the file is dropped on the canvas; None where the host was told to store none."""
    if not metadata_wanted():
        return None
    return {**(extra_pnginfo or {}), **({"prompt": prompt} if prompt is not None else {})}
