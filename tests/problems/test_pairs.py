"""The construction of pairs, checked pair by pair against a slow second writing of the same rule."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ml2o_dist.problems.pairs import ImagePool, PairLayout, average_pool, build_pairs, cut_rows

LAYOUT = PairLayout(canvas=9, first=(0, 2), second=(2, 4), partners=3)


def compose(
    first: NDArray[np.uint8], second: NDArray[np.uint8], offsets: NDArray[np.uint8], canvas: int
) -> NDArray[np.uint8]:
    """Lay one image over another on a black canvas, pixel by pixel."""
    result = np.zeros((canvas, canvas), dtype=np.uint8)
    for image, (top, left) in ((first, offsets[:2]), (second, offsets[2:])):
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                result[top + y, left + x] = max(result[top + y, left + x], image[y, x])
    return result


@pytest.fixture
def pool() -> ImagePool:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, size=(200, 5, 5), dtype=np.uint8)
    return ImagePool(images, draws.integers(0, 4, size=200), np.arange(20, 180))


def test_every_canvas_is_its_two_images_at_their_offsets(pool: ImagePool) -> None:
    pairs = build_pairs(pool, pool, LAYOUT, 9, seed=1)
    for image, sources, offsets in zip(pairs.images[::17], pairs.sources[::17], pairs.offsets[::17], strict=True):
        expected = compose(pool.images[sources[0]], pool.images[sources[1]], offsets, 9)
        assert np.array_equal(image.reshape(9, 9), expected)


def test_partners_are_of_another_class_distinct_and_in_the_pool(pool: ImagePool) -> None:
    pairs = build_pairs(pool, pool, LAYOUT, 9, seed=1)
    assert np.array_equal(pairs.sources[:, 0], np.repeat(pool.rows, 3))
    assert np.array_equal(pairs.labels, pool.labels[pairs.sources])
    assert (pairs.labels[:, 0] != pairs.labels[:, 1]).all()
    assert set(pairs.sources[:, 1]) <= set(pool.rows)
    partners = pairs.sources[:, 1].reshape(-1, 3)
    assert all(len(set(row)) == 3 for row in partners)


def test_offsets_take_every_value_of_their_range_and_no_other(pool: ImagePool) -> None:
    offsets = build_pairs(pool, pool, LAYOUT, 9, seed=1).offsets
    assert [set(column) for column in offsets.T] == [{0, 1, 2}, {0, 1, 2}, {2, 3, 4}, {2, 3, 4}]


def test_partners_are_uniform_over_the_other_classes() -> None:
    labels = np.repeat([0, 1, 2], [1, 4, 5])
    pool = ImagePool(np.zeros((10, 5, 5), np.uint8), labels, np.arange(10))
    one = PairLayout(canvas=9, first=(0, 2), second=(2, 4), partners=1)
    seen = np.zeros(10)
    for seed in range(900):
        sources = build_pairs(pool, pool, one, 1, seed).sources
        seen[sources[1, 1]] += 1  # the base image 1 is of class 1: images 0 and 5..9 are left
    assert (seen[1:5] == 0).all()
    expected = 900 / 6
    assert (np.abs(seen[[0, 5, 6, 7, 8, 9]] - expected) < 5 * np.sqrt(expected)).all()


def test_the_same_seed_gives_the_same_pairs(pool: ImagePool) -> None:
    one, same, other = (build_pairs(pool, pool, LAYOUT, 9, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.images, same.images)
    assert np.array_equal(one.sources, same.sources)
    assert not np.array_equal(one.sources, other.sources)


@pytest.mark.parametrize("size", [18, 12, 9, 4, 1])
def test_pooling_is_the_rounded_mean_of_squares(size: int) -> None:
    canvas = np.random.default_rng(1).integers(0, 256, size=(4, 36, 36), dtype=np.uint8)
    step = 36 // size
    mean = canvas.reshape(4, size, step, size, step).mean(axis=(2, 4))
    pooled = average_pool(canvas, size)
    assert pooled.dtype == np.uint8
    assert np.abs(pooled - mean).max() <= 0.5


def test_parts_are_a_partition_and_depend_on_the_source() -> None:
    sizes = {"train": 70, "validation": 30}
    parts = cut_rows("MNIST", 100, sizes)
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert sorted(np.concatenate(list(parts.values()))) == list(range(100))
    assert not np.array_equal(parts["train"], cut_rows("FashionMNIST", 100, sizes)["train"])
    with pytest.raises(ValueError, match="do not add up"):
        cut_rows("MNIST", 101, sizes)
