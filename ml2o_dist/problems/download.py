"""The raw image files from their official mirrors: what is there, and how to get what is not."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Literal
from urllib.request import urlopen

from ml2o_dist.errors import UserError
from ml2o_dist.files import replacing
from ml2o_dist.problems.image_files import PACKED_LIMIT, RAW_FILES, RawFile, data_folder, unpacked

MIRRORS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
"""Source -> the address that its file names are appended to. The MD5 sums of `RAW_FILES` guard plain http."""

_TIMEOUT = 30.0  # seconds without an answer; a slow download that keeps coming is not cut off
_CHUNK = 1 << 18

Progress = Callable[[str, int, int | None], None]
"""Called with (path under the data root, bytes so far, bytes in all where the server says so)."""


@dataclass(frozen=True)
class FileStatus:
    """One raw file: its path under the data root, whether it is there, its size, and what its content is.

    content: `official` (the published MD5), `unknown` (unpacks to something else), `damaged` (does not unpack) or
    `missing`.
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
    """Download the raw files that are not there, or whose content is not the official one; return their state.

    A file is put in place only when its unpacked content has the published MD5, and then at once.

    Raises:
        UserError: no network, no such file on the mirror, wrong content, or a folder that cannot be written.
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
        content: Literal["official", "unknown"] = "official" if _unpacked_md5(path, file) == file.md5 else "unknown"
    except (OSError, EOFError, zlib.error, UserError):
        return FileStatus(source, file.path, True, path.stat().st_size, "damaged")
    return FileStatus(source, file.path, True, path.stat().st_size, content)


def _unpacked_md5(path: Path, file: RawFile) -> str:
    return hashlib.md5(unpacked(path, file.shape), usedforsecurity=False).hexdigest()


def _download(url: str, file: RawFile, path: Path, progress: Progress | None) -> None:
    try:
        with replacing(path) as target:
            _receive(url, target, file.path, progress)
            target.flush()
            try:
                md5 = _unpacked_md5(Path(target.name), file)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"what {url} sent cannot be unpacked: {error}") from error
            if md5 != file.md5:
                raise UserError(f"what {url} sent has MD5 {md5} unpacked, not {file.md5}: it is not the published file")
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error}") from error


def _receive(url: str, target: IO[bytes], name: str, progress: Progress | None) -> None:
    try:
        with urlopen(url, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            total, received = int(length) if length and length.isdecimal() else None, 0
            while chunk := answer.read(_CHUNK):
                target.write(chunk)
                received += len(chunk)
                if received > PACKED_LIMIT:
                    raise UserError(f"cannot download {url}: it sends more than {PACKED_LIMIT:,} bytes")
                if progress is not None:
                    progress(name, received, total)
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise UserError(
            f"cannot download {url}: {error}; without a network, copy the files into a folder and name it with "
            "data.root or ML2O_DATA"
        ) from error
    if total is not None and received != total:
        raise UserError(f"cannot download {url}: the connection ended after {received} of {total} bytes")
