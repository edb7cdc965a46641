"""Learning rates of parameter groups: a rule whose steps are multiplied elementwise."""

from __future__ import annotations

import torch
from torch import Tensor

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule


def multiplied(rule: UpdateRule, factors: Tensor | None) -> UpdateRule:
    """Return `rule` with its steps times `factors` [1, n], or unchanged for None; the states are those of `rule`."""
    return rule if factors is None else _Multiplied(rule, factors)


class _Multiplied(UpdateRule):
    """z_{k+1} = z_k + factors * u_k; `overruled` passes the rule the step that was really taken."""

    def __init__(self, rule: UpdateRule, factors: Tensor) -> None:
        self._rule, self._factors = rule, factors

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> State:
        return self._rule.initial_state(instances, objectives, layout)

    def propose(self, oracle: Oracle, parameters: Tensor, state: State, seen: StepInfo) -> tuple[Tensor, State]:
        point, state = self._rule.propose(oracle, parameters, state, seen)
        update = torch.where(self._factors == 0, 0.0, self._factors * (point - parameters))
        # A step that is lost in the parameters' rounding still counts as taken: the rule keeps its own.
        told = (update != 0).any(dim=1) | (self._factors == 0).all()
        return parameters + update, self._rule.overruled(state, seen, update, told)

    def overruled(self, state: State, seen: StepInfo, update: Tensor, where: Tensor) -> State:
        return self._rule.overruled(state, seen, update, where)

    def grown(self, state: State, more: ParameterLayout) -> State:
        return self._rule.grown(state, more)
