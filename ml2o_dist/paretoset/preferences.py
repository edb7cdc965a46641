"""Preferences: points of the simplex, r_t >= 0 and sum r_t = 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

DRAWN = 16
"""Preferences inside the simplex that a front of more than three tasks is evaluated at."""

TOLERANCE = 1e-6
"""How far from 1 the sum of a preference may be: it was perhaps written with float32."""


def checked_preference(preference: Sequence[float] | Tensor, tasks: int) -> Tensor:
    """Return the preference as a float64 tensor [T] on the CPU.

    Raises:
        UserError: it has not T finite numbers, one is negative, or they do not sum to one.
    """
    values = torch.as_tensor(preference, dtype=torch.float64).detach().cpu()
    shown = values.tolist()
    if values.shape != (tasks,):
        raise UserError(f"preference {shown} must have {tasks} numbers, one for each task")
    if not values.isfinite().all() or (values < 0).any():
        raise UserError(f"preference {shown} must have no number below 0, all finite")
    if abs(float(values.sum()) - 1) > TOLERANCE:
        raise UserError(f"preference {shown} must sum to 1, not {float(values.sum()):g}")
    return values


def simplex_grid(tasks: int, divisions: int) -> Tensor:
    """Return all preferences whose entries are multiples of 1 / divisions, [k, T] float64, in descending order.

    k = (divisions + T - 1 choose T - 1): with 10 divisions 11 for two tasks, 66 for three.
    """
    rows = list(_compositions(divisions, tasks))
    return torch.tensor(rows, dtype=torch.float64) / divisions


def evaluation_rays(tasks: int, divisions: int = 10) -> Tensor:
    """Return the preferences that a front is evaluated at, [k, T] float64.

    The grid of `simplex_grid` up to three tasks; for more, where it would be thousands, the T corners, the even one,
    and `DRAWN` that are drawn once for each T.
    """
    if tasks <= 3:
        return simplex_grid(tasks, divisions)
    even = torch.full((1, tasks), 1 / tasks, dtype=torch.float64)
    drawn = draw_preferences(DRAWN, tasks, generator("evaluation rays", tasks))
    return torch.cat([torch.eye(tasks, dtype=torch.float64), even, drawn])


def draw_preferences(count: int, tasks: int, draws: torch.Generator) -> Tensor:
    """Draw `count` preferences [count, T] float64, uniform on the simplex: Dirichlet(1, ..., 1)."""
    uniform = torch.rand(count, tasks, generator=draws, dtype=torch.float64)
    exponential = -torch.log1p(-uniform)  # 1 - u is in (0, 1], so that none is infinite
    return exponential / exponential.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
