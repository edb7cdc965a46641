"""Gradient preprocessing: the features of each coordinate's gradients that the network sees.

`advance` is elementwise in the coordinates, so that the same code serves a rollout over all coordinates and the replay
of a chosen few. R counts coordinates (P * n of them); gradients are [m, R], features [c, m, R]. The alignment needs all
coordinates of an instance; the rollout computes it once, and both use it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ml2o_dist.config import RuleSettings

SLOW, FAST, SECOND = 0.9, 0.5, 0.999
"""Decay rates of the two momenta (Adam's beta_1, ours) and of the squared gradient (Adam's beta_2)."""

MOST = 4.0
"""Most that one step adds to the averages, in units of its promise; never reached on five networks."""

NEGLIGIBLE = 1e-20
"""A gradient's norm, in the unit that the rule gives it, below which its step is not judged: 1 / g overflows."""

LOG_SIGN_P = 10.0
"""p of Andrychowicz et al. 2016, appendix A."""

CHANNELS = {"adam": 3, "alignment": 4, "log_sign": 2}


class Memory(NamedTuple):
    """Running averages at two time scales and of the square, each [q, R], of the rows that `_tracked` names."""

    slow: Tensor
    fast: Tensor
    second: Tensor


def initial_memory(settings: RuleSettings, like: Tensor) -> Memory:
    """Return zero averages for gradients shaped `like` [m, R]."""
    zero = torch.zeros_like(_tracked(settings, like))
    return Memory(zero, zero, zero)


class Alignment(NamedTuple):
    """How much of the decrease that the last steps promised remains at their end points, for each instance.

    Attributes:
        value: r in [-1, 1], [P]. Near 1: the steps are short compared with the distance over which the gradient
            changes. About 0: they end where the gradient along them vanishes. Below 0: they overshoot. It is 0 before
            the second step.
        total: sum of all values so far, [P].
        kept, promised: running averages of <g_t, u_{t-1}> and <g_{t-1}, u_{t-1}>, [P], each over |g_{t-1}| |u_{t-1}|;
            value = kept / promised.
        update, promise: u / (|g| |u|) [P, n] of the last update u and the gradient g that it was made from, and the
            cosine of both [P]; 0 where nothing moved.
    """

    value: Tensor
    total: Tensor
    kept: Tensor
    promised: Tensor
    update: Tensor
    promise: Tensor


def initial_alignment(like: Tensor) -> Alignment:
    """Return the alignment before the first step, for updates shaped `like` [P, n]."""
    zero = torch.zeros_like(like[:, 0])
    return Alignment(zero, zero, zero, zero, torch.zeros_like(like), zero)


def judge(alignment: Alignment, gradient: Tensor, pace: Tensor | float = 0.0) -> Alignment:
    """Update the alignment with the gradient of the summed objectives [P, n] after the last update (ours).

    Hypergradient descent (Baydin et al. 2018) adapts a learning rate by the sign of <g_t, u_{t-1}>. Divided by the
    step's promise, this product means the same for every network, scale and loss (measured on an MLP, a CNN and a
    LeNet: about 0.4 at a third of the best Adam step, 0.2 at the best, below 0 at three times the best).

    The averages must fade faster than the controller that reads them changes the steps: otherwise old steps, which were
    longer, outweigh the new ones for good. Therefore the averages are over directions, scaled by the gradient that each
    step was made from; one step adds at most `MOST` times its promise; and older terms also fade by exp(-`pace`). The
    value is 0 where nothing moved, since such a step gives no information.

    Args:
        pace: [P] or a number, the last change of the log step size.
    """
    keep = SLOW * torch.exp(-torch.as_tensor(pace).to(gradient))
    most = MOST * alignment.promise.abs()
    kept = (gradient * alignment.update).sum(dim=1).clamp(-most, most)
    # Averages outside their bounds come from a state of an older version, or from a damaged one.
    kept = keep * alignment.kept.clamp(-MOST, MOST) + (1 - keep) * kept
    promised = keep * alignment.promised.clamp(-1, 1) + (1 - keep) * alignment.promise
    descends = (promised < 0) & (alignment.promise != 0)
    ratio = kept / torch.where(descends, promised, torch.ones_like(promised))
    value = torch.where(descends, ratio.clamp(-1, 1), torch.zeros_like(ratio))
    return alignment._replace(value=value, total=alignment.total + value, kept=kept, promised=promised)


def remember(alignment: Alignment, gradient: Tensor, update: Tensor) -> Alignment:
    """Store the update [P, n] made from the summed gradient [P, n], to be judged at the next step."""
    direction, _ = _direction_and_norm(update)
    slope, size = _direction_and_norm(gradient)
    judged = size > NEGLIGIBLE
    return alignment._replace(
        update=torch.where(judged, direction / torch.where(judged, size, 1.0), 0.0),
        promise=torch.where(judged[:, 0], (slope * direction).sum(dim=1), 0.0),
    )


def _direction_and_norm(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return v / |v| [P, n], 0 where v is 0, and |v| [P, 1]; no square under- or overflows."""
    largest = values.detach().abs().amax(dim=1, keepdim=True)
    present = largest > 0
    scaled = values / torch.where(present, largest, 1.0)
    length = torch.linalg.vector_norm(torch.where(present, scaled, 1.0), dim=1, keepdim=True)
    return scaled / length, torch.where(present, largest * length, 0.0)


def advance(
    settings: RuleSettings, gradients: Tensor, memory: Memory, step: int, alignment: Tensor
) -> tuple[Tensor, Tensor, Memory]:
    """Process the gradients [m, R] of step number `step` (from 0), with each coordinate's instance's alignment [R].

    Returns:
        features [c, m, R]; Adam's direction for the summed gradient [R] (zeros for the `scaled` output, which does
        not use it); the memory after this step. Differentiable in the gradients.

    `adam`: g / sqrt(v), and m / sqrt(v) for momenta with decay 0.9 and 0.5, all bias-corrected (after RNNprop,
    Lv et al. 2017; the second time scale is ours). `log_sign`: (log|g| / p, sign g) where |g| >= e^-p, else
    (-1, e^p g) (Andrychowicz et al. 2016). `alignment`: those of `adam` and the alignment of the instance.
    """
    tracked, count = _tracked(settings, gradients), step + 1
    after = Memory(
        torch.lerp(memory.slow, tracked, 1 - SLOW),
        torch.lerp(memory.fast, tracked, 1 - FAST),
        torch.addcmul(SECOND * memory.second, tracked, tracked, value=1 - SECOND),
    )
    decays = (SLOW, FAST, SECOND)
    averages = Memory(*(value / (1 - decay**count) for value, decay in zip(after, decays, strict=True)))
    return *_seen(settings, gradients, averages, alignment), after


def sequence(settings: RuleSettings, gradients: Tensor, alignment: Tensor) -> tuple[Tensor, Tensor]:
    """Return what K calls of `advance` return, features [K, c, m, R] and directions [K, R], all at once.

    Takes gradients [K, m, R] and alignment [K, R]. A running average over all steps is one product with a triangular
    [K, K] matrix.
    """
    tracked = _tracked(settings, gradients)
    averages = Memory(_averaged(tracked, SLOW), _averaged(tracked, FAST), _averaged(tracked.square(), SECOND))
    return _seen(settings, gradients, averages, alignment)


def presence(seen: Tensor) -> Tensor:
    """Return which coordinates have a gradient, boolean [..., R], from the features [..., c, m, R] (ours).

    An LSTM's output at features of 0 is not 0: without this mask, masked weights and embedding rows that no sample
    uses would keep moving. A coordinate has a gradient if its momentum is not 0 for some objective. `log_sign` has no
    momentum; there the gradient itself counts.
    """
    return seen[..., 1, :, :].ne(0).any(dim=-2)  # channel 1: m / sqrt(v), or the sign


def _tracked(settings: RuleSettings, gradients: Tensor) -> Tensor:
    """Return the rows [..., q, R] whose averages the features of gradients [..., m, R] or the direction need.

    These are the objectives' rows for `adam` and `alignment`, then their sum for every output except `scaled`.
    """
    own = gradients if settings.features != "log_sign" else gradients[..., :0, :]
    if settings.output == "scaled":
        return own
    return torch.cat((own, gradients.sum(dim=-2, keepdim=True)), dim=-2)


def _averaged(values: Tensor, decay: float) -> Tensor:
    """Return the bias-corrected running averages of `values` [K, ...] with `decay`."""
    steps = torch.arange(len(values), dtype=torch.float64)  # 1 - 0.999 in float32 would be wrong by 1e-4
    shares = ((1 - decay) * decay ** (steps[:, None] - steps)).tril() / (1 - decay ** (steps[:, None] + 1))
    return (shares.to(values) @ values.flatten(start_dim=1)).view_as(values)


def _seen(settings: RuleSettings, gradients: Tensor, averages: Memory, alignment: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [..., c, m, R] and direction [..., R] from bias-corrected averages of the tracked rows."""
    objectives, inverse = gradients.shape[-2], _inverse_root(averages.second)
    if settings.features == "log_sign":
        channels = _log_sign(gradients)
    else:
        own = inverse[..., :objectives, :]
        momenta = averages.slow[..., :objectives, :], averages.fast[..., :objectives, :]
        channels = [gradients * own, *(momentum * own for momentum in momenta)]
    if settings.features == "alignment":
        channels.append(alignment.unsqueeze(-2).expand_as(gradients))
    features = torch.stack(channels, dim=-3)
    if settings.output == "scaled":
        return features, torch.zeros_like(gradients[..., 0, :])
    return features, averages.slow[..., -1, :] * inverse[..., -1, :]


def _inverse_root(value: Tensor) -> Tensor:
    """Return 1 / sqrt(value), and 0 with derivative 0 where it is 0: a coordinate that never had a gradient.

    No epsilon is added (Adam adds 1e-8), so that a factor on the gradients changes no feature.
    """
    smallest = torch.finfo(value.dtype).tiny
    return torch.where(value >= smallest, value.clamp_min(smallest).rsqrt(), 0.0)


def _log_sign(gradients: Tensor) -> list[Tensor]:
    size = gradients.abs()
    large = size >= math.exp(-LOG_SIGN_P)
    logarithm = size.clamp_min(math.exp(-LOG_SIGN_P)).log() / LOG_SIGN_P
    minus_one = torch.full_like(logarithm, -1.0)
    return [
        torch.where(large, logarithm, minus_one),
        torch.where(large, gradients.sign(), gradients * math.exp(LOG_SIGN_P)),
    ]
