"""The two-image data sets: what is in them, where it comes from, and a cache that cannot lie."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ml2o_dist.problems import images
from ml2o_dist.problems.images import DATA_SETS, SPLITS, load_pairs
from ml2o_dist.runtime.errors import UserError
from tests.problems.test_pairs import compose

REAL = ("multimnist", "multifashion", "multifashionmnist")
COUNTS = {"train": 110_000, "validation": 10_000, "test": 20_000}
# These hold on every machine; a change means that the construction changed, and wants a new GENERATOR.
DIGITS_SHA256 = "96d0695c"
MULTIMNIST_18_TEST_SHA256 = "2096dfa9"


@pytest.fixture
def fresh_cache(fresh_cache: None, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cache" / "pairs"
    images._cached.cache_clear()


def raw(root: str, source: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images and labels of a raw file without the package."""
    folder, prefix = Path(root) / source / "raw", "t10k" if split == "test" else "train"
    pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


@pytest.mark.parametrize("name", [REAL[0], *(pytest.param(name, marks=pytest.mark.long) for name in REAL[1:])])
def test_pairs_are_what_the_raw_files_say(name: str, real_data_root: str) -> None:
    data = DATA_SETS[name]
    for split in ("train", "test"):
        pairs = load_pairs(name, split, 0, real_data_root)
        assert pairs.images.shape == (COUNTS[split], 36, 36)
        sources, labels = [raw(real_data_root, source, split) for source in (data.first, data.second)], pairs.labels
        for i in (0, 1, 777, COUNTS[split] // 2, COUNTS[split] - 1):
            rows = pairs.sources[i].tolist()
            parts = [pixels[row] for (pixels, _), row in zip(sources, rows, strict=True)]
            assert np.array_equal(pairs.images[i].numpy(), compose(*parts, pairs.offsets[i].numpy(), 36))
        for column, (_, own) in enumerate(sources):
            assert np.array_equal(labels[:, column].numpy(), own[pairs.sources[:, column].numpy()])


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.long) for name in REAL[:-1]), REAL[-1]])
def test_splits_classes_and_offsets_keep_the_rule(name: str, real_data_root: str) -> None:
    parts = {split: load_pairs(name, split, 18, real_data_root) for split in SPLITS}
    for split, pairs in parts.items():
        assert len(pairs.images) == COUNTS[split]
        assert (pairs.labels[:, 0] != pairs.labels[:, 1]).all()
        assert pairs.labels.unique().tolist() == list(range(10))
        for column, values in enumerate(([0, 1, 2, 3, 4],) * 2 + ([4, 5, 6, 7, 8],) * 2):
            assert pairs.offsets[:, column].unique().tolist() == values
        assert (pairs.sources[:, 0].bincount()[pairs.sources[:, 0].unique()] == 2).all()
    assert len(parts["test"].sources[:, 0].unique()) == 10_000
    data = DATA_SETS[name]
    used = {
        (source, split): set(parts[split].sources[:, column].tolist())
        for column, source in enumerate((data.first, data.second))
        for split in ("train", "validation")
    }
    for source in (data.first, data.second):  # both are cut from the raw training file
        assert not used[source, "train"] & used[source, "validation"]


def test_pooled_images_are_the_rounded_means_of_full_ones(real_data_root: str) -> None:
    full = load_pairs("multimnist", "validation", 0, real_data_root).images.float()[:500]
    for size in (18, 12, 9):
        pooled = load_pairs("multimnist", "validation", size, real_data_root).images[:500]
        mean = torch.nn.functional.avg_pool2d(full, 36 // size)
        assert (pooled.float() - mean).abs().max() <= 0.5 + 1e-4


def test_multidigits_needs_no_files_and_shares_no_image_between_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ML2O_DATA", raising=False)
    parts = {split: load_pairs("multidigits", split) for split in SPLITS}
    assert {split: tuple(pairs.images.shape) for split, pairs in parts.items()} == {
        "train": (11_970, 12, 12),
        "validation": (2_000, 12, 12),
        "test": (4_000, 12, 12),
    }
    rows = [set(pairs.sources.flatten().tolist()) for pairs in parts.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797
    for pairs in parts.values():
        assert (pairs.labels[:, 0] != pairs.labels[:, 1]).all()
        assert pairs.images.dtype == torch.uint8
        assert pairs.labels.dtype == torch.int64
        assert pairs.images.max() == 255


def test_the_hashes_are_those_on_record(real_data_root: str) -> None:
    assert load_pairs("multimnist", "test", 18, real_data_root).sha256.startswith(MULTIMNIST_18_TEST_SHA256)


def test_the_hash_of_the_digits_is_that_on_record() -> None:
    assert load_pairs("multidigits", "train").sha256.startswith(DIGITS_SHA256)


def test_two_builds_are_equal_and_a_process_maps_a_file_once(fresh_cache: Path) -> None:
    first = load_pairs("multidigits", "train", 6)
    assert load_pairs("multidigits", "train", 6) is first
    shutil.rmtree(fresh_cache)
    images._cached.cache_clear()
    second = load_pairs("multidigits", "train", 6)
    assert second is not first
    assert second.sha256 == first.sha256
    assert torch.equal(second.images, first.images)  # the first is still mapped, though its file is gone


def test_name_split_and_size_have_files_of_their_own(fresh_cache: Path) -> None:
    pairs = [load_pairs("multidigits", split) for split in SPLITS] + [load_pairs("multidigits", "test", 6)]
    assert len({each.sha256 for each in pairs}) == len(list(fresh_cache.glob("*.arrow"))) == 4
    assert all("ml2o-pairs-1" in path.name for path in fresh_cache.iterdir())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "foreign"])
def test_a_damaged_cache_file_is_built_again(fresh_cache: Path, damage: str) -> None:
    intact = load_pairs("multidigits", "test")
    (path,) = fresh_cache.glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    changed = {"flipped": bytes(content), "truncated": bytes(content[:4000]), "empty": b"", "foreign": b"hello" * 99}
    images._cached.cache_clear()
    path.unlink()  # a new file, so that nothing mapped above changes under a reader
    path.write_bytes(changed[damage])
    again = load_pairs("multidigits", "test")
    assert again.sha256 == intact.sha256
    for column in ("images", "labels", "sources", "offsets"):
        assert torch.equal(getattr(again, column), getattr(intact, column)), column
    assert len(path.read_bytes()) == len(content)


def test_a_build_that_overtakes_another_does_no_harm(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, nested = images._build, []

    def overtaken(*arguments: object) -> object:
        if not nested:
            nested.append(None)
            nested[0] = load_pairs("multidigits", "test").sha256
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "_build", overtaken)
    assert load_pairs("multidigits", "test").sha256 == nested[0]
    assert len(list(fresh_cache.iterdir())) == 1


@pytest.mark.long
def test_processes_that_build_at_once_agree(fresh_cache: Path) -> None:
    code = "from ml2o_dist.problems.images import load_pairs; print(load_pairs('multidigits', 'train').sha256)"
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(answers) == {load_pairs("multidigits", "train").sha256}
    assert [path.name.startswith("multidigits-train") for path in fresh_cache.iterdir()] == [True]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ML2O_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write.*cache.*ML2O_CACHE"):
        load_pairs("multidigits", "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("multimnits", "train"), "did you mean 'multimnist'"),
        (("multidigits", "tset"), "did you mean 'test'"),
        (("multidigits", "train", 5), r"size 5 of multidigits.* 12.*\[12, 6, 4\]"),
        (("multidigits", "train", -6), "size -6"),
    ],
)
def test_wrong_words_are_named(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pairs(*arguments)


def test_a_root_without_the_files_is_an_error_and_no_other_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data_root: str
) -> None:
    monkeypatch.setenv("ML2O_DATA", real_data_root)
    with pytest.raises(UserError, match=f"{tmp_path}.*train-images-idx3-ubyte.gz.*missing"):
        load_pairs("multimnist", "test", 0, str(tmp_path))


def test_a_damaged_raw_file_is_named(fresh_cache: Path, tmp_path: Path, real_data_root: str) -> None:
    shutil.copytree(Path(real_data_root) / "MNIST", tmp_path / "MNIST")
    damaged = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{damaged} cannot be unpacked"):
        load_pairs("multimnist", "test", 18, str(tmp_path))
