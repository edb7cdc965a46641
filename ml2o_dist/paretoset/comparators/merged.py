"""Comparators without training: averages of the experts, and sums of their task vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ml2o_dist.paretoset.comparators.base import Ingredients, Merged, register_comparator
from ml2o_dist.paretoset.merging import rewarded_soup, simple_average, task_arithmetic, ties
from ml2o_dist.paretoset.task_vectors import TaskVectors

LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
"""Candidates for the factor of task arithmetic and TIES, which is chosen on the validation split."""


@register_comparator("average")
def average(given: Ingredients) -> Merged:
    """The mean of the experts."""
    return Merged(_even(given), [simple_average(given.vectors)])


@register_comparator("soup")
def soup(given: Ingredients) -> Merged:
    """Rewarded soup: for each preference the experts' weighted mean."""
    return Merged(given.rays, [rewarded_soup(given.vectors, ray) for ray in given.rays])


@register_comparator("arithmetic")
def arithmetic(given: Ingredients) -> Merged:
    """Task arithmetic."""
    return _scaled(given, task_arithmetic)


@register_comparator("ties")
def ties_merging(given: Ingredients) -> Merged:
    """TIES merging."""
    return _scaled(given, ties)


def _scaled(given: Ingredients, merge: Callable[[TaskVectors, float], dict[str, Tensor]]) -> Merged:
    """Merge by the factor that does best on the validation split."""
    totals = {scale: float(given.measure(merge(given.vectors, scale), "validation")[0].sum()) for scale in LAMBDAS}
    best = min(totals, key=lambda scale: (totals[scale], scale))
    chosen = {"scale": best, "validation_by_scale": {str(scale): total for scale, total in totals.items()}}
    return Merged(_even(given), [merge(given.vectors, best)], chosen)


def _even(given: Ingredients) -> Tensor:
    return torch.full((1, given.tasks.count), 1 / given.tasks.count, dtype=torch.float64)
