"""Video files that grow with a run: the node that asks for them, and the files of one run."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..lightforcing_core.files.output import numbered_path
from ..lightforcing_core.files.video import FORMATS, VideoWriter
from .comfy import metadata_wanted, numbered_output, output_folder
from .texts import node_schema

VideoOutputType = io.Custom("LIGHTFORCING_VIDEO_OUTPUT")


@dataclass(frozen=True)
class VideoOutput:
    """The node's inputs; crf None is the format's usual quality."""

    filename_prefix: str
    format: str
    crf: int | None
    fps: float
    keep_images: bool


class LightForcingVideoOutput(io.ComfyNode):
    """Choose name, format and quality of a video file that grows with the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingVideoOutput",
            inputs=[
                io.String.Input("filename_prefix", default="video/light_forcing"),
                io.Combo.Input("format", options=["mp4", "webm"], default="mp4"),
                io.Int.Input("crf", default=-1, min=-1, max=FORMATS[".webm"].worst_crf, step=1),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0),
                io.Boolean.Input("keep_images", default=False),
            ],
            outputs=[VideoOutputType.Output(display_name="video_output")],
        )

    @classmethod
    def validate_inputs(
        cls, filename_prefix: str | None = None, format: str | None = None, crf: int | None = None
    ) -> bool:
        """Refuse an impossible file before anything runs; a linked input is None."""
        if filename_prefix is not None and (Path(filename_prefix[:4096]).name in ("", "..") or "\0" in filename_prefix):
            raise ValueError(f"filename_prefix {filename_prefix!r:.80} names no file; use one such as video/clip")
        if format is not None and f".{format}" not in FORMATS:  # ComfyUI leaves the list of choices to this check
            raise ValueError(f"format {format!r:.80} is not known; use {' or '.join(FORMATS)}")
        if format is not None:  # with a linked format, the sampler checks crf before it begins
            VideoWriter(f"video.{format}", height=2, width=2, crf=None if crf == -1 else crf)
        return True

    @classmethod
    def execute(cls, filename_prefix: str, format: str, crf: int, fps: float, keep_images: bool) -> io.NodeOutput:
        return io.NodeOutput(VideoOutput(filename_prefix, format, None if crf < 0 else crf, fps, keep_images))


@contextlib.contextmanager
def open_video(
    output: VideoOutput, latent_shape: Sequence[int], metadata: Mapping[str, Any] | None
) -> Iterator[VideoWriter]:
    """The next file for one video of latents [B, 16, frames, h, w]; it gets its name if the block succeeds.

    metadata: the graph, as ComfyUI stores it in files.
    Raises ValueError and OutputError as `VideoWriter` does.
    """
    height, width = (8 * side for side in latent_shape[-2:])
    folder, name = numbered_output(output.filename_prefix, width=width, height=height)
    with (
        numbered_path(folder, name, f".{output.format}") as path,
        VideoWriter(path, height=height, width=width, fps=output.fps, crf=output.crf, metadata=metadata) as writer,
    ):
        yield writer


def saved_results(videos: Sequence[VideoWriter]) -> list[ui.SavedResult]:
    """The files that exist, in the form of ComfyUI's previews."""
    root, results = output_folder(), []
    for path in (writer.partial or writer.path for writer in videos):
        if path.exists():
            subfolder = path.parent.relative_to(root).as_posix()
            results.append(ui.SavedResult(path.name, "" if subfolder == "." else subfolder, io.FolderType.output))
    return results


def graph_metadata(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The graph, to restore it from the file; None with --disable-metadata."""
    if not metadata_wanted():
        return None
    return {**(extra_pnginfo or {}), **({"prompt": prompt} if prompt is not None else {})}
