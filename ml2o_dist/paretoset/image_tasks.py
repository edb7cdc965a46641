"""Sets of image tasks by name: two or three overlapping digits or articles, and eight separate tasks.

| name | tasks | images |
|---|---|---|
| multimnist, multifashion, multifashionmnist, multidigits | the first and the second image | problems/images.py |
| multimnist3 | top left, top right and bottom digit | three MNIST digits on 36x36 pixels |
| eight | eight classifications with images of their own, see `EIGHT` | MNIST and Fashion-MNIST, 28x28 |
| eightdigits | the same on scikit-learn's digits, in both places | 8x8, needs no download |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ml2o_dist.paretoset.task_names import task_sets
from ml2o_dist.paretoset.tasks import SPLITS, Group, TaskSet
from ml2o_dist.problems.image_names import IMAGE_SETS
from ml2o_dist.problems.image_sets import image_classes, image_side, image_tasks, load_images
from ml2o_dist.problems.images import CLASSES, DATA_SETS, image_pool, mean_and_deviation
from ml2o_dist.problems.pairs import ImagePool
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.seeding import derive_seed

GENERATOR = "ml2o-tasks-1"
"""The version of the image generation; any change to the images needs a new one."""

TRIPLE_CANVAS = 36
TRIPLE_OFFSETS = (((0, 2), (0, 2)), ((0, 2), (6, 8)), ((6, 8), (3, 5)))
"""Ranges of the digits' corners, y and x, inclusive: the three digits overlap in the middle of the canvas."""


@dataclass(frozen=True)
class SingleTask:
    """One of the eight tasks: predict `label` for images of `source` in the classes `keep`, turned or not."""

    name: str
    source: str
    keep: tuple[int, ...]
    classes: int
    label: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]  # of (class, quarter turns)
    turns: int = 1  # how many quarter turns there are to draw from; the first is none


_ALL = tuple(range(CLASSES))
EIGHT = (
    SingleTask("low digits", "MNIST", (0, 1, 2, 3, 4), 5, lambda c, k: c),
    SingleTask("high digits", "MNIST", (5, 6, 7, 8, 9), 5, lambda c, k: c - 5),
    SingleTask("parity", "MNIST", _ALL, 2, lambda c, k: c % 2),
    SingleTask("turned digits", "MNIST", (1, 2, 3, 4, 5, 7), 4, lambda c, k: k, turns=4),  # these look turned
    SingleTask("first articles", "FashionMNIST", (0, 1, 2, 3, 4), 5, lambda c, k: c),
    SingleTask("last articles", "FashionMNIST", (5, 6, 7, 8, 9), 5, lambda c, k: c - 5),
    SingleTask("kind of article", "FashionMNIST", _ALL, 3, lambda c, k: np.array([0, 0, 0, 0, 0, 1, 0, 1, 2, 1])[c]),
    SingleTask("turned articles", "FashionMNIST", _ALL, 4, lambda c, k: k, turns=4),
)
"""Class subsets, parity, how an image is turned (by quarters), and clothes, shoes or bags."""


def load_tasks(name: str, data_root: str = "") -> TaskSet:
    """Build the task set `name`; `data_root` is as in `load_images`.

    Raises:
        UserError: an unknown name, or missing or damaged data.
    """
    if name in DATA_SETS or name in IMAGE_SETS:
        return _images(name, data_root)
    if name == "multimnist3":
        return _triples(data_root)
    if name in ("eight", "eightdigits"):
        return _separate(data_root, "" if name == "eight" else "digits")
    raise unknown("task set", name, task_sets())


def _images(name: str, data_root: str) -> TaskSet:
    loaded = {split: load_images(name, split, 0, data_root) for split in SPLITS}
    count = 2 if name in DATA_SETS else image_tasks(name)
    tasks = tuple(range(count))
    splits = {split: (Group(tasks, each.images, each.labels[:, :count]),) for split, each in loaded.items()}
    train = loaded["train"]
    names = ("top left", "bottom right") if name in DATA_SETS else tuple(f"task {i + 1}" for i in tasks)
    hashes = {f"{name} {split}": each.sha256 for split, each in loaded.items()}
    side = image_side(name)
    return TaskSet(names, (image_classes(name),) * count, side, splits, (train.mean,), (train.deviation,), hashes)


def _triples(data_root: str) -> TaskSet:
    splits = {split: (_triple_group(image_pool("MNIST", split, data_root), split),) for split in SPLITS}
    names = ("top left", "top right", "bottom")
    return _task_set("multimnist3", names, (CLASSES,) * 3, TRIPLE_CANVAS, splits)


def _triple_group(pool: ImagePool, split: str) -> Group:
    """Combine every image of the pool with two images of other classes on a canvas by the pixelwise maximum."""
    draws = np.random.RandomState(derive_seed(GENERATOR, "multimnist3", split) % 2**32)
    first = pool.rows
    partners = np.stack([first, draws.permutation(first), draws.permutation(first)], axis=1)
    labels = pool.labels[partners]
    alike = (labels[:, 0] == labels[:, 1]) | (labels[:, 0] == labels[:, 2]) | (labels[:, 1] == labels[:, 2])
    partners, labels = partners[~alike], labels[~alike]
    canvas = np.zeros((len(partners), TRIPLE_CANVAS, TRIPLE_CANVAS), dtype=np.uint8)
    size = pool.images.shape[1]
    for place, (rows, columns) in enumerate(TRIPLE_OFFSETS):
        ys = draws.randint(rows[0], rows[1] + 1, len(partners))
        xs = draws.randint(columns[0], columns[1] + 1, len(partners))
        for y in range(rows[0], rows[1] + 1):
            for x in range(columns[0], columns[1] + 1):
                here = (ys == y) & (xs == x)
                window = canvas[here, y : y + size, x : x + size]
                canvas[here, y : y + size, x : x + size] = np.maximum(window, pool.images[partners[here, place]])
    return Group((0, 1, 2), torch.from_numpy(canvas), torch.from_numpy(labels))


def _separate(data_root: str, only: str) -> TaskSet:
    pools = {
        (source, split): image_pool(only or source, split, data_root)
        for source in ("MNIST", "FashionMNIST")
        for split in SPLITS
    }
    splits = {
        split: tuple(_single_group(t, task, pools[task.source, split], split) for t, task in enumerate(EIGHT))
        for split in SPLITS
    }
    names, classes = tuple(task.name for task in EIGHT), tuple(task.classes for task in EIGHT)
    side = pools["MNIST", "train"].images.shape[1]
    return _task_set("eightdigits" if only else "eight", names, classes, side, splits)


def _single_group(t: int, task: SingleTask, pool: ImagePool, split: str) -> Group:
    draws = np.random.RandomState(derive_seed(GENERATOR, task.name, split) % 2**32)
    rows = pool.rows[np.isin(pool.labels[pool.rows], task.keep)]
    turns = draws.randint(0, task.turns, len(rows))
    images = pool.images[rows].copy()
    for k in range(1, task.turns):
        images[turns == k] = np.rot90(images[turns == k], k, axes=(1, 2))
    labels = task.label(pool.labels[rows], turns.astype(np.int64)).astype(np.int64)
    return Group((t,), torch.from_numpy(images), torch.from_numpy(labels).unsqueeze(1))


def _task_set(
    name: str, names: tuple[str, ...], classes: tuple[int, ...], side: int, splits: Mapping[str, tuple[Group, ...]]
) -> TaskSet:
    for group in splits["train"]:
        if not len(group.images):
            raise UserError(f"task set {name!r} has no training images for tasks {group.tasks}")
    moments = [mean_and_deviation(group.images.numpy()) for group in splits["train"]]
    hashes = {f"{name} {split}": _sha256(groups) for split, groups in splits.items()}
    means, deviations = (tuple(column) for column in zip(*moments, strict=True))
    return TaskSet(names, classes, side, splits, means, deviations, hashes)


def _sha256(groups: tuple[Group, ...]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        for tensor in (group.images, group.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
