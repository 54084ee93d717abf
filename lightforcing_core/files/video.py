"""MP4 and WebM files written frame by frame in constant memory; a crash leaves a playable part."""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

from ..refusal import check_finite, check_size
from .output import (
    NO_LINKS,
    OutputError,
    abandoned,
    claim_hidden,
    free_name,
    prepare_folder,
    unlock_on_windows,
    whole_file,
)

_log = logging.getLogger(__name__)
_BOX_HEADER = 8  # bytes of size and type before every MP4 box
_BT601, _BT709, _LIMITED_RANGE = 6, 1, 1  # H.273 code points


class VideoFormat(NamedTuple):
    """How frames are encoded: the encoder, its constant rate factor (lower is better and larger) and its options."""

    codec: str
    crf: int
    worst_crf: int
    options: Mapping[str, str]


FORMATS = {
    ".mp4": VideoFormat("h264", 19, 51, {}),
    ".webm": VideoFormat("libvpx-vp9", 30, 63, {"deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}
# An MP4 grows in fragments: an interrupted one plays up to its last second or two.
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof+use_metadata_tags"}


class VideoWriter:
    """A context manager that encodes frames as they arrive; the file gets its name when the block succeeds.

    path: the suffix is one of FORMATS; an existing file is replaced.
    height, width: pixels, even. crf: quality; the format's own by default.
    metadata: texts, or values stored as JSON; ComfyUI restores a graph from "workflow" and "prompt".

    If the block raises, the frames so far are kept as a playable `<stem>.partial<suffix>`, whose path is then
    `partial`. `frames` counts the frames written.

    Raises ValueError for sizes, suffixes, rates and frames that cannot be encoded, and OutputError if the folder
    cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        height: int,
        width: int,
        fps: float | Fraction = 16,
        crf: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self._suffix = suffix = self.path.suffix.lower()
        if suffix not in FORMATS:
            known = " or ".join(FORMATS)
            raise ValueError(f"{self.path.name}: suffix {suffix!r} is not a supported video format; use {known}")
        self._format = FORMATS[suffix]
        check_size(height, width, multiple=2)
        if not 0.01 <= fps <= 1000:
            raise ValueError(f"fps {fps} is outside 0.01 … 1000 frames per second")
        self._crf = self._format.crf if crf is None else crf
        if not 0 <= self._crf <= self._format.worst_crf:
            worst, usual = self._format.worst_crf, self._format.crf
            raise ValueError(f"crf {crf} is outside 0 … {worst} of {suffix}; lower is better, {usual} is usual")
        self.height, self.width = height, width
        self.fps = Fraction(fps).limit_denominator(1001)
        self._metadata = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()
        }
        self.frames = 0
        self.partial: Path | None = None
        self._growing: Path
        self._claimed: FileIO  # `_growing`, until it is renamed or deleted
        self._container: av.container.OutputContainer | None = None

    def __enter__(self) -> "VideoWriter":
        rescue_abandoned(prepare_folder(self.path.parent))
        try:
            self._growing, self._claimed = claim_hidden(self.path, "growing")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another name") from error
        try:
            self._open()
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames [n, height, width, 3]: uint8, or floating point, clamped to 0…1."""
        assert self._container is not None, "frames are written inside the block, and not after an error"
        frames = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames.detach()
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (self.height, self.width, 3):
            raise ValueError(f"frames have shape {tuple(frames.shape)}; expected [n, {self.height}, {self.width}, 3]")
        if not (frames.dtype == torch.uint8 or frames.is_floating_point()):
            raise ValueError(f"frames are {frames.dtype}; expected uint8, or floating point in 0…1")
        if frames.is_floating_point():
            check_finite("the video", frames, "decode it again: NaN would show as black")
        for frame in frames:
            if frame.is_floating_point():
                frame = frame.float().mul(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)
            picture = av.VideoFrame.from_ndarray(frame.contiguous().cpu().numpy(), format="rgb24")
            try:
                # BT.601 is what players assume that ignore the colour tag; the others read it.
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601")
                self._container.mux(self._stream.encode(picture))
            except av.FFmpegError as error:
                raise self._failure(error) from error
            self.frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._container is not None:  # None after an error in write()
                self._finish()
        except (OSError, av.FFmpegError) as broken:
            raise self._failure(broken) from broken
        finally:
            self._abandon()

    def _open(self) -> None:
        fragments = _FRAGMENTS if self._suffix == ".mp4" else {}
        container = av.open(str(self._growing), "w", container_options=fragments)
        self._container = container
        container.metadata.update(self._metadata)
        try:
            stream = container.add_stream(self._format.codec, rate=self.fps)
        except av.codec.codec.UnknownCodecError as error:
            raise OutputError(
                f"this build of PyAV has no encoder {self._format.codec}; install the av wheel, or write another "
                f"format ({' or '.join(FORMATS)})"
            ) from error
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        stream.options = {"crf": str(self._crf), **self._format.options}
        context = stream.codec_context
        context.bit_rate = 0  # the rate factor alone decides
        context.gop_size = max(1, round(2 * self.fps))  # seekable, and safe on disk, every two seconds
        context.colorspace, context.color_range = _BT601, _LIMITED_RANGE
        context.color_primaries = context.color_trc = _BT709
        self._stream = stream

    def _close(self) -> None:
        """Flush the encoder and write the file's end; the container is always closed."""
        assert self._container is not None
        container, self._container = self._container, None
        with container:
            if self.frames:
                container.mux(self._stream.encode())

    def _finish(self) -> None:
        if not self.frames:
            raise ValueError(f"no frame was written to {self.path}; nothing was saved")
        self._close()
        if self._suffix == ".mp4":
            with whole_file(self.path) as whole:
                _rearrange(self._growing, whole)
            unlock_on_windows(self._claimed)
            self._growing.unlink()
        else:
            unlock_on_windows(self._claimed)
            os.replace(self._growing, self.path)

    def _failure(self, error: OSError | av.FFmpegError) -> OutputError:
        """Abandon the file; returns the error, which names the part that is left."""
        self._abandon()
        root = error.__cause__ if isinstance(error, OutputError) and isinstance(error.__cause__, OSError) else error
        kept = f"the first part is kept in {self.partial.name}" if self.partial else "no file was left behind"
        return OutputError(f"cannot write {self.path}: {root.strerror or root}; {kept}")

    def _abandon(self) -> None:
        """Remove the file, except its playable part. Does nothing after success or a second call."""
        if self._container is not None:
            with suppress(av.FFmpegError):  # on a full disk the end cannot be written
                self._close()
        frames = _playable_frames(self._growing) if self._growing.exists() else 0
        unlock_on_windows(self._claimed)
        if frames:
            self.partial = _keep_part(self._growing, self.path)
            done = f"its first {frames} of {self.frames} frames are"
            _log.warning("[Light Forcing] %s was not finished; %s in %s", self.path, done, self.partial.name)
        self._growing.unlink(missing_ok=True)
        self._claimed.close()


def rescue_abandoned(folder: Path) -> None:
    """Recover growing files of killed processes in `folder`: a playable one becomes `<stem>.partial<suffix>`."""
    for stem, path in abandoned(folder, growing=True):
        with suppress(OSError):  # on Windows another process may rescue it too
            if _playable_frames(path):
                partial = _keep_part(path, folder / f"{stem}{path.suffix}")
                _log.warning("[Light Forcing] %s holds the finished part of a video from a killed process", partial)
            path.unlink(missing_ok=True)


def _keep_part(growing: Path, video: Path) -> Path:
    partial = free_name(video.with_name(f"{video.stem}.partial{video.suffix}"))
    os.replace(growing, partial)
    return partial


def _rearrange(source: Path, target: Path) -> None:
    """Copy a fragmented MP4 into the usual layout, index and metadata first.

    It then plays while it loads, every editor reads it, and ComfyUI finds the graph in the first 64 MB.
    """
    options = {"movflags": "use_metadata_tags+faststart"}
    with av.open(str(source)) as fragments, av.open(str(target), "w", container_options=options) as whole:
        technical = {"major_brand", "minor_version", "compatible_brands", "encoder"}
        whole.metadata.update({key: text for key, text in fragments.metadata.items() if key not in technical})
        stream = whole.add_stream_from_template(fragments.streams.video[0])
        start = None
        for packet in fragments.demux(video=0):
            if packet.dts is None or packet.pts is None:
                continue  # the end
            if start is None:
                start = packet.pts  # fragments start late because of frames encoded out of order
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = stream
            whole.mux(packet)


def _playable_frames(path: Path) -> int:
    """Cut an interrupted MP4 after its last complete fragment (WebM needs no cut) and count the remaining frames."""
    if path.suffix.lower() == ".mp4":
        end, size = 0, path.stat().st_size
        with open(path, "r+b", opener=lambda name, flags: os.open(name, flags | NO_LINKS)) as file:
            position = 0
            while len(header := file.read(_BOX_HEADER)) == _BOX_HEADER:
                position += max(int.from_bytes(header[:4], "big"), _BOX_HEADER)
                if header[4:] == b"mdat" and position <= size:
                    end = position
                file.seek(position)
            file.truncate(end)
    try:
        with av.open(str(path)) as container:
            return sum(packet.dts is not None for packet in container.demux(video=0))
    except av.FFmpegError:
        return 0
