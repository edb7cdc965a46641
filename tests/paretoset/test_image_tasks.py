"""The task sets: every image and label traced back to the raw images of its split."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ml2o_dist.paretoset.image_tasks import EIGHT, load_tasks
from ml2o_dist.paretoset.task_names import task_sets
from ml2o_dist.paretoset.tasks import SPLITS, Group, TaskSet
from ml2o_dist.problems.images import image_pool, load_pairs
from ml2o_dist.runtime.errors import MissingData, UserError

# These hold on every machine; a change means that the construction changed, and wants a new GENERATOR.
SHA256 = {
    "multidigits train": "96d0695c",
    "eightdigits train": "64193764",
    "eightdigits validation": "a97d46ae",
    "eightdigits test": "ed4c9750",
    "multimnist3 train": "b2ce243f",
    "multimnist3 validation": "862178e7",
    "multimnist3 test": "3c8b3fb9",
    "eight train": "c846048c",
    "eight validation": "8122b14d",
    "eight test": "347f6815",
}
CLASSES = (5, 5, 2, 4, 5, 5, 3, 4)
CLOTHES, SHOES, BAGS = {0, 1, 2, 3, 4, 6}, {5, 7, 9}, {8}  # Fashion-MNIST's own numbers


def label_by_hand(t: int, digit: int, turns: int) -> int:
    """Say what task t of the eight asks of an image of class `digit` that was turned by `turns` quarters."""
    if t in (0, 1, 4, 5):
        return digit if digit < 5 else digit - 5
    if t == 2:
        return int(digit in (1, 3, 5, 7, 9))
    if t == 6:
        return next(i for i, kind in enumerate((CLOTHES, SHOES, BAGS)) if digit in kind)
    return turns


@cache
def classes_of(source: str, split: str, root: str) -> dict[bytes, set[int]]:
    """Return the classes of every image of the split, by its bytes."""
    pool = image_pool(source, split, root)
    found: dict[bytes, set[int]] = {}
    for row in pool.rows:
        found.setdefault(pool.images[row].tobytes(), set()).add(int(pool.labels[row]))
    return found


def assert_traced(t: int, group: Group, split: str, source: str, root: str, samples: int) -> None:
    """Assert that images of the split's own, turned back, give the labels."""
    known = classes_of(source, split, root)
    assert group.tasks == (t,)
    for i in range(0, len(group.images), max(1, len(group.images) // samples)):
        image, label = group.images[i].numpy(), int(group.labels[i, 0])
        turns = label if t in (3, 7) else 0
        classes = known[np.ascontiguousarray(np.rot90(image, -turns)).tobytes()]
        assert classes & set(EIGHT[t].keep)
        assert label in {label_by_hand(t, digit, turns) for digit in classes & set(EIGHT[t].keep)}


def assert_well_formed(tasks: TaskSet, side: int) -> None:
    assert tasks.count == len(tasks.names) == len(tasks.classes)
    assert tasks.side == side
    assert set(tasks.splits) == set(SPLITS)
    for split in SPLITS:
        assert [t for group in tasks.splits[split] for t in group.tasks] == list(range(tasks.count))
        for group in tasks.splits[split]:
            assert group.images.dtype == torch.uint8
            assert group.images.shape[1:] == (side, side)
            assert group.labels.dtype == torch.int64
            assert group.labels.shape == (len(group.images), len(group.tasks))
            for column, t in enumerate(group.tasks):
                assert group.labels[:, column].unique().tolist() == list(range(tasks.classes[t]))
    for group, mean, deviation in zip(tasks.splits["train"], tasks.mean, tasks.deviation, strict=True):
        pixels = group.images[:20_000].double()
        assert float(pixels.mean()) == pytest.approx(mean, rel=0.02)
        assert float(pixels.std()) == pytest.approx(deviation, rel=0.02)
    for name, digest in tasks.sha256.items():
        assert digest.startswith(SHA256.get(name, "")), name


@pytest.mark.parametrize("source", ["digits", "MNIST", "FashionMNIST"])
def test_the_splits_share_no_image_of_a_source(source: str, request: pytest.FixtureRequest) -> None:
    root = "" if source == "digits" else request.getfixturevalue("real_data_root")
    rows = {split: set(image_pool(source, split, root).rows.tolist()) for split in SPLITS}
    assert not rows["train"] & rows["validation"]
    if source == "digits":  # the others' test images are of a file of their own
        assert not rows["test"] & (rows["train"] | rows["validation"])


def test_two_digits_are_the_pairs_of_the_problems() -> None:
    tasks = load_tasks("multidigits")
    assert_well_formed(tasks, side=12)
    assert tasks.classes == (10, 10)
    for split in SPLITS:
        pairs, (group,) = load_pairs("multidigits", split), tasks.splits[split]
        assert torch.equal(group.images, pairs.images)
        assert torch.equal(group.labels, pairs.labels)


def test_eight_tasks_of_the_digits() -> None:
    tasks = load_tasks("eightdigits")
    assert_well_formed(tasks, side=8)
    assert tasks.classes == CLASSES
    for split in SPLITS:
        for t, group in enumerate(tasks.splits[split]):
            assert_traced(t, group, split, "digits", "", samples=10_000)
    counts = torch.bincount(tasks.splits["train"][7].labels[:, 0], minlength=4) / len(tasks.splits["train"][7].labels)
    assert (counts - 0.25).abs().max() < 0.05  # each turn is as frequent as the others


def test_eight_tasks_of_both_sources(real_data_root: str) -> None:
    tasks = load_tasks("eight", real_data_root)
    assert_well_formed(tasks, side=28)
    assert tasks.classes == CLASSES
    for split in ("validation", "test"):
        for t, group in enumerate(tasks.splits[split]):
            assert_traced(t, group, split, "MNIST" if t < 4 else "FashionMNIST", real_data_root, samples=400)


def whole(digit: NDArray[np.uint8], y: int, x: int) -> NDArray[np.uint8]:
    canvas = np.zeros((36, 36), np.uint8)
    canvas[y : y + 28, x : x + 28] = digit
    return canvas


def test_three_digits_lie_where_they_should(real_data_root: str) -> None:
    tasks = load_tasks("multimnist3", real_data_root)
    assert_well_formed(tasks, side=36)
    assert tasks.classes == (10, 10, 10)
    for split in SPLITS:
        labels = tasks.splits[split][0].labels
        assert all((labels[:, a] != labels[:, b]).all() for a, b in itertools.combinations(range(3), 2))
    pool, (group,) = image_pool("MNIST", "validation", real_data_root), tasks.splits["validation"]
    digits, classes = pool.images[pool.rows], pool.labels[pool.rows]
    places = [((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (6, 7, 8)), ((6, 7, 8), (3, 4, 5))]
    for i in (0, 7, len(group.images) - 1):
        canvas, fitting = group.images[i].numpy(), []
        for place, label in zip(places, group.labels[i].tolist(), strict=True):
            fits = []
            for y, x in itertools.product(*place):
                below = (digits <= canvas[y : y + 28, x : x + 28]).all(axis=(1, 2)) & (classes == label)
                fits += [whole(digit, y, x) for digit in digits[below]]
            fitting.append(fits)
        assert all(fitting)
        # thin digits fit by chance: some choice must make up the whole canvas
        assert any(np.array_equal(np.maximum.reduce(three), canvas) for three in itertools.product(*fitting))


def test_loading_again_gives_the_same() -> None:
    one, other = load_tasks("eightdigits"), load_tasks("eightdigits")
    assert one.sha256 == other.sha256
    assert (one.mean, one.deviation) == (other.mean, other.deviation)


def test_an_unknown_name_and_missing_data_are_told(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown task set 'eigth'.*'eight'"):
        load_tasks("eigth")
    monkeypatch.delenv("ML2O_DATA", raising=False)
    for name in task_sets():
        if "digits" not in name:
            with pytest.raises(MissingData):
                load_tasks(name, str(tmp_path))
