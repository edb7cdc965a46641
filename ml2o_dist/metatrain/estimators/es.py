"""The estimator `es`: a meta-gradient from losses alone, since a guard's choices cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.metatrain.estimators.base import Episode, Estimate, register_estimator
from ml2o_dist.metatrain.meta_loss import episode_loss, step_weights
from ml2o_dist.runtime.seeding import generator


@register_estimator("es")
def estimate(episode: Episode) -> Estimate:
    """Perturb the meta-parameters and run whole episodes, under the guard if there is one."""
    named = episode.rule.meta_parameters
    parameters = list(named.values())
    recorders = iter([episode.recorder])  # only the first trial is recorded

    def trial(theta: Tensor) -> Tensor:
        vector_to_parameters(theta.to(parameters[0].device), parameters)
        rule = type(episode.rule)(episode.rule.network)
        return episode.roll_out(rule, None, next(recorders, None)).losses

    theta = parameters_to_vector(parameters).detach().cpu()
    loss, gradient, losses = evolution_strategy(
        theta, trial, episode.settings, episode.meta_loss, episode.problem.minima, episode.seed
    )
    parts = torch.split(gradient, [parameter.numel() for parameter in parameters])
    by_name = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
    return Estimate(loss, by_name, losses, 2 * episode.settings.pairs)


def evolution_strategy(
    theta: Tensor,
    trial: Callable[[Tensor], Tensor],
    settings: EstimatorSettings,
    kind: str,
    minima: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the gradient of the meta-loss smoothed over theta + sigma * N(0, I), by antithetic pairs.

    g = mean over the pairs of (L(theta + sigma e) - L(theta - sigma e)) / (2 sigma) * e, e ~ N(0, I) (Salimans et al.
    2017; Metz et al. 2019 on learned optimizers); both episodes of a pair have the same starting points and batches.
    Unbiased for the smoothed loss, whose gradient tends to that of L with sigma; the variance grows with the number of
    weights and falls with `settings.pairs`.

    Args:
        theta: the flat meta-parameters, float32.
        trial: the losses [K+1, P, m] of a whole episode under flat meta-parameters.
        kind, minima: as for `episode_loss`.
        seed: names the perturbations.

    Returns:
        mean of L over all episodes, its estimated gradient shaped like theta, and the mean losses [K+1, P, m].
    """
    stream = generator("perturbations", seed)
    gradient, seen, values = torch.zeros_like(theta), [], []
    for _ in range(settings.pairs):
        direction = torch.randn(theta.shape, generator=stream)
        ends = []
        for sign in (1, -1):
            losses = trial(theta + sign * settings.sigma * direction)
            weights = step_weights(settings.step_weights, len(losses) - 1, losses)
            ends.append(episode_loss(kind, weights, losses, minima).cpu())
            seen.append(losses)
        gradient += (ends[0] - ends[1]) / (2 * settings.sigma * settings.pairs) * direction
        values += ends
    return torch.stack(values).mean(), gradient, torch.stack(seen).mean(dim=0)
