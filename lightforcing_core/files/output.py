"""Output files that are complete or absent, and numbered output files."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class OutputError(OSError):
    """The output folder cannot take the files; the message says why and what to do."""


def prepare_folder(folder: str | Path, *, bytes_needed: int = 0) -> Path:
    """Create `folder` and check that a file of `bytes_needed` bytes can be written there.

    Raises OutputError if the folder cannot be created or written, or has less free space; a folder created for this is
    then removed again.
    """
    folder = Path(folder)
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        remove_empty(made)
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to {folder}: {reason}; choose another folder") from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        remove_empty(made)
        raise OutputError(
            f"{folder} has {free / 1e6:.0f} MB free, {bytes_needed / 1e6:.0f} MB are needed; "
            f"free some space or choose another folder"
        )
    return folder


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and its parents that do not exist yet, the lowest first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the empty folders among `folders`."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that is renamed to `path` when the block succeeds.

    If the block raises, the temporary file is removed and an existing `path` is unchanged. A full disk raises
    OutputError, which names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        left = "the existing file is unchanged" if path.exists() else "no file was left behind"
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; {left}; check free space and permissions"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or `name-2.ext`, `name-3.ext`, … if it exists: downloads never overwrite."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


@contextmanager
def numbered_path(folder: str | Path, prefix: str, suffix: str) -> Iterator[Path]:
    """The next free `<prefix>_00001<suffix>` in `folder`, reserved against other processes while the block runs.

    Numbers continue from the highest one of the prefix with any suffix, as in ComfyUI. The reservation is a hidden
    empty file. A folder that was created for a file that was never written is removed again. Raises ValueError for a
    prefix that is not a plain file name, OutputError if the folder cannot be written.
    """
    if not prefix or Path(prefix).name != prefix or "\0" in prefix:
        raise ValueError(f"prefix {prefix!r} is not a plain file name; pass folders in `folder`")
    made = missing_folders(Path(folder))
    folder = prepare_folder(folder)
    taken = re.compile(rf"\.?{re.escape(prefix)}_(\d+)(?!\d)", re.IGNORECASE)
    while True:
        numbers = [int(match[1]) for name in os.listdir(folder) if (match := taken.match(name))]
        path = folder / f"{prefix}_{max(numbers, default=0) + 1:05d}{suffix}"
        # The suffix is left out: two formats must not share a number either.
        reservation = folder / f".{path.stem}.reserved"
        try:
            os.close(os.open(reservation, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue  # another process was faster; it is in the next listing
        except OSError as error:
            remove_empty(made)
            raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another name") from error
        if not path.exists():
            break
        reservation.unlink()  # another process has already finished since the check
    try:
        yield path
    finally:
        reservation.unlink(missing_ok=True)
        remove_empty(made)
