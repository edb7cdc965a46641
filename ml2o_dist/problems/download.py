"""List the raw image files and download missing ones from their official mirrors."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ml2o_dist.problems.image_files import RAW_FILES, RawFile, data_folder, unpacked
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import replacing

MIRRORS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
}
"""Source -> the base address of its files: https, and redirects to https only."""

_TIMEOUT = 30.0  # seconds without an answer; a slow download that keeps coming is not cut off
_CHUNK = 1 << 18
_PACKED = 1 << 16  # bytes by which gzip may make a file larger that it cannot make smaller

Progress = Callable[[str, int, int | None], None]
"""Called with (path under the data root, bytes so far, total bytes if the server gives them)."""


@dataclass(frozen=True)
class FileStatus:
    """One raw file: its path under the data root, whether it exists, its size, and the kind of its content.

    content: `official` (the sha256 of the published data), `unknown` (unpacks to something else), `damaged` (does not
    unpack) or `missing`.
    """

    source: str
    path: str
    present: bool
    bytes: int
    content: Literal["official", "unknown", "damaged", "missing"]


def data_status(data_root: str = "") -> list[FileStatus]:
    """Return the state of all raw image files under `data_root` ("": see `data_folder`); unpacks every one."""
    root = data_folder(data_root)
    return [_status(source, file, root) for source, file in _files()]


def fetch(data_root: str = "", progress: Progress | None = None) -> list[FileStatus]:
    """Download raw files that are missing or whose content is not the official one; return the files' state.

    A file is downloaded by https only, redirects included, up to the largest size that it can have. It is moved into
    place atomically, once its unpacked content has the sha256 of the published data.

    Raises:
        UserError: no network, no such file on the mirror, wrong content or too much of it, a redirect to another
            scheme, or a folder that cannot be written.
    """
    root = data_folder(data_root)
    for source, file in _files():
        if _status(source, file, root).content != "official":
            _download(MIRRORS[source] + file.path.rpartition("/")[2], file, root / file.path, progress)
    return data_status(str(root))


def _files() -> list[tuple[str, RawFile]]:
    return [(source, file) for source, splits in RAW_FILES.items() for pair in splits.values() for file in pair]


def _status(source: str, file: RawFile, root: Path) -> FileStatus:
    path = root / file.path
    if not path.is_file():
        return FileStatus(source, file.path, False, 0, "missing")
    try:
        content: Literal["official", "unknown"]
        content = "official" if _unpacked_sha256(path, file) == file.sha256 else "unknown"
    except (OSError, EOFError, zlib.error, UserError):
        return FileStatus(source, file.path, True, path.stat().st_size, "damaged")
    return FileStatus(source, file.path, True, path.stat().st_size, content)


def _unpacked_sha256(path: Path, file: RawFile) -> str:
    """Return the sha256 of the unpacked content of `path`, "" if that is larger than `file` can be."""
    content = unpacked(path, file.shape)
    return hashlib.sha256(content).hexdigest() if len(content) <= file.unpacked else ""


def _download(url: str, file: RawFile, path: Path, progress: Progress | None) -> None:
    try:
        with replacing(path) as target:
            _receive(url, target, file, progress)
            target.flush()
            try:
                sha256 = _unpacked_sha256(Path(target.name), file)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"what {url} sent cannot be unpacked: {error}") from error
            if sha256 != file.sha256:
                found = f"has sha256 {sha256} unpacked, not {file.sha256}" if sha256 else "is too large unpacked"
                raise UserError(f"what {url} sent {found}: it is not the published file")
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error}") from error


class _OnlyHttps(HTTPRedirectHandler):
    """Follows redirects to https alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _check_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_https(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise UserError(f"{url} is not asked for the data: it must be https")


def _receive(url: str, target: IO[bytes], file: RawFile, progress: Progress | None) -> None:
    limit = file.unpacked + _PACKED
    _check_https(url)
    try:
        with build_opener(_OnlyHttps).open(url, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length", "")
            total, received = int(length) if length.isdecimal() else None, 0
            while (total is None or total <= limit) and (chunk := answer.read(_CHUNK)):
                received += len(chunk)
                if received > limit:
                    break
                target.write(chunk)
                if progress is not None:
                    progress(file.path, received, total)
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise UserError(
            f"cannot download {url}: {error}; without a network, copy the files into a folder and name it with "
            "data.root or ML2O_DATA"
        ) from error
    if max(received, total or 0) > limit:
        raise UserError(
            f"{url} sends {max(received, total or 0)} bytes or more: the published file has at most {limit}"
        )
    if total is not None and received != total:
        raise UserError(f"cannot download {url}: the connection ended after {received} of {total} bytes")
