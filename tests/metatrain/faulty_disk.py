"""A disk that fails, or whose process dies, at the k-th file operation: what Python code does through os and io."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import pytest

How = Literal["refused", "done and failed", "torn and failed", "killed before", "killed after", "killed in mid-write"]
HOWS: tuple[How, ...] = (
    "refused",
    "done and failed",
    "torn and failed",
    "killed before",
    "killed after",
    "killed in mid-write",
)

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "chmod")


class Killed(BaseException):
    """Stands for SIGKILL: from now on the disk does nothing, so that no clean-up of the dead process has an effect."""


class FaultyDisk:
    """Counts the file operations of its process and strikes at the one numbered `at` (from 0; None: at none)."""

    def __init__(self, at: int | None = None, how: How = "refused") -> None:
        self.done: list[str] = []
        self._at, self._how, self._dead = at, how, False

    def operation(self, name: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do one operation, or what strikes it; `half` does a part of it."""
        if self._dead:
            raise Killed
        struck = len(self.done) == self._at
        self.done.append(name)
        if not struck:
            return act()
        if self._how in ("done and failed", "killed after"):
            with suppress(OSError):  # an operation that fails of itself
                act()
        elif self._how in ("torn and failed", "killed in mid-write") and half is not None:
            half()
        if self._how.startswith("killed"):
            self._dead = True
            raise Killed
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def active(self) -> Iterator[FaultyDisk]:
        """Put the disk under this process for the time of a `with` block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            patch.setattr(io, "open", self._opened(io.open))
            yield self

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: self.operation(name, lambda: real(*args, **options))

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if "b" not in mode or "r" in mode:
                return self.operation(f"open {mode}", lambda: real(file, mode, buffering, *args, **options))
            # unbuffered: a buffer that is written when the dead process closes the file would be no death
            unbuffered = lambda: real(file, mode, 0, *args, **options)  # noqa: E731
            return _File(self, self.operation(f"open {mode}", unbuffered))

        return opened


class _File:
    """A file opened for writing whose every write is an operation."""

    def __init__(self, disk: FaultyDisk, file: Any) -> None:
        self._disk, self._file = disk, file

    def write(self, content: Any) -> Any:
        view = memoryview(content).cast("B")
        half = view[: len(view) // 2]
        return self._disk.operation("write", lambda: self._file.write(view), lambda: self._file.write(half))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
