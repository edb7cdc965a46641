"""From what a rollout saw to the gradient of the meta-loss in the network's weights.

The meta-loss of an episode is L = (1/P) sum_p sum_{t=1..K} w_t l_t(z_t) / sum_t w_t, taken on the batch of step t,
whose gradient the rollout has computed anyway. Shapes: K steps, P instances, m objectives, S chosen coordinates of
the n of each instance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.errors import UserError
from ml2o_dist.problems.base import Problem
from ml2o_dist.rules.coordinatewise import features
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, even_blocks
from ml2o_dist.rules.coordinatewise.unrolled import Unrolled

FLOOR = 1e-8
"""Added inside logarithms, so that an objective that reaches its minimum exactly gives a finite meta-loss."""

REPLAY_BLOCK = 32256
"""Columns (coordinates times objectives) times H replayed at a time: bounds the memory, which is K times a block's
states, and keeps a step in the cache (measured: a half takes a tenth to a third longer, the double is alike; no power
of two, see `ml2o.BLOCK`)."""

GPU_REPLAY = 2**22
"""On a GPU, columns times steps: every block costs thirty kernel launches a step, every column 0.5 kB a step."""


@dataclass(frozen=True)
class Rollout:
    """What replay needs: losses [K+1, P, m] and the chosen coordinates' gradients [K+1, P, m, S] at z_0 .. z_K; each
    instance's agreement at z_0 .. z_{K-1} and its bounded total, [K, P] each; and which of its steps were the network's
    own, [K, P]: all of them but those that a guard rejected. `unit` [P] is the power of two that the network saw the
    gradients multiplied by.

    `scale` = n / S makes the sum over a random subset an unbiased estimate of the sum over all coordinates.
    """

    losses: Tensor
    gradients: Tensor
    agreement: Tensor
    total: Tensor
    accepted: Tensor
    unit: Tensor
    scale: float


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


def replay(
    network: ML2ONetwork, rollout: Rollout, settings: EstimatorSettings, kind: str, unroll: int, minima: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """First-order meta-gradient by replay (ours): dL/dtheta = sum_s <a_s, du_s/dtheta>.

    With its inputs detached, the only way from theta to the loss is through the updates u_s, and z_t = z_0 + sum_{s<t}
    u_s; hence a_s = sum_{t > s} gamma^(t-s-1) w_t grad l_t, a reverse cumulative sum of gradients that the rollout has
    seen. One pass of the LSTMs over the sequence and one back through it give all of it (`Unrolled`); the task is never
    differentiated twice. gamma = 1 is first-order back-propagation through time over the whole episode (of the
    steps as proposed: where a problem projects onto its box, replay does not see that; `exact` does). A step that a
    guard rejected was not the network's: a_s = 0.

    Args:
        unroll: LSTM back-propagation is cut every so many steps, states carried (0: never).

    Returns:
        L as a scalar, and its gradient in the order of `network.parameters()`.
    """
    horizon = rollout.losses.shape[0] - 1
    weights = step_weights(settings.step_weights, horizon, rollout.losses)
    chunk = unroll or horizon
    loss = episode_loss(kind, weights, rollout.losses, minima)
    answers = _answers(rollout, weights, kind, minima, settings.gamma, chunk if settings.truncated else horizon)
    answers *= rollout.accepted.repeat_interleave(rollout.gradients.shape[3], dim=1)
    gradients = (rollout.gradients[:-1] * rollout.unit[:, None, None]).transpose(1, 2).flatten(start_dim=2)
    agreement, totals = (
        each.repeat_interleave(rollout.gradients.shape[3], dim=1) for each in (rollout.agreement, rollout.total)
    )
    counts = torch.arange(1, horizon + 1, device=agreement.device, dtype=agreement.dtype)[:, None]
    controls = [network.control] if network.settings.output == "controlled" else []
    by_controls = [torch.zeros_like(control) for control in controls]
    with torch.enable_grad():
        stacked = network.stacked_weights()
    on_cpu = gradients.device.type == "cpu"
    columns = REPLAY_BLOCK // network.settings.hidden if on_cpu else GPU_REPLAY // chunk
    blocks = even_blocks(gradients.shape[2], columns // gradients.shape[1])
    unrolled = Unrolled(stacked.detach(), network.settings, gradients.shape[1], chunk, blocks[0].stop)
    for block in blocks:
        inputs, directions = features.sequence(network.settings, gradients[:, :, block], agreement[:, block])
        for start in range(0, horizon, chunk):
            part = slice(start, start + chunk)
            outputs = unrolled.forward(inputs[part], restart=start == 0).requires_grad_(True)
            with torch.enable_grad():
                shift = network.shift(totals[part, block], counts[part])
                update = network.step_update(inputs[part], outputs, directions[part], shift)
                value = (update * answers[part, block]).sum() * rollout.scale
            by_outputs, *by_each = torch.autograd.grad(value, [outputs, *controls])
            unrolled.backward(by_outputs)
            for sum_, gradient in zip(by_controls, by_each, strict=True):
                sum_ += gradient
    sums = [*unrolled.gradients.tensors(), *by_controls]
    return loss, list(torch.autograd.grad([*stacked.tensors(), *controls], list(network.parameters()), sums))


def _answers(rollout: Rollout, weights: Tensor, kind: str, minima: Tensor | None, gamma: float, chunk: int) -> Tensor:
    """Return a_s for s = 0 .. K-1, [K, P * S]: the discounted sum of later loss gradients within each chunk."""
    with torch.enable_grad():
        losses = rollout.losses.detach().requires_grad_(True)
        (per_loss,) = torch.autograd.grad(episode_loss(kind, weights, losses, minima), losses)
    horizon = len(weights)
    gradients = torch.einsum("tpm,tpms->tps", per_loss[1:], rollout.gradients[1:])
    answers = torch.empty_like(gradients)
    running = torch.zeros_like(gradients[0])
    for s in range(horizon - 1, -1, -1):
        if (s + 1) % chunk == 0:
            running = torch.zeros_like(running)
        running = gamma * running + gradients[s]
        answers[s] = running
    return answers.flatten(start_dim=1)
