"""A remote file system without rename, whose files grow as they are written, that fails or is lost at the k-th call."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSystemHandler, FileType, PyFileSystem

from tests.metatrain.faulty_disk import Killed


class FaultyStore(FileSystemHandler):
    """Keeps `files` by path. Strikes at the call numbered `at` (from 0), before it has an effect, or is away.

    `killed`: the process dies there, so that no later call has an effect; else that call alone raises OSError.
    """

    def __init__(self, files: dict[str, bytes] | None = None, at: int | None = None, killed: bool = True) -> None:
        self.files = {} if files is None else files
        self.calls: list[str] = []
        self.away = False
        self._at, self._killed, self._dead = at, killed, False

    def filesystem(self) -> PyFileSystem:
        return PyFileSystem(self)

    def call(self, name: str) -> None:
        """Count a call that changes something; raise where it is struck."""
        if self._dead:
            raise Killed
        if self.away:
            raise OSError(f"the store is away ({name})")
        self.calls.append(name)
        if len(self.calls) - 1 == self._at:
            self._dead = self._killed
            raise Killed if self._killed else OSError("the store hiccups")

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        if self.away:
            raise OSError("the store is away (look)")
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[FileInfo]:
        if self.away:
            raise OSError("the store is away (list)")
        below = f"{selector.base_dir}/"
        return [self._info(path) for path in sorted(self.files) if path.startswith(below)]

    def _info(self, path: str) -> FileInfo:
        if path in self.files:
            return FileInfo(path, FileType.File, size=len(self.files[path]))
        folder = any(file.startswith(f"{path}/") for file in self.files)
        return FileInfo(path, FileType.Directory if folder else FileType.NotFound)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.call(f"create_dir {path}")

    def delete_file(self, path: str) -> None:
        self.call(f"delete {path}")
        del self.files[path]

    def delete_dir(self, path: str) -> None:
        for file in [file for file in sorted(self.files) if file.startswith(f"{path}/")]:
            self.delete_file(file)

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        self.call(f"open {path}")
        self.files[path] = b""
        return pa.PythonFile(_Growing(self, path), mode="w")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(io.BytesIO(self.files[path]), mode="r")

    open_input_file = open_input_stream

    def _not_there(self, *args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("this store cannot do that")

    move: Callable[..., NoReturn] = _not_there
    copy_file: Callable[..., NoReturn] = _not_there
    open_append_stream: Callable[..., NoReturn] = _not_there
    delete_dir_contents: Callable[..., NoReturn] = _not_there
    delete_root_dir_contents: Callable[..., NoReturn] = _not_there


class _Growing(io.RawIOBase):
    """A file of the store opened for writing: half of what is written is there before the rest follows."""

    def __init__(self, store: FaultyStore, path: str) -> None:
        self._store, self._path = store, path

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = bytes(content)
        half = len(view) // 2
        for part in (view[:half], view[half:]):
            self._store.call(f"write {self._path}")
            self._store.files[self._path] += part
        return len(view)
