"""Build MultiMNIST-style pairs, two images on one canvas, by pure functions over arrays.

Two small images are placed on one canvas, the first towards the top left, the second towards the bottom right, by the
pixelwise maximum. The published MultiMNIST files come from no published generator. This generator is named
`GENERATOR`; its output is a function of the images and the seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml2o_dist.runtime.seeding import derive_seed

GENERATOR = "ml2o-pairs-1"
"""The version of this construction; any change of its output needs a new one."""

_BLOCK = 8192  # pairs composed at a time: 10 MB of canvas, so that only the result takes memory


@dataclass(frozen=True)
class PairLayout:
    """The canvas [canvas, canvas], and the offsets, inclusive, along each axis of the first and the second image."""

    canvas: int
    first: tuple[int, int]
    second: tuple[int, int]
    partners: int


@dataclass(frozen=True)
class ImagePool:
    """Images to draw from: images [N, h, w] of the source, labels [N], and the rows that belong to the split."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class PairRecords:
    """N pairs: images [N, s*s], labels [N, 2], and where they come from.

    sources [N, 2]: rows of the first and the second image in their raw files.
    offsets [N, 4]: (y, x) of the first, (y, x) of the second.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sources: NDArray[np.int32]
    offsets: NDArray[np.uint8]


def build_pairs(first: ImagePool, second: ImagePool, layout: PairLayout, size: int, seed: int) -> PairRecords:
    """Pair every image of `first` with `layout.partners` different images of `second` whose class index differs.

    Each canvas is then averaged over squares down to [size, size], rounded half up. The draws come from numpy's
    RandomState, whose streams are frozen across versions, so that the result's hash is worth recording.
    """
    draws = np.random.RandomState(seed % 2**32)
    sources = _draw_partners(first, second, layout.partners, draws)
    offsets = _draw_offsets(len(sources), layout, draws)
    images = np.empty((len(sources), size * size), dtype=np.uint8)
    for start in range(0, len(sources), _BLOCK):
        block = slice(start, start + _BLOCK)
        canvas = _compose(first.images, second.images, sources[block], offsets[block], layout.canvas)
        images[block] = average_pool(canvas, size).reshape(len(canvas), -1)
    labels = np.stack([first.labels[sources[:, 0]], second.labels[sources[:, 1]]], axis=1)
    return PairRecords(images, labels, sources.astype(np.int32), offsets)


def cut_rows(source: str, count: int, sizes: dict[str, int]) -> dict[str, NDArray[np.int64]]:
    """Cut the rows 0..count-1 of `source` at random into named parts of the given sizes, each in ascending order.

    The draw depends on the names and counts alone: a part is the same in every data set that uses the source.
    """
    if sum(sizes.values()) != count:
        raise ValueError(f"parts {sizes} do not add up to {count}")
    order = np.random.RandomState(derive_seed(GENERATOR, "cut", source) % 2**32).permutation(count)
    ends = np.cumsum(list(sizes.values()))
    return {
        name: np.sort(order[end - size : end]).astype(np.int64)
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def average_pool(canvas: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Average squares of `canvas` [N, c, c] down to [N, size, size]; `size` divides c; halves are rounded up."""
    step = canvas.shape[1] // size
    if step == 1:
        return canvas
    total = np.zeros((len(canvas), size, size), dtype=np.uint32)
    for y in range(step):
        for x in range(step):
            total += canvas[:, y::step, x::step]
    area = step * step
    pooled: NDArray[np.uint8] = ((total + area // 2) // area).astype(np.uint8)
    return pooled


def _draw_partners(
    first: ImagePool, second: ImagePool, partners: int, draws: np.random.RandomState
) -> NDArray[np.int64]:
    """Return (first row, second row) [rows * partners, 2]; the partners of one image differ from each other."""
    order = second.rows[np.argsort(second.labels[second.rows], kind="stable")]
    classes = second.labels[order]
    base = first.labels[first.rows]
    begin = np.searchsorted(classes, base, side="left")
    own = np.searchsorted(classes, base, side="right") - begin
    ranks = _distinct_ranks(len(order) - own, partners, draws)
    ranks += np.where(ranks >= begin[:, None], own[:, None], 0)  # step over the base image's own class
    return np.stack([np.repeat(first.rows, partners), order[ranks].reshape(-1)], axis=1)


def _distinct_ranks(bounds: NDArray[np.int64], count: int, draws: np.random.RandomState) -> NDArray[np.int64]:
    """Return [len(bounds), count]: row i uniform in 0..bounds[i]-1, rows with repetitions drawn again."""
    ranks = (draws.random_sample((len(bounds), count)) * bounds[:, None]).astype(np.int64)
    while True:
        ordered = np.sort(ranks, axis=1)
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(again):
            return ranks
        ranks[again] = (draws.random_sample((len(again), count)) * bounds[again, None]).astype(np.int64)


def _draw_offsets(count: int, layout: PairLayout, draws: np.random.RandomState) -> NDArray[np.uint8]:
    first = draws.randint(layout.first[0], layout.first[1] + 1, size=(count, 2))
    second = draws.randint(layout.second[0], layout.second[1] + 1, size=(count, 2))
    return np.concatenate([first, second], axis=1).astype(np.uint8)


def _compose(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    sources: NDArray[np.int64],
    offsets: NDArray[np.uint8],
    canvas: int,
) -> NDArray[np.uint8]:
    """Return the canvases [N, canvas, canvas] of the pairs, one offset's worth of pairs at a time."""
    result = np.zeros((len(sources), canvas, canvas), dtype=np.uint8)
    for column, images in ((0, first), (1, second)):
        height, width = images.shape[1:]
        at = offsets[:, 2 * column : 2 * column + 2]
        for y, x in np.unique(at, axis=0):
            here = np.flatnonzero((at[:, 0] == y) & (at[:, 1] == x))
            window = (here, slice(y, y + height), slice(x, x + width))
            result[window] = np.maximum(result[window], images[sources[here, column]])
    return result
