"""How far objectives have fallen: the scale of a guard's budget, from many batches and independent of losses' zero.

Shapes: P instances, k objectives that must pass a guard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 5
"""Number of first steps whose losses are averaged for the beginning of a run."""

DECAY = 0.8
"""Decay of the running average of the present losses; it covers five steps, like the beginning."""


@dataclass(frozen=True)
class Descent:
    """The objectives' averages at the beginning and now, after `count` steps.

    Attributes:
        first: [P, k] float64, mean losses of the first `FIRST` steps.
        recent: [P, k] float64, running average of all steps' losses, without correction for its start at 0.
        depth: [P] float64, the largest fall of an average below its beginning so far, over steps and objectives. It
            never shrinks, and except for noise it is at most f_i(z_0) - inf f_i of the objective that fell furthest.
    """

    count: int
    first: Tensor
    recent: Tensor
    depth: Tensor

    @classmethod
    def begin(cls, losses: Tensor, depth: Tensor | None = None) -> Descent:
        """Return the value before the first step, for losses shaped `losses` [P, k]; `depth`: one already known."""
        zero = torch.zeros_like(losses, dtype=torch.float64)
        return cls(0, zero, zero, zero[:, 0] if depth is None else depth)

    def after(self, losses: Tensor) -> Descent:
        """Return the value updated with a step's losses [P, k]; a non-finite loss counts as the previous average."""
        count = self.count + 1
        before = self.recent / (1 - DECAY**self.count) if self.count else self.recent
        values = losses.detach().double()
        values = torch.where(values.isfinite(), values, before)
        first = self.first + (values - self.first) / count if count <= FIRST else self.first
        recent = DECAY * self.recent + (1 - DECAY) * values
        fall = (first - recent / (1 - DECAY**count)).amax(dim=1)
        return Descent(count, first, recent, torch.maximum(self.depth, fall))
