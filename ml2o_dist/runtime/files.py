"""Where relative paths begin, where caches lie, and files that are whole or not there."""

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
    """Return the folder that relative paths are resolved against: ML2O_HOME, else the current one."""
    return expanded(os.environ.get("ML2O_HOME") or ".").absolute()


def cache_folder() -> Path:
    """Return the folder of everything that can be built again: ML2O_CACHE, else `~/.cache/ml2o_dist`."""
    given = os.environ.get("ML2O_CACHE", "")
    return expanded(given or "~/.cache/ml2o_dist").absolute()


def expanded(path: Path | str) -> Path:
    """Return `path` with the home of a user for a `~` or `~name` at its beginning, where there is such a user."""
    return Path(os.path.expanduser(path))


def state_folder() -> Path:
    """Return the folder of what this user's machine must remember: ML2O_STATE, else `~/.config/ml2o_dist`."""
    given = os.environ.get("ML2O_STATE", "")
    return expanded(given or "~/.config/ml2o_dist").resolve()


def private_folder(folder: Path) -> Path:
    """Make `folder`, mode 0700, where it is missing; return it.

    Raises:
        PermissionError: it is a link, belongs to another user, or others may write to it; OSError: it cannot be made.
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
    """Open a new file for the `with` block; where the block ends well it takes the place of `file`, else it is removed.

    Its `name` is where it is until then; the folder of `file` is made. Its permissions are those that the umask leaves.
    A link at `file` is replaced, not followed. Raises OSError where it cannot be written, or `file` is a folder, a
    device or anything else than a regular file.
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
    """Raise OSError where something else than a regular file, or a link to something else, is at `file`.

    Also in the folders of devices: /dev/stdout is a link that may lead to a regular file.
    """
    if "\0" in str(file):
        raise OSError(errno.EINVAL, "a name cannot have a NUL character", str(file))
    if f"{os.path.realpath(file.parent)}/".startswith(("/proc/", "/sys/")) or os.path.realpath(file.parent) == "/dev":
        raise OSError(errno.EPERM, "it is in a folder of devices", str(file))
    try:
        kind = os.stat(file).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return  # a link that leads nowhere is replaced; that its folder is a file is said when that is made
        raise
    if not stat.S_ISREG(kind):
        raise OSError(errno.EEXIST, "it is a folder" if stat.S_ISDIR(kind) else "it is not a regular file", str(file))


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
