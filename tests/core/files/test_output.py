"""Output files are whole or absent; numbered names go on from what is there, and two runs never share one."""

import errno
import fcntl
import multiprocessing
import os
from contextlib import nullcontext

import pytest

from lightforcing.lightforcing_core.files.output import (
    OutputError,
    clean,
    free_name,
    numbered_path,
    prepare_folder,
    whole_file,
)


@pytest.mark.parametrize("former", [None, b"former"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_file_appears_only_when_the_block_is_done(tmp_path, former, error):
    target = tmp_path / "clip.mp4"
    if former:
        target.write_bytes(former)
    with pytest.raises(error) if error else nullcontext(), whole_file(target) as partial:
        partial.write_bytes(b"new")
        assert partial.suffix == ".mp4"
        assert (target.read_bytes() if target.exists() else None) == former
        if error:
            raise error
    assert (target.read_bytes() if target.exists() else None) == (former if error else b"new")
    assert os.listdir(tmp_path) == ([] if error and not former else ["clip.mp4"])


def write_and_die(folder, writes):
    with writes(folder):
        os._exit(9)


WRITERS = {
    "part": lambda folder: whole_file(folder / "clip.mp4"),
    "part without a suffix": lambda folder: whole_file(folder / "clip"),
    "reservation": lambda folder: numbered_path(folder, "clip", ".mp4"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("next_kind", WRITERS)
def test_what_a_killed_writer_left_is_removed_by_the_next_one_but_not_a_living_ones(tmp_path, kind, next_kind):
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path, WRITERS[kind]))
    process.start()
    process.join(30)
    (left,) = os.listdir(tmp_path)
    with WRITERS[kind](tmp_path):
        (living,) = set(os.listdir(tmp_path))
        os.utime(tmp_path / living, (0, 0))
        with WRITERS[next_kind](tmp_path) as path:
            path.touch()
        assert living in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert left.startswith(".clip")


def test_other_hidden_files_folders_and_links_stay(tmp_path):
    names = [".foo.part", ".reserved", ".foo.reserved", ".part.mp4", ".notes"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".job.12ab.part").mkdir()
    (tmp_path / ".a.12ab.part").symlink_to(tmp_path / ".notes")
    with whole_file(tmp_path / "clip") as partial:
        partial.touch()
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".job.12ab.part", ".a.12ab.part", "clip"])


def test_a_file_system_without_locks_is_written_and_not_cleaned(tmp_path, monkeypatch):
    def unsupported(file, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / ".a.12ab.part").touch()
    with whole_file(tmp_path / "clip") as partial:
        partial.touch()
    assert sorted(os.listdir(tmp_path)) == [".a.12ab.part", "clip"]


def test_a_claim_that_was_cleaned_before_its_lock_is_made_again(tmp_path, monkeypatch):
    lock, calls = fcntl.flock, []

    def late(file, flags):
        calls.append(flags)
        if len(calls) == 1:
            (hidden,) = tmp_path.iterdir()
            hidden.unlink()
        lock(file, flags)

    monkeypatch.setattr("fcntl.flock", late)
    with whole_file(tmp_path / "clip") as partial:
        assert partial.exists()
        assert len(calls) == 2


def test_a_reservation_made_while_an_old_one_is_cleaned_stays(tmp_path, monkeypatch):
    lock, reservation = fcntl.flock, tmp_path / ".clip_00001.reserved"
    reservation.touch()

    def replaced(file, flags):
        reservation.unlink()
        reservation.touch()  # by another process, which has cleaned the old one first
        monkeypatch.setattr("fcntl.flock", lock)
        lock(file, flags)

    monkeypatch.setattr("fcntl.flock", replaced)
    clean(tmp_path)
    assert os.listdir(tmp_path) == [".clip_00001.reserved"]


def test_a_link_under_the_final_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "clip").symlink_to("precious")
    (tmp_path / "other").symlink_to("nowhere")
    with whole_file(tmp_path / "clip") as partial:
        partial.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "clip").read_text() == "new"
    assert free_name(tmp_path / "other").name == "other-2"


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    for folder in (tmp_path / "taken" / "below", tmp_path / "dangling", tmp_path / ("x" * 260)):
        with pytest.raises(OutputError, match="choose another folder"):
            prepare_folder(folder)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "taken"]


def test_numbers_go_on_from_the_highest(tmp_path):
    names = (
        "clip_00001.mp4",
        "CLIP_99998_.png",
        "clip_00003.partial.mp4",
        "clipper_00050.mp4",
        f"clip_{'9' * 200}.mp4",
    )
    for name in names:
        (tmp_path / name).touch()
    for number in ("99999", "100000"):
        with numbered_path(tmp_path, "clip", ".webm") as path:
            assert path == tmp_path / f"clip_{number}.webm"
            assert not path.exists()
            path.touch()
    with numbered_path(tmp_path / "new", "a.b (c)", ".mp4") as path:
        assert path.name == "a.b (c)_00001.mp4"


def test_numbers_are_reserved_while_in_use(tmp_path):
    with numbered_path(tmp_path, "clip", ".mp4") as one, numbered_path(tmp_path, "clip", ".webm") as other:
        assert (one.name, other.name) == ("clip_00001.mp4", "clip_00002.webm")
    assert os.listdir(tmp_path) == []


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


def test_no_folder_is_left_for_a_file_that_never_came(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new" / "below", tmp_path / "mine"):
        with numbered_path(folder, "clip", ".mp4"):
            assert folder.is_dir()
        with pytest.raises(OutputError, match="File name too long"), numbered_path(folder, "x" * 250, ".mp4"):
            pass
    assert os.listdir(tmp_path) == ["mine"]
    with pytest.raises(OutputError, match="MB are needed; free some space"):
        prepare_folder(tmp_path, bytes_needed=1 << 60)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [*((prefix, ".mp4") for prefix in ("", "a/b", "../a", "/a", "a\0")), ("a", ".b/../../c.mp4"), ("a", ".mp4\0")],
)
def test_prefixes_and_suffixes_that_are_no_file_names_are_refused(tmp_path, prefix, suffix):
    with pytest.raises(ValueError, match="not a plain file name"), numbered_path(tmp_path, prefix, suffix):
        pass
