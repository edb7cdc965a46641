"""Ways to merge T experts into one network without training; every fusion is compared with them.

Each returns a whole state dict; floating-point buffers are the mean of the experts' (rewarded soup: weighted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.paretoset.preferences import checked_preference
from ml2o_dist.paretoset.task_vectors import TaskVectors
from ml2o_dist.runtime.errors import UserError


def simple_average(vectors: TaskVectors) -> dict[str, Tensor]:
    """Return the mean of the experts (Wortsman et al. 2022)."""
    return _merged(vectors, _equal(vectors))


def task_arithmetic(vectors: TaskVectors, scale: float = 0.3) -> dict[str, Tensor]:
    """Return theta_0 + scale * sum_t tau_t (Ilharco et al. 2023, who use 0.3)."""
    return _merged(vectors, torch.full((vectors.tasks,), float(scale), dtype=torch.float64))


def rewarded_soup(vectors: TaskVectors, preference: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """Return theta_0 + sum_t r_t tau_t = sum_t r_t theta_t (Rame et al. 2023).

    Raises:
        UserError: `preference` is no point of the simplex.
    """
    r = checked_preference(preference, vectors.tasks)
    return vectors.whole_state(vectors.moved(r), r)


def ties(vectors: TaskVectors, scale: float = 1.0, keep: float = 0.2) -> dict[str, Tensor]:
    """Return theta_0 + scale * tau, tau the trimmed, sign-elected, disjoint mean (TIES, Yadav et al. 2023).

    In each task vector the `keep` largest entries by magnitude stay, over all parameters. Each coordinate takes the
    sign of its larger total, and the mean of the entries with this sign. Keep and scale are as in the paper.

    Raises:
        UserError: `keep` is not in (0, 1], or a parameter is complex.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep!r} of TIES must be a share of the entries, above 0 and at most 1")
    if odd := [name for name, start in vectors.start.items() if start.is_complex()]:
        raise UserError(f"TIES elects signs, and parameter {odd[0]} is {vectors.start[odd[0]].dtype}: merge otherwise")
    flat = torch.cat([tau.reshape(len(tau), -1) for tau in vectors.vectors.values()], dim=1)
    count = max(1, round(keep * flat.shape[1]))
    least = flat.abs().topk(count, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= least, flat, 0.0)
    sign = trimmed.sum(dim=0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0.0)
    voters = ((agreeing != 0).sum(dim=0)).clamp(min=1)
    elected = agreeing.sum(dim=0) / voters
    merged, begin = {}, 0
    for name, start in vectors.start.items():
        merged[name] = start + (scale * elected[begin : begin + start.numel()].view_as(start)).to(start.dtype)
        begin += start.numel()
    return vectors.whole_state(merged | vectors.heads, _equal(vectors))


def _merged(vectors: TaskVectors, weights: Tensor) -> dict[str, Tensor]:
    return vectors.whole_state(vectors.moved(weights), _equal(vectors))


def _equal(vectors: TaskVectors) -> Tensor:
    return torch.full((vectors.tasks,), 1 / vectors.tasks, dtype=torch.float64)
