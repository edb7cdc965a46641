"""A front: the losses and accuracies of the networks for some preferences, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from ml2o_dist.evaluation.metrics import hypervolume
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading import validated

REFERENCE = 2.0
"""Reference point of the hypervolume, in each task's cross-entropy, as for the published figures."""


MOST_TASKS, MOST_POINTS, MOST_POINTS_OF_MANY = 16, 2000, 64
"""Limits for a front that is read: tasks, points with up to three tasks, and points with more tasks, where a
hypervolume takes long. The largest grid of preferences has 1326 points; eight tasks have 25 preferences."""


class _FrontJson(BaseModel):
    rays: list[list[float]]
    losses: list[list[float]]
    accuracies: list[list[float]]


_FRONT = TypeAdapter(_FrontJson)
_PARTS = ("rays", "losses", "accuracies")


@dataclass(frozen=True, eq=False)
class Front:
    """Losses and accuracies [k, T] float64 at the preferences `rays` [k, T]."""

    rays: Tensor
    losses: Tensor
    accuracies: Tensor

    @property
    def hypervolume(self) -> float:
        """The volume that the front dominates up to (2, ..., 2)."""
        reference = torch.full((self.losses.shape[1],), REFERENCE, dtype=torch.float64)
        return hypervolume(self.losses, reference).value

    @property
    def monotonicity(self) -> float | None:
        """The share of pairs of rays, over all tasks, where more preference for a task means less loss of it.

        1: more preference for a task always helps it; 1/2: the preference has no effect, since a tie counts as a half.
        None if no two rays differ.
        """
        more = self.rays.unsqueeze(1) > self.rays.unsqueeze(0)  # [i, j, t]: ray i asks more for task t than ray j
        difference = self.losses.unsqueeze(1) - self.losses.unsqueeze(0)
        better = (difference < 0).double() + 0.5 * (difference == 0).double()
        return float(better[more].mean()) if more.any() else None

    def to_json(self) -> dict[str, object]:
        """Return the front as JSON values."""
        return {
            "rays": self.rays.tolist(),
            "losses": self.losses.tolist(),
            "accuracies": self.accuracies.tolist(),
            "hypervolume": self.hypervolume,
            "monotonicity": self.monotonicity,
        }


def front_from_json(value: Any) -> Front:
    """Return the front that `Front.to_json` wrote.

    Raises:
        UserError: the value is no front, or is larger than any front that we make.
    """
    found = validated(_FRONT, value, "the front")
    parts = {
        key: torch.tensor(getattr(found, key), dtype=torch.float64) for key in _PARTS if _even(getattr(found, key))
    }
    shapes = {part.shape for part in parts.values()}
    if len(parts) < len(_PARTS) or len(shapes) > 1:
        raise UserError(f"the front cannot be used: {', '.join(_PARTS)} are no tables of one shape")
    points, tasks = next(iter(shapes))
    if not 0 < tasks <= MOST_TASKS or not 0 < points <= (MOST_POINTS if tasks <= 3 else MOST_POINTS_OF_MANY):
        raise UserError(f"the front cannot be used: it has {points} points of {tasks} tasks")
    if not all(bool(part.isfinite().all()) for part in parts.values()):
        raise UserError("the front cannot be used: it has a number that is not finite")
    return Front(**parts)


def _even(rows: list[list[float]]) -> bool:
    return len({len(row) for row in rows}) == 1
