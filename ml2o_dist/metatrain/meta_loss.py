"""The meta-loss of an episode: L = (1/P) sum_p sum_{t=1..K} w_t l_t(z_t) / sum_t w_t.

l_t uses the batch of step t, whose gradient the rollout computes anyway. Shapes: K steps, P instances, m
objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.problems.base import Problem
from ml2o_dist.runtime.errors import UserError

FLOOR = 1e-8
"""Added inside logarithms, so that an objective that reaches its minimum exactly gives a finite meta-loss."""


def step_weights(kind: str, horizon: int, like: Tensor) -> Tensor:
    """Return w_1 .. w_K / sum w, [K]: uniform, linear (w_t = t) or quadratic (w_t = t^2)."""
    steps = torch.arange(1, horizon + 1, dtype=like.dtype, device=like.device)
    powers = {"uniform": 0, "linear": 1, "quadratic": 2}
    weights = steps ** powers[kind]
    return weights / weights.sum()


def meta_loss_kind(settings: EstimatorSettings, problem: Problem) -> str:
    """Resolve `auto`: log_sum for losses that are positive by construction, else normalised."""
    kind = settings.meta_loss
    if kind == "auto":
        return "log_sum" if problem.positive else "normalised"
    if kind == "log_gap" and problem.minima is None:
        raise UserError(f"estimator.meta_loss=log_gap needs known minima, {type(problem).__name__} has none")
    return kind


def step_losses(kind: str, losses: Tensor, first: Tensor, minima: Tensor | None) -> Tensor:
    """Map the objectives' losses [..., P, m] to l [..., P]; `first` [P, m] are the losses at z_0.

    log_sum: log(sum_i f_i); log_gap: mean_i log(f_i - min f_i); normalised: mean_i f_i / |f_i(z_0)|.
    """
    if kind == "log_sum":
        return (losses.sum(dim=-1) + FLOOR).log()
    if kind == "log_gap":
        assert minima is not None
        return ((losses - minima).clamp_min(0) + FLOOR).log().mean(dim=-1)
    return (losses / (first.abs() + FLOOR)).mean(dim=-1)


def episode_loss(kind: str, weights: Tensor, losses: Tensor, minima: Tensor | None) -> Tensor:
    """Return L for losses [K+1, P, m] and normalised step weights [K]."""
    each = step_losses(kind, losses[1:], losses[0].detach(), minima)
    return (weights[:, None] * each).sum(dim=0).mean()
