"""The folders for relative paths, caches and state, and files that are written atomically."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def home_folder() -> Path:
    """Return the folder that relative paths are resolved against: ML2O_HOME, else the current folder."""
    return expanded(os.environ.get("ML2O_HOME") or ".").absolute()


def cache_folder() -> Path:
    """Return the folder for data that can be rebuilt: ML2O_CACHE, else `~/.cache/ml2o_dist`."""
    given = os.environ.get("ML2O_CACHE", "")
    return expanded(given or "~/.cache/ml2o_dist").absolute()


def expanded(path: Path | str) -> Path:
    """Return `path` with a leading `~` or `~name` replaced by that user's home, if there is such a user."""
    return Path(os.path.expanduser(path))


def state_folder() -> Path:
    """Return the folder for lasting state of this user on this machine: ML2O_STATE, else `~/.config/ml2o_dist`."""
    given = os.environ.get("ML2O_STATE", "")
    return expanded(given or "~/.config/ml2o_dist").resolve()


def private_folder(folder: Path) -> Path:
    """Create `folder` with mode 0700 if it is missing; return it.

    Raises:
        PermissionError: it is a link, belongs to another user, or others may write to it; OSError: creating it failed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PermissionError(errno.EPERM, "it is no folder, but a file or a link", str(folder)) from error
        raise
    try:
        about = os.fstat(handle)
        if about.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
        if about.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "others may write to it", str(folder))
    finally:
        os.close(handle)
    return folder


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for the `with` block; if the block succeeds it replaces `file`, else it is removed.

    The stream's `name` is the temporary path. The folder of `file` is created if needed, and the umask sets the
    permissions. A link at `file` is replaced, not followed. Raises OSError if writing fails, or if `file` is a folder,
    a device or anything else than a regular file.
    """
    _check_replaceable(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    with open(str(written), "xb") as stream:
        try:
            yield stream
            flush_to_disk(stream)
            os.replace(written, file)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    flush_folder(file.parent)


def _check_replaceable(file: Path) -> None:
    """Raise OSError if `file` is, or links to, something else than a regular file.

    Raise it also for any file in a folder of devices: /dev/stdout is a link that may lead to a regular file.
    """
    if "\0" in str(file):
        raise OSError(errno.EINVAL, "a name cannot have a NUL character", str(file))
    if f"{os.path.realpath(file.parent)}/".startswith(("/proc/", "/sys/")) or os.path.realpath(file.parent) == "/dev":
        raise OSError(errno.EPERM, "it is in a folder of devices", str(file))
    try:
        kind = os.stat(file).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return  # a broken link is replaced; if a parent is a file, creating the folder fails later
        raise
    if not stat.S_ISREG(kind):
        raise OSError(errno.EEXIST, "it is a folder" if stat.S_ISDIR(kind) else "it is not a regular file", str(file))


def flush_to_disk(stream: IO[bytes]) -> None:
    """Flush `stream` and wait until the disk has its data."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in `folder`, so that a rename survives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
