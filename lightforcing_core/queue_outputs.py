"""Where a batch's files go: a folder per job that appears whole or not at all, and numbered previews.

The folder's renaming is the moment in which a job becomes done: a crash before it leaves a hidden folder that the next
start throws away, a crash after it a folder that the next start takes as done.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from .comfy_server import RemoteFile
from .files.output import whole_file
from .queue_client import Preview
from .queue_jobs import Job
from .queue_journal import Journal
from .queue_overrides import UsageError

Download = Callable[[RemoteFile, Path], Path]
Store = Callable[[Job, list[RemoteFile], Download], list[Path]]


def store_in(folder: Path) -> Store:
    """For a single run: the files go below `folder`, beside what is there."""
    return lambda job, files, download: [download(file, folder) for file in files]


def store_in_folders(folder: Path) -> Store:
    """For a batch: the files of a job go below `folder/NAME`, all at once."""

    def store(job: Job, files: list[RemoteFile], download: Download) -> list[Path]:
        target, partial = folder / job.name, _partial(folder, job.name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        paths = [download(file, partial) for file in files]
        os.replace(partial, target)
        return [target / path.relative_to(partial) for path in paths]

    return store


def settle_folders(folder: Path, names: Iterable[str], journal: Journal) -> None:
    """Before a start: take whole folders that the journal does not know yet as done, throw parts of folders away.

    Raises UsageError for a folder in the way that no start of this batch made.
    """
    sent = {attempt.job: attempt for attempt in journal.attempts}
    for name in names:
        shutil.rmtree(_partial(folder, name), ignore_errors=True)
        target = folder / name
        if name in journal.done or not target.exists():
            continue
        if name not in sent:
            raise UsageError(f"{target} is there already and not from this batch; choose another --out")
        journal.finished(sent[name], sorted(path for path in target.rglob("*") if path.is_file()))


def save_preview(folder: Path, preview: Preview) -> Path:
    """Write a preview below `folder` under the next number, `00001.jpg`, `00002.jpg`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem) for path in folder.iterdir() if re.fullmatch(r"\d+", path.stem)]
    path = folder / f"{max(numbers, default=0) + 1:05d}{preview.suffix}"
    with whole_file(path) as partial:
        partial.write_bytes(preview.image)
    return path


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}.part"
