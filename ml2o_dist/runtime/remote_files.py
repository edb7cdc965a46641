"""Access to URIs of the file systems that pyarrow knows (s3, gs, abfs, hdfs, file), with one-line errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSystem, FileType

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import MIB

GS_RETRY_S = 30
"""How long Google's client retries before it fails, unless the URI sets it; its own default is 15 minutes."""

LONGEST_REASON = 240
"""Most characters shown of a file system's own message: some contain whole stack traces."""


def is_uri(place: Path | str) -> bool:
    """Tell whether a place is given as a URI: `s3://bucket/runs/x`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(place)) is not None


def bare(uri: str) -> str:
    """Return `uri` without a slash at its end."""
    return re.sub(r"(?<=[^:/])/+$", "", uri)


def connect(place: str, what: str) -> tuple[str, FileSystem, str]:
    """Return the bare URI, its file system and the path in it; errors call the place `what`.

    Nothing is read or written yet.

    Raises:
        UserError: an unknown scheme, a password in the URI, or no folder named.
    """
    uri = bare(place)
    parts = urlsplit(uri)
    if parts.password:
        raise UserError(
            f"{what} {parts.scheme}://{parts.username}:***@...: the password would be written into the log; "
            "give credentials in the environment or the provider's configuration file"
        )
    asked = uri
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        asked += f"{'&' if parts.query else '?'}retry_limit_seconds={GS_RETRY_S}"
    try:
        filesystem, path = FileSystem.from_uri(asked)
        path = filesystem.normalize_path(path).rstrip("/")
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{what} {uri!r}: {reason(error)} (allowed: a folder, or file://, s3://, gs://, abfs://, hdfs://)"
        ) from error
    if not path:
        raise UserError(f"{what} {uri!r} names no folder, as in {parts.scheme}://bucket/runs/first")
    return uri, filesystem, path


def read_remote(filesystem: FileSystem, path: str, shown: str, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes. Raises UserError, which calls the file `shown`."""
    with answering(f"{shown} cannot be read"):
        info = filesystem.get_file_info(path)
        check_remote(info, shown, limit)
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read(info.size + 1 if info.size is not None else limit + 1)
    if len(content) > limit:  # the file grew meanwhile
        raise UserError(f"{shown} is larger than {limit / MIB:g} MiB")
    return content


def check_remote(info: FileInfo, shown: str, limit: int) -> None:
    """Raise UserError if there is something else than a regular file of at most `limit` bytes."""
    if info.type not in (FileType.File, FileType.NotFound):
        raise UserError(f"{shown} is not a regular file")
    if info.size is not None and info.size > limit:
        raise UserError(f"{shown} is larger than {limit / MIB:g} MiB")


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Turn errors of a file system in the `with` block into UserError: `what` and the reason, in one line."""
    try:
        yield
    except (OSError, pa.ArrowException, NotImplementedError) as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of a file system's error message, or the error's type if it has no message."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."
