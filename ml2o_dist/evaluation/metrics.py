"""Indicators that compare points with a known front, and measures of the conflict between the gradients.

Objectives are minimised. moocore computes the indicators of fronts. Ours are the checks, because moocore accepts NaN,
and the count of the points that a hypervolume ignores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import moocore
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml2o_dist.runtime.errors import UserError


class Hypervolume(NamedTuple):
    """Attributes:
    value: the volume that the points dominate inside the reference box.
    outside: number of points that add nothing because they do not beat the reference point in every objective.
    """

    value: float
    outside: int


def hypervolume(points: Tensor, reference: Tensor) -> Hypervolume:
    """Return the volume of {y <= reference: some point <= y} for `points` [k, m] and `reference` [m].

    A point with a coordinate of +inf lies outside. Without points it is 0.
    Source: Zitzler & Thiele 1998; computed by moocore (Fonseca, Paquete & Lopez-Ibanez 2006).

    Raises:
        UserError: wrong shapes, a NaN or -inf, or a reference point that is not finite.
    """
    values = _points("points", points)
    corner = _array(reference)
    if corner.ndim != 1 or len(corner) != values.shape[1]:
        raise UserError(f"the reference point has shape {list(reference.shape)}; points {list(points.shape)} need [m]")
    if not np.isfinite(corner).all():
        raise UserError(f"the reference point {corner.tolist()} is not finite")
    inside = (values < corner).all(axis=1)
    value = float(moocore.hypervolume(values[inside], ref=corner)) if inside.any() else 0.0
    return Hypervolume(value, int((~inside).sum()))


def igd_plus(points: Tensor, front: Tensor) -> float:
    """Return IGD+, the distance from `front` [r, m] to `points` [k, m]: 0 if they weakly dominate all of `front`.

    mean over y in front of min over x in points of |max(x - y, 0)|: only the objectives in which x is
    worse count, so unlike IGD it never prefers a set that another one dominates.
    Source: Ishibuchi, Masuda, Tanigaki & Nojima 2015; computed by moocore.

    Raises:
        UserError: wrong shapes, no points, a NaN or -inf, or a front that is not finite.
    """
    return float(moocore.igd_plus(*_compared(points, front)))


def additive_epsilon(points: Tensor, front: Tensor) -> float:
    """Return the least e such that `points` [k, m] minus e weakly dominate all of `front` [r, m].

    max over y in front of min over x in points of max_i (x_i - y_i). Below 0 the points are better than the front.
    Source: Zitzler et al. 2003; computed by moocore.

    Raises:
        UserError: as `igd_plus`.
    """
    return float(moocore.epsilon_additive(*_compared(points, front)))


@dataclass(frozen=True, eq=False)
class Conflict:
    """How much m gradients conflict, over their m (m - 1) / 2 pairs; each tensor has the shape before [m, n], float64.

    NaN where a gradient is not finite, and everywhere for m = 1, which has no pair.

    Attributes:
        conflicting: share of pairs whose cosine is below 0.
        mean_cosine, min_cosine: of the pairs; a gradient of length 0 has the cosine 0 with all.
        magnitude_similarity: mean of 2 |a| |b| / (|a|^2 + |b|^2): 1 for equal lengths (also 0 and 0), 0 if just one
            is 0.
    """

    conflicting: Tensor
    mean_cosine: Tensor
    min_cosine: Tensor
    magnitude_similarity: Tensor


def gradient_conflict(jacobian: Tensor) -> Conflict:
    """Describe the conflicts between the rows of each matrix in `jacobian` [.., m, n].

    Source: conflict and magnitude similarity as in Yu et al. 2020, definitions 1 and 3; the treatment of zeros is ours.

    Raises:
        UserError: fewer than two dimensions.
    """
    if jacobian.ndim < 2:
        raise UserError(f"a Jacobian of shape {list(jacobian.shape)} has no rows; [.., m, n] is needed")
    matrices = jacobian.double()
    objectives = matrices.shape[-2]
    first, second = torch.triu_indices(objectives, objectives, offset=1, device=matrices.device)
    if len(first) == 0:
        nothing = matrices.new_full(matrices.shape[:-2], torch.nan)
        return Conflict(nothing, nothing.clone(), nothing.clone(), nothing.clone())
    largest = matrices.abs().amax(dim=-1, keepdim=True)
    units = torch.where(largest > 0, matrices / largest, matrices)  # no overflow in the squares; NaN stays
    lengths = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
    units = torch.where(lengths > 0, units / lengths, units)
    norms = (largest * lengths).squeeze(-1)
    cosines = (units @ units.mT)[..., first, second].clamp(-1.0, 1.0)
    shorter = torch.minimum(norms[..., first], norms[..., second])
    longer = torch.maximum(norms[..., first], norms[..., second])
    ratio = torch.where(longer == 0, 1.0, shorter / longer)
    similarity = 2.0 * ratio / (1.0 + ratio.square())
    finite = matrices.isfinite().flatten(-2).all(dim=-1)
    return Conflict(
        *(
            torch.where(finite, value, torch.nan)
            for value in (
                (cosines < 0).double().mean(dim=-1),
                cosines.mean(dim=-1),
                cosines.amin(dim=-1),
                similarity.mean(dim=-1),
            )
        )
    )


def _compared(points: Tensor, front: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as arrays after a check that their shapes agree."""
    values, targets = _points("points", points), _points("front", front)
    for name, array in (("points", values), ("front", targets)):
        if len(array) == 0:
            raise UserError(f"{name} is empty; at least one point is needed")
    if values.shape[1] != targets.shape[1]:
        raise UserError(f"points {list(points.shape)} and front {list(front.shape)} differ in the number of objectives")
    if not np.isfinite(targets).all():
        raise UserError("the front has a coordinate that is not finite")
    return values, targets


def _points(name: str, points: Tensor) -> NDArray[np.float64]:
    values = _array(points)
    if values.ndim != 2 or values.shape[1] == 0:
        raise UserError(f"{name} has shape {list(points.shape)}; [k, m] is needed, a row for each point")
    wrong = np.isnan(values) | np.isneginf(values)
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise UserError(f"{name}: row {row} is {values[row].tolist()}; leave out points that are NaN or -inf")
    return values


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return np.ascontiguousarray(tensor.detach().cpu().double().numpy())
