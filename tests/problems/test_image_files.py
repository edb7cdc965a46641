"""Raw image files: where they are looked for, and what is said of a missing or damaged one."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ml2o_dist.problems.image_files import data_folder, file_sha256, read_idx, require_files
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import cache_folder


def idx(array: np.ndarray, magic: int = 8, count: int | None = None) -> bytes:
    sizes = (array.shape[0] if count is None else count, *array.shape[1:])
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, magic, array.ndim, *sizes) + array.tobytes()


@pytest.fixture
def array() -> np.ndarray:
    return np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_an_idx_file_is_read(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(path, (2, 3, 4)), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: b"no gzip", "cannot be unpacked"),
        (lambda a: gzip.compress(idx(a))[:-12], "cannot be unpacked"),
        (lambda a: gzip.compress(idx(a))[:12] + b"\xff" * 20, "cannot be unpacked"),
        (lambda a: gzip.compress(idx(a, magic=9)), "does not begin like"),
        (lambda a: gzip.compress(b""), "does not begin like"),
        (lambda a: gzip.compress(idx(a, count=3)), r"shape \(3, 3, 4\), not \(2, 3, 4\)"),
        (lambda a: gzip.compress(idx(a)[:-1]), "holds 23 values, not 24"),
        (lambda a: gzip.compress(idx(a)[:6]), "does not begin like"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, array: np.ndarray, damage: object, message: str) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(damage(array))  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        read_idx(path, (2, 3, 4))
    assert str(path) in str(caught.value)


def test_the_argument_wins_over_the_environment_and_that_over_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ML2O_DATA", str(tmp_path / "environment"))
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "cache"))
    assert data_folder(str(tmp_path / "argument")) == tmp_path / "argument"
    assert data_folder() == tmp_path / "environment"
    monkeypatch.delenv("ML2O_DATA")
    assert data_folder() == tmp_path / "cache" / "data"
    monkeypatch.delenv("ML2O_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "ml2o_dist"


def test_the_first_missing_file_is_named_with_the_ways_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is missing") as caught:
        require_files(("MNIST",), str(tmp_path))
    for cure in ("ml2o data fetch", "data.root", "ML2O_DATA"):
        assert cure in str(caught.value)


def test_a_changed_file_has_another_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = file_sha256(path)
    path.write_bytes(b"other")
    assert file_sha256(path) != before
    with pytest.raises(UserError, match="cannot be read"):
        file_sha256(tmp_path / "absent")


def test_a_packed_file_that_unpacks_to_gigabytes_is_read_as_far_as_its_array(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(array) + bytes(200_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="holds 25 values, not 24"):
            read_idx(path, (2, 3, 4))
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"not a regular file|too long"):
            read_idx(path, (2, 3, 4))
        with pytest.raises(UserError, match="cannot be read"):
            file_sha256(path)
