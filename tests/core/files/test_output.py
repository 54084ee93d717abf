"""Output files are whole or absent."""

import errno
import os

import pytest

from lightforcing.lightforcing_core.files.output import OutputError, free_name, prepare_folder, whole_file


def test_file_appears_only_when_the_block_is_done(tmp_path):
    target = tmp_path / "clip.mp4"
    with whole_file(target) as partial:
        partial.write_bytes(b"half")
        assert partial.suffix == ".mp4"
        assert not target.exists()
    assert target.read_bytes() == b"half"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_failure_leaves_the_former_file_and_nothing_else(tmp_path):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"former")

    def write_half():
        with whole_file(target) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OutputError, match=r"cannot write .*clip\.mp4: No space left"),
        whole_file(tmp_path / "clip.mp4"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_an_error_before_the_work(tmp_path):
    with pytest.raises(OutputError, match=r"MB are needed; free some space"):
        prepare_folder(tmp_path, bytes_needed=1 << 60)


def test_refused_folder_is_not_left_behind(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new" / "below", tmp_path / "mine"):
        with pytest.raises(OutputError, match="are needed"):
            prepare_folder(folder, bytes_needed=1 << 60)
    assert os.listdir(tmp_path) == ["mine"]


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="choose another folder"):
        prepare_folder(tmp_path / "taken" / "below")


def test_free_name_counts_up(tmp_path):
    for name in ("a.png", "a-2.png"):
        (tmp_path / name).touch()
    assert free_name(tmp_path / "a.png").name == "a-3.png"
    assert free_name(tmp_path / "b.png").name == "b.png"
