"""The estimator `exact`: autograd through the whole episode, stretch by stretch.

Shapes: K steps, P instances, m objectives, n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.metatrain.estimators.base import Episode, Estimate, register_estimator
from ml2o_dist.metatrain.meta_loss import meta_loss_kind, step_losses, step_weights
from ml2o_dist.metatrain.recorder import TrajectoryRecorder
from ml2o_dist.problems.base import Problem, autograd_jacobian
from ml2o_dist.rules.base import State
from ml2o_dist.rules.blocks import even_blocks
from ml2o_dist.rules.learned import LearnedRule

STEPS = 400
"""Steps of the longest stretch. Its whole graph is in memory at once: 2 GB at n = 11,000, H = 8, m = 2, batch 32."""


@register_estimator("exact")
def estimate(episode: Episode) -> Estimate:
    """Differentiate the whole episode, on the batches that a rollout draws."""
    oracle = episode.oracle()
    batches = [oracle.draw() for _ in range(episode.horizon + 1)]
    return Estimate(*exact(episode.rule, episode.problem, episode.start, batches, episode.settings, episode.recorder))


def exact(
    rule: LearnedRule,
    problem: Problem,
    start: Tensor,
    batches: Sequence[object],
    settings: EstimatorSettings,
    recorder: TrajectoryRecorder | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Second-order meta-gradient: autograd through the whole episode, the task's own gradients included.

    It has none of replay's bias, but costs about 1.5 to 3 times replay's time and the memory of a stretch's graph, so
    it suits small problems. An episode of more than `STEPS` steps is cut into even stretches. All but the last run
    twice: first forwards to find where each begins, then, from the last to the first, to build their graphs. Takes
    `start` [P, n] and the K + 1 batches of the episode. gamma, unroll and coordinate subsampling add bias or variance
    to replay and do not apply here; the weighting of steps does.

    Returns:
        L, its gradient by meta-parameter, and the losses [K+1, P, m].
    """
    kind, horizon = meta_loss_kind(settings, problem), len(batches) - 1
    run = _Run(rule, problem, batches)
    first = problem.losses(start, batches[0]).detach()
    by_step = torch.cat([first.new_zeros(1), step_weights(settings.step_weights, horizon, first)])
    theta = rule.meta_parameters
    *earlier, last = even_blocks(horizon, STEPS)
    state = rule.attached().initial_state(len(start), problem.objectives, problem.layout)
    begins = [_Place(start.detach().requires_grad_(True), state)]
    for part in earlier:
        begins.append(run.go(part, begins[-1], recorder)[1].leaves())

    loss, gradients = first.new_zeros(()), [torch.zeros_like(each) for each in theta.values()]
    by_end: list[Tensor] = []
    seen: list[Tensor] = []
    for part in (last, *reversed(earlier)):
        begin = begins.pop()
        losses, end = run.go(part, begin, recorder if part is last else None)
        with torch.enable_grad():
            each = step_losses(kind, losses, first, problem.minima)
            value = (by_step[part.start : part.start + len(losses), None] * each).sum(dim=0).mean()
            later = sum((adjoint * tensor).sum() for adjoint, tensor in zip(by_end, end.tensors(), strict=False))
        carried = begin.tensors() if begins else []
        found = torch.autograd.grad(
            value + later, [*theta.values(), *carried], materialize_grads=True, allow_unused=True
        )
        for gradient, one in zip(gradients, found, strict=False):
            gradient += one
        by_end = list(found[len(theta) :])
        loss = loss + value.detach()
        seen.insert(0, losses.detach())
        del losses, end, each, value, later  # free this graph before the next one is built
    return loss, dict(zip(theta, gradients, strict=True)), torch.cat(seen)


@dataclass(frozen=True)
class _Place:
    """Where a stretch begins or ends."""

    point: Tensor
    state: State

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are differentiated."""
        return [each for each in tree_flatten((self.point, self.state))[0] if _differentiable(each)]

    def leaves(self) -> _Place:
        """Return a copy whose tensors are detached leaves that require gradients."""
        values, tree = tree_flatten((self.point, self.state))
        fresh = [each.detach().requires_grad_(True) if _differentiable(each) else each for each in values]
        return _Place(*tree_unflatten(fresh, tree))


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Run:
    rule: LearnedRule
    problem: Problem
    batches: Sequence[object]

    @torch.enable_grad()
    def go(self, part: slice, begin: _Place, recorder: TrajectoryRecorder | None) -> tuple[Tensor, _Place]:
        """Return the losses [k, P, m] at the points where the steps begin (and at z_K after the last), and the end."""
        problem, rule = self.problem, self.rule.attached()
        point, state = begin.point, begin.state
        seen = []
        for batch in self.batches[part]:
            jacobian, losses = autograd_jacobian(problem.losses, point, batch, create_graph=True)
            seen.append(losses)
            update, state = rule.advance(jacobian, losses, state)
            before, point = point, problem.project(point + update)
            if recorder is not None:
                recorder.add(jacobian, losses, before, point)
        if part.stop == len(self.batches) - 1:
            seen.append(problem.losses(point, self.batches[-1]))
        return torch.stack(seen), _Place(point, state)
