"""Where relative paths begin, where caches lie, and files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def home_folder() -> Path:
    """Return the folder that relative paths are resolved against: ML2O_HOME, else the current one."""
    return Path(os.environ.get("ML2O_HOME") or ".").expanduser().absolute()


def cache_folder() -> Path:
    """Return the folder of everything that can be built again: ML2O_CACHE, else `~/.cache/ml2o_dist`."""
    given = os.environ.get("ML2O_CACHE", "")
    return (Path(given) if given else Path.home() / ".cache" / "ml2o_dist").expanduser().absolute()


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a new file for the `with` block; where the block ends well it takes the place of `file`, else it is removed.

    Its `name` is where it is until then; the folder of `file` is made. Raises OSError where it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        try:
            yield stream
            flush_to_disk(stream)
            os.chmod(stream.name, 0o644)  # its 0600 would hide a file on a shared disk from other users
            os.replace(stream.name, file)
        except BaseException:
            Path(stream.name).unlink(missing_ok=True)
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
