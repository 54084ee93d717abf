"""Output files that are complete or absent, and numbered output files.

A file grows under a hidden name, `.NAME.TOKEN.part.EXT` or `.NAME.TOKEN.growing.EXT`; `.NAME_00001.reserved` reserves a
number. Its writer holds a lock on it, by which the next writer in the folder knows that another was killed.
"""

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which renames and deletes no open file: there the open file is the lock
    fcntl = None  # type: ignore[assignment]

NO_LINKS: int = getattr(os, "O_NOFOLLOW", 0)
_HIDDEN = re.compile(r"\.(?P<stem>.+?)(\.[0-9a-f]+\.(?P<kind>part|growing)(\.[^.]*)?|_\d{5,}\.reserved)", re.DOTALL)


class OutputError(OSError):
    """The output folder cannot take the files; the message says why and what to do."""


def prepare_folder(folder: str | Path, *, bytes_needed: int = 0) -> Path:
    """Create `folder` and check that a file of `bytes_needed` bytes can be written there; OutputError if not."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise OutputError(
            f"{folder} has {free / 1e6:.0f} MB free, {bytes_needed / 1e6:.0f} MB are needed; "
            f"free some space or choose another folder"
        )
    return folder


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and its parents that do not exist yet, the lowest first."""
    return [one for one in (folder, *folder.parents) if not os.path.exists(one)]


def remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def claim(path: Path) -> FileIO:
    """Create `path` and lock it until the returned file is closed; FileExistsError if another process has it."""
    file = FileIO(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "r+")
    with suppress(OSError):  # on a file system without locks nothing is cleaned
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
    if not os.fstat(file.fileno()).st_nlink:
        file.close()
        raise FileExistsError(f"{path} was cleaned before it was locked")
    return file


def claim_hidden(path: Path, kind: str) -> tuple[Path, FileIO]:
    """Claim a hidden file of kind "part" or "growing" for `path`."""
    while True:
        hidden = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{kind}{path.suffix}")
        with suppress(FileExistsError):
            return hidden, claim(hidden)


def unlock_on_windows(claimed: FileIO) -> None:
    """Allow a claimed file to be renamed or deleted; elsewhere it is, and stays locked meanwhile."""
    if fcntl is None:
        claimed.close()


def abandoned(folder: Path, *, growing: bool) -> Iterator[tuple[str, Path]]:
    """The hidden files whose writer is gone, `growing` or other ones: the stem that each was for, and its path.

    Each is locked until the next one is asked for. Links are neither followed nor yielded.
    """
    for path in list(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if not match or (match["kind"] == "growing") != growing or path.is_symlink():
            continue
        # OSError: its writer is alive, or another process has cleaned it.
        with suppress(OSError), FileIO(os.open(path, os.O_RDWR | NO_LINKS)) as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(file.fileno())  # not of the path, which may be another file by now
            unlock_on_windows(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.rename(path, path)  # refused by Windows if it is open
                yield match["stem"], path


def clean(folder: Path) -> None:
    """Remove the unfinished files and reservations of killed writers."""
    with suppress(OSError):  # the folder cannot be listed
        for _, path in abandoned(folder, growing=False):
            path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that is renamed to `path` when the block succeeds.

    If the block raises, the temporary file is removed and an existing `path` is unchanged. A full disk raises
    OutputError, which names `path`.
    """
    path = Path(path)
    clean(path.parent)
    partial = None
    try:
        partial, claimed = claim_hidden(path, "part")
        with claimed:
            yield partial
            unlock_on_windows(claimed)
            os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        left = "the existing file is unchanged" if os.path.lexists(path) else "no file was left behind"
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; {left}; check free space and permissions"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or `name-2.ext`, `name-3.ext`, … if it exists: downloads never overwrite."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


@contextmanager
def numbered_path(folder: str | Path, prefix: str, suffix: str) -> Iterator[Path]:
    """The next free `<prefix>_00001<suffix>` in `folder`, reserved against other processes while the block runs.

    Numbers continue from the highest one of the prefix with any suffix, as in ComfyUI. The reservation is a hidden
    empty file. A folder that was created for a file that was never written is removed again. Raises ValueError for a
    prefix, or one with the suffix, that is not a plain file name, OutputError if the folder cannot be written.
    """
    for name in (prefix, prefix + suffix):
        if not name or Path(name).name != name or "\0" in name:
            raise ValueError(f"{name!r:.80} is not a plain file name; pass folders in `folder`")
    folder = Path(folder)
    made = missing_folders(folder)
    taken = re.compile(rf"\.?{re.escape(prefix)}_(\d{{1,15}})(?!\d)", re.IGNORECASE)
    try:
        clean(prepare_folder(folder))
        while True:
            numbers = [int(match[1]) for name in os.listdir(folder) if (match := taken.match(name))]
            path = folder / f"{prefix}_{max(numbers, default=0) + 1:05d}{suffix}"
            # The suffix is left out: two formats must not share a number either.
            reservation = folder / f".{path.stem}.reserved"
            try:
                claimed = claim(reservation)
            except FileExistsError:
                continue  # another process was faster; it is in the next listing
            except OSError as error:
                raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another name") from error
            try:
                if not os.path.lexists(path):  # else another process has finished since the check
                    yield path
                    return
            finally:
                with claimed:
                    unlock_on_windows(claimed)
                    reservation.unlink(missing_ok=True)
    finally:
        remove_empty(made)
