"""Files that are whole or not there: written beside their place, flushed to the disk, renamed into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a new file for the `with` block; where the block ends well it takes the place of `file`, else it is removed.

    The folder of `file` is made. Raises OSError where it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            flush_to_disk(stream)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a file on a shared disk from other users
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


def flush_to_disk(stream: IO[bytes]) -> None:
    """Return when the disk has what was written to `stream`."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Return when the disk has the names in `folder`: a rename must survive a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
