"""The input of an estimator, its output, and its registration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.config import ESTIMATORS, EstimatorSettings, GuardSettings
from ml2o_dist.metatrain.meta_loss import meta_loss_kind
from ml2o_dist.metatrain.recorder import TrajectoryRecorder
from ml2o_dist.problems.base import Problem
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.guarded import GuardedInfo, GuardedRule, guarded
from ml2o_dist.rules.learned import LearnedRule, Rollout
from ml2o_dist.runtime.seeding import generator


@dataclass(frozen=True)
class Episode:
    """An optimization of P instances for K steps that has not begun yet.

    Attributes:
        rule: the learned rule, without its guard.
        guard: the guard's settings, if there is one.
        start: starting points [P, n].
        horizon: K.
        unroll: the graph of a replay is cut after every so many steps; 0: never.
        seed: names all randomness.
        recorder: records the steps of the first rollout, if the trajectory is wanted.
    """

    rule: LearnedRule
    guard: GuardSettings | None
    problem: Problem
    start: Tensor
    horizon: int
    settings: EstimatorSettings
    unroll: int
    seed: int
    recorder: TrajectoryRecorder | None = None

    @property
    def meta_loss(self) -> str:
        """The kind of meta-loss: the estimator's setting with `auto` resolved."""
        return meta_loss_kind(self.settings, self.problem)

    def oracle(self) -> Oracle:
        """Return a new oracle for this episode; every oracle draws the same batches."""
        return Oracle(self.problem, generator("batches", self.seed))

    def roll_out(self, rule: LearnedRule, chosen: Tensor | None, recorder: TrajectoryRecorder | None) -> Rollout:
        """Run the episode with `rule`, under the guard if there is one; see `roll_out`."""
        return roll_out(guarded(rule, self.guard), self.oracle(), self.start, self.horizon, chosen, recorder)


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Attributes:
        meta_loss: L, a scalar.
        gradient: dL / dtheta by meta-parameter.
        losses: [K+1, P, m].
        episodes: how many episodes of K steps were run.
    """

    meta_loss: Tensor
    gradient: dict[str, Tensor]
    losses: Tensor
    episodes: int = 1


Estimator = Callable[[Episode], Estimate]


def register_estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Register a function `(Episode) -> Estimate` under a name for `estimator.kind` (a decorator)."""
    return ESTIMATORS.register(name)


@torch.no_grad()
def roll_out(
    rule: UpdateRule,
    oracle: Oracle,
    start: Tensor,
    horizon: int,
    chosen: Tensor | None,
    recorder: TrajectoryRecorder | None = None,
) -> Rollout:
    """Take `horizon` steps from `start` [P, n] without an autograd graph, storing what replay needs.

    Args:
        rule: a learned rule, or `GML2O` around one.
        chosen: indices [P, S] of the parameters whose gradients are kept, drawn before the rollout; None: keep none.
    """
    instances, dimension = start.shape
    objectives, layout = oracle.problem.objectives, oracle.problem.layout
    index = start.new_zeros((instances, 0), dtype=torch.long) if chosen is None else chosen
    losses = start.new_empty((horizon + 1, instances, objectives))
    gradients = start.new_empty((horizon + 1, instances, objectives, index.shape[1]))
    accepted = start.new_ones((horizon, instances))
    everywhere = index[:, None].expand(-1, objectives, -1)
    own = rule.learned if isinstance(rule, GuardedRule) else rule
    records: list[dict[str, Tensor]] = []
    parameters, state = start, rule.initial_state(instances, objectives, layout)
    for step in range(horizon):
        before = parameters
        parameters, state, info = rule.step(oracle, before, state)
        if recorder is not None:
            recorder.add(info.jacobian, info.losses, before, parameters)
        learned = state
        if isinstance(info, GuardedInfo):
            learned, accepted[step] = state.learned, info.accepted
        losses[step] = info.losses
        if chosen is not None:
            assert isinstance(own, LearnedRule)
            records.append(own.record(learned, parameters - before))
            torch.gather(info.jacobian, 2, everywhere, out=gradients[step])
    if chosen is None:
        losses[horizon] = oracle.losses(parameters, oracle.draw())
    else:
        jacobian, losses[horizon] = oracle.jacobian(parameters, oracle.draw())
        torch.gather(jacobian, 2, everywhere, out=gradients[horizon])
    record = {name: torch.stack([each[name] for each in records]) for name in records[0]} if records else {}
    return Rollout(losses, gradients, record, accepted, dimension / max(1, index.shape[1]), layout)
