"""Numbered names: they go on from what is there, and two runs never share one."""

import os

import pytest

from lightforcing.lightforcing_core.files.output import OutputError, numbered_path, whole_file


def test_numbers_go_on_from_the_highest(tmp_path):
    names = ("clip_00001.mp4", "CLIP_00007_.png", "clip_00003.partial.mp4", "clipper_00050.mp4", "clip_x.mp4")
    for name in names:
        (tmp_path / name).touch()
    with numbered_path(tmp_path, "clip", ".webm") as path:
        assert path == tmp_path / "clip_00008.webm"
        assert not path.exists()
    with numbered_path(tmp_path / "new", "a.b (c)", ".mp4") as path:
        assert path.name == "a.b (c)_00001.mp4"


def test_numbers_are_reserved_while_in_use(tmp_path):
    with numbered_path(tmp_path, "clip", ".mp4") as one, numbered_path(tmp_path, "clip", ".webm") as other:
        assert (one.name, other.name) == ("clip_00001.mp4", "clip_00002.webm")
    assert os.listdir(tmp_path) == []


def test_five_digits_are_no_limit(tmp_path):
    for name in ("clip_99999.mp4", f"clip_{'9' * 200}.mp4"):
        (tmp_path / name).touch()
    with numbered_path(tmp_path, "clip", ".mp4") as path, whole_file(path) as partial:
        partial.write_bytes(b"frames")
    assert path.exists()
    with numbered_path(tmp_path, "clip", ".mp4") as path:
        assert path.name == "clip_100001.mp4"


@pytest.mark.parametrize("left", [".clip_00001.reserved", "clip_00001.mp4"])
def test_a_number_that_another_process_took_meanwhile_is_not_taken(tmp_path, monkeypatch, left):
    """It reserves, or even writes and releases, between our look and our claim."""
    look = os.listdir

    def slow(folder):
        found = look(folder)
        monkeypatch.setattr(os, "listdir", look)
        (tmp_path / left).touch()
        return found

    monkeypatch.setattr(os, "listdir", slow)
    with numbered_path(tmp_path, "clip", ".mp4") as path:
        assert path.name == "clip_00002.mp4"
    assert os.listdir(tmp_path) == [left]


def test_folder_made_for_a_file_that_never_came_goes_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new" / "below", tmp_path / "mine"):
        with numbered_path(folder, "clip", ".mp4"):
            assert folder.is_dir()
        with pytest.raises(OutputError, match="File name too long"), numbered_path(folder, "x" * 250, ".mp4"):
            pass
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [*((prefix, ".mp4") for prefix in ("", "a/b", "../a", "/a", "a\0")), ("a", ".b/../../c.mp4"), ("a", ".mp4\0")],
)
def test_prefixes_and_suffixes_that_are_no_file_names_are_refused(tmp_path, prefix, suffix):
    with pytest.raises(ValueError, match="not a plain file name"), numbered_path(tmp_path, prefix, suffix):
        pass
