"""Open files of a run directory for sending: only regular files that lie in it.

The path of a file may come from a spool line, and the directory from somebody else. A link that leads out of the
directory is refused, also one that replaces a file between the check and the opening.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ml2o_dist.runtime.errors import UserError

LIMIT = 1 << 30
"""Maximum bytes of a sent file: pictures, tables, settings and weights are far smaller."""


@contextmanager
def opened(file: Path, run_dir: Path) -> Iterator[IO[bytes]]:
    """Open a regular file in `run_dir` for reading. Links are followed as long as they stay in `run_dir`.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it lies outside, is no regular file, or cannot be opened.
    """
    try:
        handle = _handle(file, run_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "it is gone", str(file)) from error
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read, and is not sent: {error.strerror or error}") from error
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{str(file)!r} is not a regular file and is not sent")
        if about.st_size > LIMIT:
            raise UserError(f"{str(file)!r} is larger than {LIMIT >> 20} MiB and is not sent")
        with open(handle, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(handle)


def copied(file: Path, run_dir: Path, target: Path) -> None:
    """Copy a regular file in `run_dir` to `target`, a new file; raises as `opened` does, and OSError."""
    with opened(file, run_dir) as stream, target.open("xb") as copy:
        shutil.copyfileobj(stream, copy)


def _handle(file: Path, run_dir: Path) -> int:
    """Return a handle of the file, opened one path component at a time and never through a link.

    The path was resolved a moment before; if a component has been replaced by a link since, opening fails.
    """
    try:
        root, found = Path(os.path.realpath(run_dir)), Path(os.path.realpath(file))
    except ValueError as error:  # the name contains a NUL
        raise UserError(f"{str(file)!r} is no file name, and is not sent: {error}") from error
    if found == root or not found.is_relative_to(root):
        raise UserError(f"{str(file)!r} lies outside {str(run_dir)!r} and is not sent")
    parts = found.relative_to(root).parts
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = below
        # A FIFO without a writer would block.
        return os.open(parts[-1], os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
