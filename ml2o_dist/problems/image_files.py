"""The raw image files: where they lie, what they are called, and how an IDX file is read.

Layout under a data root, as torchvision lays it out: `MNIST/raw/*.gz`, `FashionMNIST/raw/*.gz`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from ml2o_dist.runtime.errors import MissingData, UserError
from ml2o_dist.runtime.files import cache_folder, expanded, home_folder
from ml2o_dist.runtime.reading import MIB, read_bytes

PACKED_LIMIT = 64 * MIB
"""Most bytes of a packed file: the largest has 26 million."""


@dataclass(frozen=True)
class RawFile:
    """One raw file: its path under the data root, the sha256 of its unpacked content, and its array's shape."""

    path: str
    sha256: str
    shape: tuple[int, ...]

    @property
    def unpacked(self) -> int:
        """The bytes of its unpacked content: the header of an IDX file and a byte for each value."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


def _raw_files(folder: str, sha256: tuple[str, str, str, str]) -> dict[str, tuple[RawFile, RawFile]]:
    raw = f"{folder}/raw"
    return {
        "train": (
            RawFile(f"{raw}/train-images-idx3-ubyte.gz", sha256[0], (60_000, 28, 28)),
            RawFile(f"{raw}/train-labels-idx1-ubyte.gz", sha256[1], (60_000,)),
        ),
        "test": (
            RawFile(f"{raw}/t10k-images-idx3-ubyte.gz", sha256[2], (10_000, 28, 28)),
            RawFile(f"{raw}/t10k-labels-idx1-ubyte.gz", sha256[3], (10_000,)),
        ),
    }


# Sums of the files whose unpacked content has the MD5 that is published for the original data. They are of the unpacked
# content, because the same content is in circulation packed in more than one way.
RAW_FILES: dict[str, dict[str, tuple[RawFile, RawFile]]] = {
    "MNIST": _raw_files(
        "MNIST",
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "FashionMNIST": _raw_files(
        "FashionMNIST",
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}
"""Source -> official split -> (images, labels)."""


def data_folder(data_root: str = "") -> Path:
    """Return the folder of the raw image data: `data_root`, else ML2O_DATA, else where `ml2o data fetch` puts it.

    The last is `data/` in the cache folder, and it is used only when no root was given at all. Relative paths are
    resolved against ML2O_HOME.
    """
    given = data_root or os.environ.get("ML2O_DATA", "")
    return home_folder() / expanded(given) if given else cache_folder() / "data"


def require_files(sources: tuple[str, ...], data_root: str) -> Path:
    """Return the data folder after a check that it holds every file of `sources`, train and test.

    Raises:
        MissingData: a file is missing; the first one is named, with the ways to get it.
    """
    root = data_folder(data_root)
    for source in sources:
        for pair in RAW_FILES[source].values():
            for file in pair:
                if not (root / file.path).is_file():
                    raise MissingData(
                        f"image data file {root / file.path} is missing: download it with `ml2o data fetch`, "
                        "or name the folder that holds it with data.root or ML2O_DATA"
                    )
    return root


def file_sha256(path: Path) -> str:
    """Return the sha256 of the file at `path`, remembered for as long as its size and time of change stay.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        stat = path.stat()
        if S_ISREG(stat.st_mode) and stat.st_size <= PACKED_LIMIT:
            return _sha256(str(path), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError) as error:
        raise UserError(f"image data file {path} cannot be read: {error}") from error
    raise UserError(f"image data file {path} cannot be read: it is no regular file, or larger than any of them")


@lru_cache(maxsize=64)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read the gzipped IDX file of unsigned bytes at `path`, which must hold an array of `shape`.

    Raises:
        UserError: the file cannot be read or unpacked, or is not such an array; it is named.
    """
    try:
        content = unpacked(path, shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, FileNotFoundError) as error:
        raise UserError(f"image data file {path} cannot be unpacked: {error}") from error
    return parse_idx(content, shape, str(path))


def unpacked(path: Path, shape: tuple[int, ...]) -> bytes:
    """Return the content of the gzipped IDX file at `path`, at most one byte more than an array of `shape` needs.

    Raises:
        FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile: it is missing, cut or damaged.
        UserError: it is no regular file, too large, or cannot be read.
    """
    packed = read_bytes(path, "image data file", PACKED_LIMIT)
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        return stream.read(4 + 4 * len(shape) + math.prod(shape) + 1)


def parse_idx(content: bytes, shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Read an IDX array of unsigned bytes from its unpacked `content`; `name` is what an error calls it.

    Format: bytes 0, 0, type (8 = unsigned byte), number of dimensions; each dimension as a big-endian 32-bit
    integer; then the values, last index fastest.
    """
    header = 4 + 4 * len(shape)
    if len(content) < header or content[:4] != bytes((0, 0, 8, len(shape))):
        raise UserError(f"image data file {name} does not begin like an IDX file of {len(shape)}-d unsigned bytes")
    found = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    if found != shape:
        raise UserError(f"image data file {name} holds an array of shape {found}, not {shape}")
    expected = int(np.prod(shape))
    if len(content) - header != expected:
        raise UserError(f"image data file {name} holds {len(content) - header} values, not {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_source(source: str, split: str, root: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (images [N, 28, 28], labels [N]) of `source` in its official `split`, "train" or "test".

    Raises:
        UserError: a file is missing, damaged, or has a label above 9.
    """
    images, labels = RAW_FILES[source][split]
    read = read_idx(root / images.path, images.shape), read_idx(root / labels.path, labels.shape)
    if read[1].max() > 9:
        raise UserError(f"image data file {root / labels.path} has the label {read[1].max()}, above 9")
    return read
