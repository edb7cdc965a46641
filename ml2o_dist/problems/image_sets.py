"""Image data sets by name, each behind one problem: the package's pairs, and those of plug-ins."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml2o_dist.problems.base import Problem, ProblemContext
from ml2o_dist.problems.image_names import IMAGE_SETS
from ml2o_dist.problems.images import CLASSES, DATA_SETS, SPLITS, arrays_sha256, load_pairs, mean_and_deviation
from ml2o_dist.problems.images import image_side as pair_side
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.runtime.errors import UserError, unknown

Load = Callable[[str, str], tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""(split, data root) -> images uint8 [N, H, H] and labels [N, T]; splits are train, validation and test."""


@dataclass(frozen=True)
class ImageSet:
    """A data set that a plug-in brings: how it is loaded, H, the classes of every task, and T."""

    load: Load
    side: int
    classes: int
    tasks: int


@dataclass(frozen=True, eq=False)
class Images:
    """One split: uint8 images [N, H, H], a label of each task [N, T], and the moments of the pixels' grey levels."""

    images: Tensor
    labels: Tensor
    sha256: str
    mean: float
    deviation: float


def register_images(name: str, *, side: int, classes: int = 10, tasks: int = 2) -> Callable[[Load], Load]:
    """Register a function `(split, data_root) -> (images, labels)` as a data set and as a problem (a decorator).

    The problem `name` has the settings of `multidigits`: a network with one head for each task.

    Args:
        side: H; images are uint8 [N, H, H].
        classes: of every task.
        tasks: T, columns of the labels [N, T], each from 0 to classes - 1.
    """

    def register(load: Load) -> Load:
        IMAGE_SETS.register(name, load)(ImageSet(load, side, classes, tasks))
        about = " ".join((load.__doc__ or f"The image data set {name}.").split())
        register_problem(name, about, data=name)(_of(load))
        return load

    return register


def _of(load: Load) -> Any:
    """Return the factory of the problem, defined as if in the module of `load`."""
    from ml2o_dist.problems.multitask import build  # imported late: it imports this module

    @functools.wraps(build)
    def factory(context: ProblemContext, **settings: Any) -> Problem:
        return build(context, **settings)

    factory.__module__ = load.__module__
    return factory


def image_set_names() -> list[str]:
    """Return the names of all data sets, the package's first."""
    return [*DATA_SETS, *IMAGE_SETS]


def image_side(name: str, size: int = 0) -> int:
    """Return the side of the images of data set `name` after pooling to `size` (0: unchanged).

    Raises:
        UserError: an unknown name, or a size that does not divide the side.
    """
    if name in DATA_SETS:
        return pair_side(name, size)
    if name not in IMAGE_SETS:
        raise unknown("image data set", name, image_set_names(), extensible=True)
    side: int = IMAGE_SETS[name].side
    if size < 0 or (size and side % size):
        raise UserError(f"size {size} of {name} does not divide its side of {side}")
    return size or side


def image_classes(name: str) -> int:
    """Return how many classes every task of a data set has."""
    return CLASSES if name in DATA_SETS else int(IMAGE_SETS[name].classes)


def image_tasks(name: str) -> int:
    """Return how many tasks a data set has."""
    return 3 if name in DATA_SETS else int(IMAGE_SETS[name].tasks)


def load_images(name: str, split: str, size: int = 0, data_root: str = "") -> Images:
    """Return one split of a data set, pooled to `size`, with the labels of all its tasks.

    The third task of the package's pairs (ours) is the sum of both class indices modulo 10.

    Raises:
        UserError: as `load_pairs`; or a plug-in's data that do not match its declaration.
    """
    if name not in DATA_SETS:
        return _loaded(name, split, image_side(name, size), data_root)
    pairs = load_pairs(name, split, size, data_root)
    both = pairs.labels.sum(dim=-1, keepdim=True) % CLASSES
    labels = torch.cat([pairs.labels, both], dim=-1)
    return Images(pairs.images, labels, pairs.sha256, pairs.mean, pairs.deviation)


@lru_cache(maxsize=32)
def _loaded(name: str, split: str, side: int, data_root: str) -> Images:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    known: ImageSet = IMAGE_SETS[name]
    loaded = known.load(split, data_root)
    images, labels = np.asarray(loaded[0]), np.asarray(loaded[1])
    _check(name, split, known, images, labels)
    if side != known.side:
        images = _pooled(images, side)
    labels = labels.astype(np.int64)
    digest = arrays_sha256((images, labels))
    return Images(torch.from_numpy(images.copy()), torch.from_numpy(labels), digest, *mean_and_deviation(images))


def _check(name: str, split: str, known: ImageSet, images: NDArray[Any], labels: NDArray[Any]) -> None:
    def wrong(what: str) -> UserError:
        return UserError(f"image data set {name!r}, split {split}: {what}")

    shape = (len(images), known.side, known.side)
    if images.dtype != np.uint8 or images.shape != shape or not len(images):
        raise wrong(f"images must be uint8 [N, {known.side}, {known.side}], not {images.dtype} {list(images.shape)}")
    if labels.shape != (len(images), known.tasks) or labels.dtype.kind not in "iu":
        raise wrong(f"labels must be integers [{len(images)}, {known.tasks}], not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= known.classes:
        raise wrong(f"labels must lie in 0..{known.classes - 1}, not in {labels.min()}..{labels.max()}")


def _pooled(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Average over squares; halves are rounded up."""
    factor = images.shape[1] // side
    sums = images.reshape(len(images), side, factor, side, factor).sum(axis=(2, 4), dtype=np.int64)
    halves: NDArray[np.uint8] = ((2 * sums + factor**2) // (2 * factor**2)).astype(np.uint8)
    return halves
