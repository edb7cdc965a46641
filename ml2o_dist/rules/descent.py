"""How far objectives have fallen: the scale of a guard's budget, from many batches and free of where losses have 0.

Shapes: P instances, k objectives that must pass a guard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 5
"""Steps whose losses are averaged for where a run began."""

DECAY = 0.8
"""Of the running average that says where it is now: as many steps, five, as the beginning has."""


@dataclass(frozen=True)
class Descent:
    """The objectives' averages at the beginning and now, after `count` steps.

    Attributes:
        first: [P, k] float64, mean losses of the first `FIRST` steps.
        recent: [P, k] float64, running average of all steps' losses, without correction for its start at 0.
        depth: [P] float64, the most that an average has fallen below its beginning so far, of the objective that fell
            furthest. It never shrinks, and is at most f_i(z_0) - inf f_i of that objective but for noise.
    """

    count: int
    first: Tensor
    recent: Tensor
    depth: Tensor

    @classmethod
    def begin(cls, losses: Tensor, depth: Tensor | None = None) -> Descent:
        """Return it before the first step, for losses shaped `losses` [P, k]; `depth` is known from before."""
        zero = torch.zeros_like(losses, dtype=torch.float64)
        return cls(0, zero, zero, zero[:, 0] if depth is None else depth)

    def after(self, losses: Tensor) -> Descent:
        """Return it with the losses [P, k] of another step; one that is not finite counts as the average before it."""
        count = self.count + 1
        before = self.recent / (1 - DECAY**self.count) if self.count else self.recent
        values = losses.detach().double()
        values = torch.where(values.isfinite(), values, before)
        first = self.first + (values - self.first) / count if count <= FIRST else self.first
        recent = DECAY * self.recent + (1 - DECAY) * values
        fall = (first - recent / (1 - DECAY**count)).amax(dim=1)
        return Descent(count, first, recent, torch.maximum(self.depth, fall))
