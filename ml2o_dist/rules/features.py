"""Gradient preprocessing: what the network sees of each coordinate's gradients.

`advance` is elementwise in the coordinates, so that the same code serves a rollout over all coordinates and the replay
of a chosen few. R counts coordinates (P * n of them); gradients are [m, R], features [c, m, R]. What needs all
coordinates of an instance, the agreement, is computed once in the rollout and handed to both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.config import RuleSettings

SLOW, FAST, SECOND = 0.9, 0.5, 0.999
"""Decay rates of the two momenta (Adam's beta_1, ours) and of the squared gradient (Adam's beta_2)."""

EPS = 1e-8
"""Adam's epsilon, so that the untrained residual form equals torch's Adam."""

TINY = 1e-12
"""Keeps 0 / 0 features at 0; far below Adam's epsilon, so that features stay free of the gradients' scale."""

LOG_SIGN_P = 10.0
"""p of Andrychowicz et al. 2016, appendix A."""

CHANNELS = {"adam": 3, "agreement": 4, "log_sign": 2}


class Memory(NamedTuple):
    """Running averages: of each objective's gradient [m, R] at two time scales, of its square, and for the sum [R]."""

    slow: Tensor
    fast: Tensor
    second: Tensor
    total: Tensor
    total_second: Tensor


def initial_memory(like: Tensor) -> Memory:
    """Return zero averages for gradients shaped `like` [m, R]."""
    zero, total = torch.zeros_like(like), torch.zeros_like(like[0])
    return Memory(zero, zero, zero, total, total)


class Agreement(NamedTuple):
    """How much of the decrease that the last steps promised is still there after them, for each instance.

    Attributes:
        value: r in [-1, 1], [P]: near 1 the steps are short beside the distance over which the gradient changes, about
            0 they end where the gradient along them vanishes, below 0 they overshoot (0 before the second step).
        total: sum of all values so far, [P].
        kept, promised: running averages of <g_t, u_{t-1}> and <g_{t-1}, u_{t-1}>, [P]; value = kept / promised.
        update, promise: the last update u [P, n], and <g, u> on the gradient that made it [P].
    """

    value: Tensor
    total: Tensor
    kept: Tensor
    promised: Tensor
    update: Tensor
    promise: Tensor


def initial_agreement(like: Tensor) -> Agreement:
    """Return the agreement before the first step, for updates shaped `like` [P, n]."""
    zero = torch.zeros_like(like[:, 0])
    return Agreement(zero, zero, zero, zero, torch.zeros_like(like), zero)


def judge(agreement: Agreement, gradient: Tensor) -> Agreement:
    """Take in the gradient of the summed objectives [P, n] at the point that the last update led to (ours).

    Hypergradient descent (Baydin et al. 2018) adapts a learning rate by the sign of <g_t, u_{t-1}>; divided by what
    the step promised, it becomes a number that means the same for every network, scale and loss (measured on an MLP, a
    CNN and a LeNet: about 0.4 at a third of the best Adam step, 0.2 at the best, below 0 at three times the best).
    """
    kept = SLOW * agreement.kept + (1 - SLOW) * (gradient * agreement.update).sum(dim=1)
    promised = SLOW * agreement.promised + (1 - SLOW) * agreement.promise
    descends = promised < 0
    ratio = kept / torch.where(descends, promised, torch.ones_like(promised))
    value = torch.where(descends, ratio.clamp(-1, 1), torch.zeros_like(ratio))
    return agreement._replace(value=value, total=agreement.total + value, kept=kept, promised=promised)


def remember(agreement: Agreement, gradient: Tensor, update: Tensor) -> Agreement:
    """Note the update [P, n] made from the summed gradient [P, n], to be judged at the next step."""
    return agreement._replace(update=update, promise=(gradient * update).sum(dim=1))


def advance(
    settings: RuleSettings, gradients: Tensor, memory: Memory, step: int, agreement: Tensor
) -> tuple[Tensor, Tensor, Memory]:
    """Take in the gradients [m, R] of step number `step` (from 0), and the agreement [R] of each one's instance.

    Returns:
        features [c, m, R]; Adam's direction for the summed gradient [R] (zeros for the `scaled` output, which has no
        use for it); the memory after this step. Differentiable in the gradients.

    `adam`: g / sqrt(v), and m / sqrt(v) for momenta with decay 0.9 and 0.5, all bias-corrected (after RNNprop,
    Lv et al. 2017; the second time scale is ours). `log_sign`: (log|g| / p, sign g) where |g| >= e^-p, else
    (-1, e^p g) (Andrychowicz et al. 2016). `agreement`: those of `adam` and the agreement of the instance.
    """
    count = step + 1
    if settings.features in ("adam", "agreement"):
        second = SECOND * memory.second + (1 - SECOND) * gradients.square()
        slow = SLOW * memory.slow + (1 - SLOW) * gradients
        fast = FAST * memory.fast + (1 - FAST) * gradients
        inverse = 1 / (_root(second / (1 - SECOND**count)) + TINY)
        channels = [gradients * inverse, slow * (inverse / (1 - SLOW**count)), fast * (inverse / (1 - FAST**count))]
        if settings.features == "agreement":
            channels.append(agreement.expand_as(gradients))
        features = torch.stack(channels)
        memory = memory._replace(slow=slow, fast=fast, second=second)
    else:
        features = _log_sign(gradients)
    if settings.output == "scaled":
        return features, memory.total, memory
    summed = gradients.sum(dim=0)
    total = SLOW * memory.total + (1 - SLOW) * summed
    total_second = SECOND * memory.total_second + (1 - SECOND) * summed.square()
    direction = (total / (1 - SLOW**count)) / (_root(total_second / (1 - SECOND**count)) + EPS)
    return features, direction, memory._replace(total=total, total_second=total_second)


def _root(value: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, not infinite (a coordinate that never had a gradient)."""
    return value.clamp_min(torch.finfo(value.dtype).tiny).sqrt()


def _log_sign(gradients: Tensor) -> Tensor:
    size = gradients.abs()
    large = size >= math.exp(-LOG_SIGN_P)
    logarithm = size.clamp_min(math.exp(-LOG_SIGN_P)).log() / LOG_SIGN_P
    minus_one = torch.full_like(logarithm, -1.0)
    return torch.stack(
        (
            torch.where(large, logarithm, minus_one),
            torch.where(large, gradients.sign(), gradients * math.exp(LOG_SIGN_P)),
        )
    )
