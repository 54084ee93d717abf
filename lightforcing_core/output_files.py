"""Output files that are whole or absent: folders checked before the work, files renamed into place after it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """The output folder cannot take the files; the message says why and what to do."""


def prepare_folder(folder: str | Path, *, bytes_needed: int = 0) -> Path:
    """Make `folder` and make sure that a file of `bytes_needed` bytes can be written there.

    Raises OutputError when the folder cannot be made or written, or has less free space.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to {folder}: {reason}; choose another folder") from error
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise OutputError(
            f"{folder} has {_megabytes(free)} free, {_megabytes(bytes_needed)} are needed; "
            f"free some space or choose another folder"
        )
    return folder


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix, that becomes `path` when the block ends well.

    When the block raises, the temporary file goes and a former `path` stays as it was. A full disk is reported as
    OutputError naming `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        partial.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or where that exists already `name-2.ext`, `name-3.ext`, …: downloads never overwrite."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
