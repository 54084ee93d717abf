"""Videos are encoded as they are made, appear whole under their name, and carry the graph they came from."""

import json
import multiprocessing
import os
import resource
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lightforcing.lightforcing_core.files import video as video_file
from lightforcing.lightforcing_core.files.output import OutputError
from lightforcing.lightforcing_core.files.video import VideoWriter, rescue_abandoned

HEIGHT, WIDTH = 48, 64
COLOURS = [(200, 40, 90), (30, 160, 60), (70, 80, 220), (240, 240, 240), (15, 15, 15)]


def plain(colour, count=1):
    return np.broadcast_to(np.array(colour, dtype=np.uint8), (count, HEIGHT, WIDTH, 3)).copy()


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def writer(path, **options):
    return VideoWriter(path, height=HEIGHT, width=WIDTH, **options)


def decoded(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(params=[".mp4", ".webm"])
def target(request, tmp_path):
    return tmp_path / f"clip{request.param}"


@pytest.fixture
def little_space():
    """A limit on the size of files, which the encoder meets like a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("fps", [16, 23.976])
def test_every_frame_is_there_at_its_time_and_the_graph_with_them(tmp_path, target, fps):
    graph, prompt = {"nodes": [{"id": 1, "title": 'a "quoted" {brace} ü'}]}, {"3": {"class_type": "KSampler"}}
    with writer(target, fps=fps, metadata={"workflow": graph, "prompt": json.dumps(prompt)}) as video:
        for count in (1, 12, 4, 0, 30):
            video.write(noise(count))
        assert not target.exists()
    assert os.listdir(tmp_path) == [target.name]
    assert (video.path, video.frames) == (target, 47)
    with av.open(str(target)) as container:
        stream, found = container.streams.video[0], {key.lower(): text for key, text in container.metadata.items()}
        context = stream.codec_context
        assert (stream.width, stream.height, context.pix_fmt) == (WIDTH, HEIGHT, "yuv420p")
        # Matrix BT.601 in limited range, whether a reader heeds the tag or not.
        assert (context.colorspace, context.color_range) == (6, 1)
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        times = [frame.time for frame in container.decode(video=0)]
    # WebM counts in milliseconds.
    np.testing.assert_allclose(times, np.arange(47) / fps, atol=2e-3 if target.suffix == ".webm" else 1e-4)
    assert (json.loads(found["workflow"]), json.loads(found["prompt"])) == (graph, prompt)


@pytest.mark.parametrize("kind", ["numpy uint8", "numpy float", "torch uint8", "torch float", "torch half"])
def test_colours_come_back(target, kind):
    with writer(target) as video:
        for colour in COLOURS:
            frames = plain(colour, 2)
            if "torch" in kind:
                frames = torch.from_numpy(frames)
            if "float" in kind:
                frames = frames / np.float32(255)
            if "half" in kind:
                frames = (frames / 255.0).half()
            video.write(frames)
    for index, frame in enumerate(decoded(video.path)):
        assert np.abs(frame.mean(axis=(0, 1)) - COLOURS[index // 2]).max() < 6


def test_values_outside_0_1_are_clamped(tmp_path):
    frames = torch.stack([torch.full((HEIGHT, WIDTH, 3), value) for value in (-0.5, 1.5)])
    with writer(tmp_path / "clip.mp4") as video:
        video.write(frames)
    black, white = decoded(video.path)
    assert black.max() <= 2
    assert white.min() >= 253


def test_index_and_graph_stand_in_front_of_the_pictures(tmp_path):
    """A player starts before the file is loaded; ComfyUI reads only the start of a file for its graph."""
    with writer(tmp_path / "clip.mp4", metadata={"workflow": "{}"}) as video:
        video.write(noise(40))
    contents = video.path.read_bytes()
    assert 0 < contents.index(b"moov") < contents.index(b"workflow") < contents.index(b"mdat")
    assert b"moof" not in contents
    with av.open(str(video.path)) as container:
        assert container.streams.video[0].frames == 40


def test_memory_is_flat(target):
    """The last 380 of these frames are 33 MB, 16 MB as the encoder sees them; its own buffers are filled early."""
    resident = []
    with VideoWriter(target, height=128, width=224, crf=50) as video:
        for index in range(500):
            video.write(np.full((1, 128, 224, 3), index // 2, dtype=np.uint8))
            if index in (120, 499):
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert resident[1] - resident[0] < 10e6


class Stop(BaseException):
    """Like the interrupt of a host."""


def feed(video, pieces, end=None):
    with video:
        for frames in pieces:
            video.write(frames)
        if end is not None:
            raise end


def test_an_interrupted_video_is_kept_beside_the_name_and_an_earlier_part_never_replaced(tmp_path, target):
    target.write_bytes(b"former")
    names = [f"clip.partial{target.suffix}", f"clip.partial-2{target.suffix}"]
    for name in names:
        video = writer(target, metadata={"workflow": "{}"})
        with pytest.raises(Stop):
            feed(video, [noise(20)], Stop())
        assert video.partial == tmp_path / name
        assert len(decoded(video.partial)) == 20
    assert target.read_bytes() == b"former"
    with av.open(str(video.partial)) as container:
        assert {key.lower(): text for key, text in container.metadata.items()}["workflow"] == "{}"
    assert sorted(os.listdir(tmp_path)) == sorted([target.name, *names])


def test_a_full_disk_keeps_what_plays(tmp_path, target, little_space):
    video, suffix = writer(target), target.suffix
    pieces = [noise(20)] * 40
    little_space(200_000)
    with pytest.raises(OutputError, match=rf"clip\{suffix}: File too large.*clip\.partial\{suffix}"):
        feed(video, pieces)
    assert os.listdir(tmp_path) == [f"clip.partial{suffix}"]
    assert 20 <= len(decoded(video.partial)) < video.frames


def test_a_disk_that_fills_up_at_the_very_end_keeps_every_frame(tmp_path, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_file, "_rearrange", full)
    video = writer(tmp_path / "clip.mp4")
    with pytest.raises(OutputError, match=r"clip\.mp4: No space left on device; .*clip\.partial\.mp4"), video:
        video.write(noise(20))
    assert os.listdir(tmp_path) == ["clip.partial.mp4"]
    assert len(decoded(video.partial)) == 20


def killed(folder):
    with VideoWriter(f"{folder}/clip.mp4", height=HEIGHT, width=WIDTH) as video:
        for _ in range(10):
            video.write(noise(20))
        os._exit(9)


def test_a_video_of_a_killed_process_is_rescued_and_that_of_a_living_one_is_not(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join(30)
    (growing,) = tmp_path.glob(".clip.*.growing*")
    for name in (".b.7.growing.webm", ".growing.mp4"):  # the second is not ours
        (tmp_path / name).touch()
    with writer(tmp_path / "slow.webm") as slow:
        for path in tmp_path.glob(".slow*"):
            os.utime(path, (0, 0))  # however long ago it was written
        slow.write(noise(1))
        with writer(tmp_path / "new.mp4") as video:
            video.write(noise(1))
    assert len(decoded(tmp_path / f"clip.partial{growing.suffix}")) >= 32
    assert sorted(os.listdir(tmp_path)) == [".growing.mp4", f"clip.partial{growing.suffix}", "new.mp4", "slow.webm"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_neither_followed_nor_cut(tmp_path, link):
    precious, folder = tmp_path / "precious.mp4", tmp_path / "folder"
    folder.mkdir()
    precious.write_bytes(b"precious" * 100)
    link(precious, folder / ".clip.12ab.growing.mp4")
    link(precious, folder / ".clip.12ab.part.mp4")
    os.symlink(precious, folder / "new.mp4")
    with writer(folder / "new.mp4") as video:
        video.write(noise(1))
    rescue_abandoned(folder)
    assert precious.read_bytes() == b"precious" * 100
    assert not (folder / "new.mp4").is_symlink()
    assert sorted(os.listdir(folder)) == [".clip.12ab.growing.mp4", ".clip.12ab.part.mp4", "new.mp4"]


def test_an_error_that_was_dealt_with_is_not_raised_twice(tmp_path, little_space):
    with writer(tmp_path / "clip.mp4") as video:
        little_space(50_000)
        with pytest.raises(OutputError):
            video.write(noise(800))
    assert not video.path.exists()


@pytest.mark.parametrize(("end", "error"), [(None, ValueError), (Stop(), Stop)])
def test_a_video_without_frames_leaves_nothing(tmp_path, end, error):
    video = writer(tmp_path / "clip.mp4")
    with pytest.raises(error, match=None if end else "no frame was written"):
        feed(video, [noise(0)], end)
    assert video.partial is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.mp4", {"height": 481, "width": 64}, "height 481 is not a multiple of 2; use 480 or 482"),
        ("clip.mp4", {"height": 64, "width": 0}, "width 0 .* use 2 or 4"),
        ("clip.avi", {}, r"suffix '\.avi' is not a supported video format; use \.mp4 or \.webm"),
        ("clip", {}, "suffix ''"),
        ("clip.mp4", {"fps": 0}, "fps 0 is outside"),
        ("clip.mp4", {"crf": 52}, r"crf 52 is outside 0 … 51 of \.mp4; lower is better, 19 is usual"),
        ("clip.webm", {"crf": -1}, r"crf -1 is outside 0 … 63 of \.webm"),
    ],
)
def test_what_cannot_be_encoded_is_refused_at_once(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, **{"height": HEIGHT, "width": WIDTH, **options})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (noise(1)[0], r"shape \(48, 64, 3\); expected \[n, 48, 64, 3\]"),
        (noise(1)[:, :, :32], r"shape \(1, 48, 32, 3\)"),
        (noise(1).astype(np.int32), "int32; expected uint8, or floating"),
        (np.full((1, 48, 64, 3), np.nan, np.float32), "the video holds NaN or infinity"),
        (np.full((1, 48, 64, 3), np.inf, np.float16), "the video holds NaN or infinity"),
    ],
)
def test_frames_of_another_shape_or_kind_are_refused(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message), writer(tmp_path / "clip.mp4") as video:
        video.write(frames)
    assert os.listdir(tmp_path) == []


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    nothing = video_file.VideoFormat("no-such-encoder", crf=1, worst_crf=2, options={})
    monkeypatch.setitem(video_file.FORMATS, ".mp4", nothing)
    with pytest.raises(OutputError, match="no encoder no-such-encoder; install"), writer(tmp_path / "clip.mp4"):
        pass
    assert os.listdir(tmp_path) == []
