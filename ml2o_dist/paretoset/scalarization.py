"""Scalarizations: a preference turns the losses of T tasks into weights of the objectives, one set a step.

All but EPO are functions s(r, l) to be minimised, whose gradient with respect to the losses gives the weights; EPO
finds its weights from the gradients. At even preferences the weights of `ls` are all 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ml2o_dist.paretoset.epo import LEAST, epo_weights
from ml2o_dist.runtime.errors import UserError, unknown

SCALARIZATIONS = ("ls", "epo", "tchebycheff", "hypervolume", "cosmos")

HYPERVOLUME_RAYS = 4
"""Preferences in a step of `hypervolume`: its front's points. 2^p - 1 terms; four is small, and a front already."""

COSINE = {"hypervolume": 1.0, "cosmos": 2.0}
"""Weight of the term that keeps the points in the order of their preferences; COSMOS's: its authors' on MultiMNIST."""


@dataclass
class Scalarization:
    """One of `SCALARIZATIONS` by name.

    ls           T sum_t r_t l_t
    tchebycheff  T max_t r_t l_t (ideal point 0)
    epo          see `epo_weights`, times T; where its linear program has no solution T r, counted
    hypervolume  -HV(l(r_1) .. l(r_p)) - sum_i cos(1 / r_i, l(r_i)): PHN-HVI (Hoang et al. 2023)
    cosmos       T sum_t r_t l_t - 2 cos(1 / r, l): COSMOS (Ruchte & Grabocka 2021)

    In both cosines the direction 1 / r, of equal r_t l_t, is ours; the papers have r. More preference asks for less
    loss, as everywhere here. Entries of r below 0.001 are raised to 0.001.

    Attributes:
        reference: of the hypervolume, in each objective.
        failures: linear programs without a solution so far.
    """

    name: str
    reference: float = 2.0
    failures: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.name not in SCALARIZATIONS:
            raise unknown("loss", self.name, SCALARIZATIONS)

    @property
    def rays(self) -> int:
        """How many preferences one step takes."""
        return HYPERVOLUME_RAYS if self.name == "hypervolume" else 1

    @property
    def constant(self) -> bool:
        """Whether the weights depend on the preference alone, so that steps can be compared by weighted losses."""
        return self.name == "ls"

    def weights(self, preferences: Tensor, losses: Tensor, jacobian: Tensor | None = None) -> Tensor:
        """Return the weights [p, T], in the losses' precision, at `preferences` [p, T] and `losses` [p, T], detached.

        `jacobian` [T, n] is of the losses of the one preference that `epo` takes.

        Raises:
            UserError: `epo` without a Jacobian.
        """
        tasks = losses.shape[1]
        r = preferences.to(losses)
        if self.name == "ls":
            return tasks * r
        if self.name == "epo":
            if jacobian is None:
                raise UserError("loss epo needs the gradients of the tasks, which only a step has: use ls here")
            alpha = epo_weights(preferences[0], losses[0], jacobian)
            self.failures += alpha is None
            return tasks * (r if alpha is None else alpha.to(losses).unsqueeze(0))
        with torch.enable_grad():
            values = losses.detach().requires_grad_(True)
            if self.name == "tchebycheff":
                scalar = tasks * (r * values).max(dim=1).values.sum()
            elif self.name == "cosmos":
                scalar = tasks * (r * values).sum() - self._aligned(r, values)
            else:
                scalar = -hypervolume(values, self.reference) - self._aligned(r, values)
            (weights,) = torch.autograd.grad(scalar, values)
        return weights

    def _aligned(self, r: Tensor, losses: Tensor) -> Tensor:
        cosines = torch.nn.functional.cosine_similarity(1 / r.clamp(min=LEAST), losses, dim=1)
        return COSINE[self.name] * cosines.sum()


def hypervolume(points: Tensor, reference: float) -> Tensor:
    """Return the volume that `points` [p, m] dominate up to `reference` in each objective, differentiable.

    By inclusion and exclusion over the 2^p - 1 sets of points, whose boxes intersect in a box: exact for any m, meant
    for few points. A point beyond the reference in some objective dominates nothing, and has no gradient.
    """
    total = points.new_zeros(())
    for size in range(1, len(points) + 1):
        chosen = torch.tensor(list(itertools.combinations(range(len(points)), size)), device=points.device)
        corners = points[chosen].amax(dim=1)
        volumes = (reference - corners).clamp(min=0).prod(dim=1)
        total = total + (volumes.sum() if size % 2 else -volumes.sum())
    return total
