"""The two-image data sets: MultiMNIST, MultiFashion, Multi-Fashion+MNIST and MultiDigits, built once and cached.

| name | first image (top left, task 1) | second image (task 2) | canvas | train / validation / test pairs |
|---|---|---|---|---|
| multimnist | MNIST | MNIST | 36 | 110,000 / 10,000 / 20,000 |
| multifashion | Fashion-MNIST | Fashion-MNIST | 36 | 110,000 / 10,000 / 20,000 |
| multifashionmnist | Fashion-MNIST | MNIST | 36 | 110,000 / 10,000 / 20,000 |
| multidigits | scikit-learn's 8x8 digits | the same | 12 | 11,970 / 2,000 / 4,000 |

The offsets are uniform in {0..4}^2 and {4..8}^2 (multidigits: {0,1}^2 and {3,4}^2), each base image has 2 partners
(multidigits: 10), and the two class indices of a pair differ. For Fashion+MNIST, whose two label sets have nothing
in common, the rule of different indices is kept all the same: one rule for all, and each task stays as hard.

The splits share no image. Test pairs come from the official test images; 5,000 of the 60,000 training images, drawn
once for each source, make the validation pairs among themselves, the other 55,000 the training pairs. The digits
have no official split: 1,197 / 200 / 400 images, drawn likewise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ml2o_dist.problems.image_files import RAW_FILES, file_sha256, read_source, require_files
from ml2o_dist.problems.pairs import GENERATOR, ImagePool, PairLayout, PairRecords, build_pairs, cut_rows
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.files import cache_folder, replacing
from ml2o_dist.runtime.seeding import derive_seed

SPLITS = ("train", "validation", "test")
CLASSES = 10
DIGITS = "digits"
_DIGIT_ROWS = {"train": 1197, "validation": 200, "test": 400}  # of 1,797: 2/3, and a test set worth averaging over
_TRAIN_ROWS = {"train": 55_000, "validation": 5_000}

_LARGE = PairLayout(canvas=36, first=(0, 4), second=(4, 8), partners=2)
# The same picture at 8/28 of the scale: the second image again ends at the far edge, and the two overlap.
_SMALL = PairLayout(canvas=12, first=(0, 1), second=(3, 4), partners=10)


@dataclass(frozen=True)
class PairData:
    """A data set by name: the sources of the first and the second image, and the layout of the pair."""

    first: str
    second: str
    layout: PairLayout


DATA_SETS = {
    "multimnist": PairData("MNIST", "MNIST", _LARGE),
    "multifashion": PairData("FashionMNIST", "FashionMNIST", _LARGE),
    "multifashionmnist": PairData("FashionMNIST", "MNIST", _LARGE),
    "multidigits": PairData(DIGITS, DIGITS, _SMALL),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """N pairs of one split, mapped from the cache file: they must not be written to.

    Attributes:
        images: uint8 [N, H, W].  labels: int64 [N, 2], top left first.
        sources: int32 [N, 2], row of each image in its raw file.  offsets: uint8 [N, 4], (y, x) of each image.
        sha256: of all four.
        mean, deviation: of all pixels, grey levels 0..255.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor
    offsets: Tensor
    sha256: str
    mean: float
    deviation: float


def image_side(name: str, size: int = 0) -> int:
    """Return the side of the images of data set `name` after pooling to `size` (0: the full canvas).

    Raises:
        UserError: an unknown name, or a size that does not divide the canvas.
    """
    if name not in DATA_SETS:
        raise unknown("image data set", name, DATA_SETS)
    canvas = DATA_SETS[name].layout.canvas
    if size == 0:
        return canvas
    if size < 0 or canvas % size:
        sizes = [side for side in range(canvas, 3, -1) if canvas % side == 0]
        raise UserError(f"size {size} of {name} does not divide its canvas of {canvas}: use 0 (full) or one of {sizes}")
    return size


def load_pairs(name: str, split: str, size: int = 0, data_root: str = "") -> Pairs:
    """Return one split of data set `name`, pooled to `size`, from the cache, where it is built on first use.

    Args:
        name: one of `DATA_SETS`.
        split: "train", "validation" or "test".
        size: side after average pooling; 0 keeps the canvas.
        data_root: folder of the raw files; "" for ML2O_DATA, or else where `ml2o data fetch` puts them.

    Raises:
        UserError: unknown name, split or size, a missing or damaged raw file, or a cache that cannot be written.
    """
    side = image_side(name, size)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    root, identity = _source_identity(name, data_root)
    key = hashlib.sha256("\n".join((name, split, GENERATOR, str(side), identity)).encode()).hexdigest()[:16]
    path = cache_folder() / "pairs" / f"{name}-{split}-{side}-{GENERATOR}-{key}.arrow"
    return _cached(name, split, side, str(root), str(path))


def _source_identity(name: str, data_root: str) -> tuple[Path, str]:
    """Return the folder of the raw files and what identifies their content, cheap enough for every start."""
    data = DATA_SETS[name]
    if data.first == DIGITS:
        return Path(), f"scikit-learn {importlib.metadata.version('scikit-learn')}"
    sources = tuple(dict.fromkeys((data.first, data.second)))
    root = require_files(sources, data_root)
    files = [file for source in sources for pair in RAW_FILES[source].values() for file in pair]
    return root, " ".join(file_sha256(root / file.path) for file in files)


@lru_cache(maxsize=32)
def _cached(name: str, split: str, side: int, root: str, path: str) -> Pairs:
    """Return the pairs in the cache file `path`, built if it is absent or damaged; mapped once for each process."""
    file = Path(path)
    pairs = _read(file, side)
    if pairs is None:
        _write(file, _build(name, split, side, Path(root)), f"{name} {split} {side} {GENERATOR}")
        pairs = _read(file, side)
        if pairs is None:
            raise UserError(f"cache file {file} is damaged as soon as it is written: check the disk, or set ML2O_CACHE")
    return pairs


def image_pool(source: str, split: str, data_root: str = "") -> ImagePool:
    """Return the single images of `source` (MNIST, FashionMNIST, digits) that may be used in `split`.

    Raises:
        UserError: an unknown split, or a missing or damaged raw file; `data_root` is as in `load_pairs`.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return _pool(source, split, Path() if source == DIGITS else require_files((source,), data_root))


def _build(name: str, split: str, side: int, root: Path) -> PairRecords:
    data = DATA_SETS[name]
    first = _pool(data.first, split, root)
    second = first if data.second == data.first else _pool(data.second, split, root)
    return build_pairs(first, second, data.layout, side, derive_seed(GENERATOR, name, split))


def _pool(source: str, split: str, root: Path) -> ImagePool:
    if source == DIGITS:
        from sklearn.datasets import load_digits  # a second of import that only the first use pays

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the file has 17 grey levels
        labels = digits.target.astype(np.int64)
        return ImagePool(images, labels, cut_rows(DIGITS, len(labels), _DIGIT_ROWS)[split])
    raw, raw_labels = read_source(source, "test" if split == "test" else "train", root)
    rows = np.arange(len(raw)) if split == "test" else cut_rows(source, len(raw), _TRAIN_ROWS)[split]
    return ImagePool(raw, raw_labels.astype(np.int64), rows)


def arrays_sha256(arrays: Iterable[NDArray[np.generic]]) -> str:
    """Return the sha256 of arrays, their kinds and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _write(path: Path, pairs: PairRecords, title: str) -> None:
    """Write `pairs` as an Arrow IPC file of one record batch; the name appears only when the file is complete.

    Several processes may do so at once: each writes a file of its own, and all of them hold the same bytes.
    """
    arrays: dict[str, NDArray[np.generic]] = {
        "image": pairs.images,
        "label": pairs.labels,
        "source": pairs.sources,
        "offset": pairs.offsets,
    }
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(a.reshape(-1)), a.shape[1]) for a in arrays.values()]
    schema = pa.schema(
        [pa.field(key, column.type, nullable=False) for key, column in zip(arrays, columns, strict=True)],
        metadata={"title": title, "sha256": arrays_sha256(arrays.values())},
    )
    batch = pa.record_batch(columns, schema=schema)
    try:
        with replacing(path) as stream, pa.ipc.new_file(stream, schema) as writer:
            writer.write_batch(batch)
    except OSError as error:
        raise UserError(f"cannot write the cache file {path}: {error}; name another folder with ML2O_CACHE") from error


def _read(path: Path, side: int) -> Pairs | None:
    """Map the cache file `path`; None where it is absent, unreadable or not what its own sha256 says."""
    widths = {"image": (pa.uint8(), side * side), "label": (pa.int64(), 2), "source": (pa.int32(), 2)}
    kinds = {name: pa.list_(kind, width) for name, (kind, width) in (widths | {"offset": (pa.uint8(), 4)}).items()}
    try:
        if not path.is_file():  # a FIFO would wait for a writer
            return None
        with pa.memory_map(str(path)) as stream:
            table = pa.ipc.open_file(stream)
            if {field.name: field.type for field in table.schema} != kinds or table.num_record_batches != 1:
                return None
            batch, metadata = table.get_batch(0), table.schema.metadata or {}
        batch.validate(full=True)
        columns = [batch.column(key) for key in kinds]
        arrays = [column.flatten().to_numpy().reshape(batch.num_rows, -1) for column in columns]
        sha256 = metadata.get(b"sha256", b"").decode()
        labels_fit = len(arrays[1]) > 0 and 0 <= arrays[1].min() <= arrays[1].max() < CLASSES
        if arrays_sha256(arrays) != sha256 or not labels_fit:
            return None
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    # Through DLPack, because torch's from_numpy warns about every array it may not write to.
    images, labels, sources, offsets = (from_dlpack(column.flatten()) for column in columns)
    views = (images.view(-1, side, side), labels.view(-1, 2), sources.view(-1, 2), offsets.view(-1, 4))
    return Pairs(*views, sha256, *mean_and_deviation(arrays[0]))


def mean_and_deviation(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Return both over all pixels, from integer sums: the same on every machine."""
    first, second = images.sum(dtype=np.int64), np.square(images, dtype=np.uint16).sum(dtype=np.int64)
    mean = int(first) / images.size
    return mean, float(np.sqrt(int(second) / images.size - mean**2))
