"""A front: the losses and accuracies of the networks for some preferences, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.evaluation.metrics import hypervolume

REFERENCE = 2.0
"""Of the hypervolume, in each task's cross-entropy: that of the published figures."""


@dataclass(frozen=True, eq=False)
class Front:
    """Losses and accuracies [k, T] float64 at the preferences `rays` [k, T]."""

    rays: Tensor
    losses: Tensor
    accuracies: Tensor

    @property
    def hypervolume(self) -> float:
        """What the front dominates up to (2, ..., 2)."""
        reference = torch.full((self.losses.shape[1],), REFERENCE, dtype=torch.float64)
        return hypervolume(self.losses, reference).value

    @property
    def monotonicity(self) -> float | None:
        """The share of pairs of rays, over all tasks, where more preference for a task means less loss of it.

        1: moving the dial towards a task always helps it; 1/2: the dial does nothing, since a tie counts as a half.
        None where no two rays differ.
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


def front_from_json(value: Mapping[str, Any]) -> Front:
    """Return the front that `Front.to_json` wrote."""
    rays, losses, accuracies = (
        torch.tensor(value[key], dtype=torch.float64) for key in ("rays", "losses", "accuracies")
    )
    return Front(rays, losses, accuracies)
