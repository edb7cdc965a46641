"""Means, standard errors and paired differences over seeds; a diverged run counts as an infinite loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BeforeValidator

Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may be NaN or infinite; read back from JSON, where it is null then."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval of 95 % round it; all NaN where there is none."""

    estimate: Figure
    low: Figure
    high: Figure


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error s / sqrt(S), s with S - 1 in the denominator.

    The standard error is NaN for a single value and where a value is infinite or NaN.
    """
    if not values:
        raise ValueError("no values to average")
    sample = torch.tensor(list(values), dtype=torch.float64)
    mean = float(sample.mean())
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(sample.std()) / math.sqrt(len(values))


@dataclass(frozen=True)
class PairedDifference:
    """Loss of one method minus loss of its reference on the same seeds: below 0 means that the method is better.

    Attributes:
        mean: mean of the `pairs` differences.
        standard_error: of that mean; NaN for one pair, or where a run diverged.
    """

    mean: float
    standard_error: float
    pairs: int

    @property
    def no_worse_within_one_se(self) -> bool:
        """Whether the mean is at most one standard error above 0 (at most 0 where there is no standard error)."""
        return self.mean <= self._margin

    @property
    def verdict(self) -> str:
        """In words: `better` or `worse` by more than one standard error, or neither, or `both diverged`."""
        if math.isnan(self.mean):
            return "both diverged"
        if self.mean < -self._margin:
            return "better by more than one standard error"
        if self.mean <= self._margin:
            return "no worse within one standard error"
        return "worse by more than one standard error"

    @property
    def _margin(self) -> float:
        return self.standard_error if math.isfinite(self.standard_error) else 0.0


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> PairedDifference:
    """Compare two methods run on the same seeds, in the same order.

    Where only the method diverged on a seed the mean is +inf, where only the reference did -inf, and NaN where both
    happened: then there is nothing to conclude.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(losses) != len(reference):
        raise ValueError(f"{len(losses)} losses cannot be paired with {len(reference)}")
    differences = [
        (math.inf if math.isnan(a) else a) - (math.inf if math.isnan(b) else b)
        for a, b in zip(losses, reference, strict=True)
    ]
    mean, error = mean_and_standard_error(differences)
    return PairedDifference(mean, error, len(differences))


def exponential_average(values: Sequence[float], span: float) -> list[float]:
    """Smooth a curve: the exponentially weighted mean of the values so far, weight exp(-age / span), debiased.

    A value that is not finite is carried as NaN and leaves the average as it was.
    """
    keep = math.exp(-1 / span)
    total = weight = 0.0
    smooth = []
    for value in values:
        if not math.isfinite(value):
            smooth.append(math.nan)
            continue
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth
