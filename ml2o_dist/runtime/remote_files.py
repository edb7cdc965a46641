"""URIs of the file systems that pyarrow knows (s3, gs, abfs, hdfs, file): told from paths, opened, errors named."""

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
"""How long Google's client asks again before it fails, unless the URI says so; its own default is 15 minutes."""

LONGEST_REASON = 240
"""Characters of a file system's own words that are shown: some hand on whole stacks."""


def is_uri(place: Path | str) -> bool:
    """Say whether a place is given as a URI: `s3://bucket/runs/x`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(place)) is not None


def bare(uri: str) -> str:
    """Return `uri` without a slash at its end."""
    return re.sub(r"(?<=[^:/])/+$", "", uri)


def connect(place: str, what: str) -> tuple[str, FileSystem, str]:
    """Return the bare URI, its file system and the path in it; `what` is what an error calls the place.

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
    """Return the content of a file of at most `limit` bytes; `shown` is what an error calls it. Raises UserError."""
    with answering(f"{shown} cannot be read"):
        info = filesystem.get_file_info(path)
        check_remote(info, shown, limit)
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read(info.size + 1 if info.size is not None else limit + 1)
    if len(content) > limit:  # it grew meanwhile
        raise UserError(f"{shown} is larger than {limit / MIB:g} MiB")
    return content


def check_remote(info: FileInfo, shown: str, limit: int) -> None:
    """Raise UserError where something is there that is no regular file of at most `limit` bytes."""
    if info.type not in (FileType.File, FileType.NotFound):
        raise UserError(f"{shown} is not a regular file")
    if info.size is not None and info.size > limit:
        raise UserError(f"{shown} is larger than {limit / MIB:g} MiB")


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Turn what a file system raises in the `with` block into UserError: `what`, and why, in one line."""
    try:
        yield
    except (OSError, pa.ArrowException, NotImplementedError) as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of what a file system said, or its kind where it said nothing."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."
