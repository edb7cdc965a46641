"""An estimator of the meta-gradient: forward differences along random directions.

ml2o meta-train --plugin examples/plugins/estimator.py --set estimator.kind=forward-difference
"""

import torch

from ml2o_dist import Episode, Estimate, register_estimator
from ml2o_dist.metatrain.meta_loss import episode_loss, step_weights
from ml2o_dist.runtime.seeding import generator


@register_estimator("forward-difference")
def forward_difference(episode: Episode) -> Estimate:
    """(L(theta + sigma e) - L(theta)) / sigma * e for one direction e ~ N(0, I)."""
    settings, theta = episode.settings, episode.rule.meta_parameters
    draws = generator("directions", episode.seed)
    direction = {name: torch.randn(tensor.shape, generator=draws).to(tensor) for name, tensor in theta.items()}

    def meta_loss(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            for name, tensor in theta.items():
                tensor += scale * direction[name]
            rule = type(episode.rule)(episode.rule.network)
            losses = episode.roll_out(rule, None, None).losses
            for name, tensor in theta.items():
                tensor -= scale * direction[name]
        weights = step_weights(settings.step_weights, episode.horizon, losses)
        return episode_loss(episode.meta_loss, weights, losses, episode.problem.minima), losses

    here, losses = meta_loss(0.0)
    there, _ = meta_loss(settings.sigma)
    slope = (there - here) / settings.sigma
    return Estimate(here, {name: slope * each for name, each in direction.items()}, losses, episodes=2)
