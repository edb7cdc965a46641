"""The estimator `replay` (the default): first order, from the losses and Jacobians that a rollout recorded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.metatrain.estimators.base import Episode, Estimate, register_estimator
from ml2o_dist.metatrain.meta_loss import episode_loss, step_weights
from ml2o_dist.problems.base import Problem
from ml2o_dist.rules.learned import LearnedRule, Rollout
from ml2o_dist.runtime.seeding import generator


@register_estimator("replay")
def estimate(episode: Episode) -> Estimate:
    """Roll out and replay in one process; `metatrain.episode` can do the two in different ones."""
    chosen = choose(episode.problem, episode.settings.coordinates, episode.seed)
    rollout = episode.roll_out(episode.rule, chosen, episode.recorder)
    loss, gradient = replay(
        episode.rule, rollout, episode.settings, episode.meta_loss, episode.unroll, episode.problem.minima
    )
    return Estimate(loss, gradient, rollout.losses)


def replay(
    rule: LearnedRule, rollout: Rollout, settings: EstimatorSettings, kind: str, unroll: int, minima: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """First-order meta-gradient by replay (ours): dL/dtheta = sum_s <a_s, du_s/dtheta>.

    With the rule's inputs detached, theta reaches the loss only through the updates u_s, and z_t = z_0 + sum_{s<t}
    u_s. Hence the adjoint a_s = sum_{t > s} gamma^(t-s-1) w_t grad l_t is a reverse cumulative sum of gradients that
    the rollout recorded. `LearnedRule.replay` computes the rest; the task is never differentiated twice. gamma = 1 is
    first-order back-propagation through time over the whole episode, for the steps as proposed: unlike `exact`, replay
    ignores a problem's projection onto its box. A step that a guard rejected was not the rule's: a_s = 0.

    Args:
        kind, minima: of the meta-loss, as for `episode_loss`.
        unroll: the rule's own graph is cut after every so many steps, with the states carried over (0: never).

    Returns:
        L as a scalar, and its gradient by meta-parameter.
    """
    horizon = rollout.losses.shape[0] - 1
    weights = step_weights(settings.step_weights, horizon, rollout.losses)
    chunk = unroll or horizon
    loss = episode_loss(kind, weights, rollout.losses, minima)
    adjoints = _adjoints(rollout, weights, kind, minima, settings.gamma, chunk if settings.truncated else horizon)
    adjoints *= rollout.accepted[..., None]
    return loss, rule.replay(rollout, adjoints, chunk)


def choose(problem: Problem, share: float, seed: int) -> Tensor:
    """Draw the indices [P, S] of S = ceil(share * n) parameters of each instance, without replacement."""
    count = max(1, min(problem.dimension, math.ceil(share * problem.dimension)))
    source = generator("coordinates", seed)
    rows = [torch.randperm(problem.dimension, generator=source)[:count] for _ in range(problem.instances)]
    return torch.stack(rows).sort(dim=1).values.to(problem.device)


def _adjoints(rollout: Rollout, weights: Tensor, kind: str, minima: Tensor | None, gamma: float, chunk: int) -> Tensor:
    """Return a_s for s = 0 .. K-1, [K, P, S]: the discounted sum of later loss gradients within each chunk."""
    with torch.enable_grad():
        losses = rollout.losses.detach().requires_grad_(True)
        (per_loss,) = torch.autograd.grad(episode_loss(kind, weights, losses, minima), losses)
    horizon = len(weights)
    gradients = torch.einsum("tpm,tpms->tps", per_loss[1:], rollout.gradients[1:])
    adjoints = torch.empty_like(gradients)
    running = torch.zeros_like(gradients[0])
    for s in range(horizon - 1, -1, -1):
        if (s + 1) % chunk == 0:
            running = torch.zeros_like(running)
        running = gamma * running + gradients[s]
        adjoints[s] = running
    return adjoints
