"""The folder that a batch's videos and unfinished runs are in: on a disk, or wherever fsspec reaches."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ...lightforcing_core.files.output import prepare_folder, whole_file
from ..queue.prompt import UsageError


class Store:
    """Files by name below `url`: a path, or s3://…, gs://… and others. Each appears whole."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"--out {url}: {error}") from error
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if self._is_local:
            prepare_folder(self._root)

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def has(self, name: str) -> bool:
        return bool(self._fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            self.put(path, name)

    def put(self, source: Path, name: str) -> None:
        if not self._is_local:
            self._fs.put_file(str(source), self.path(name))  # one request, so whole or not at all
            return
        with whole_file(self.path(name)) as partial:
            shutil.copyfile(source, partial)

    def get(self, name: str, target: Path) -> Path:
        self._fs.get_file(self.path(name), str(target))
        return target

    def remove(self, name: str) -> None:
        if self.has(name):
            self._fs.rm_file(self.path(name))
