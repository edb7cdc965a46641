"""The interface of learned rules that meta-training, artifacts, comparisons and torch optimizers use.

A user's own rule is two classes and one decorator (docs/extending.md):

    class MySettings(LearnedRuleSettings):
        kind: Literal["mine"] = "mine"
        hidden: int = 8

    @register_rule(MySettings)
    class MyRule(LearnedRule):
        ...
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from ml2o_dist.config import RULE_SETTINGS, RULES, LearnedRuleSettings
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule
from ml2o_dist.runtime.seeding import derive_seed

Weights = Mapping[str, Tensor]
"""Meta-parameters by name; floats are float32 on the CPU while they are sent between processes."""


@dataclass(frozen=True)
class Rollout:
    """The data of a rollout of K steps that the replay of S of each instance's n parameters needs.

    Attributes:
        losses: [K+1, P, m], at z_0 .. z_K.
        gradients: [K+1, P, m, S] of the chosen parameters at z_0 .. z_K.
        record: further values that the rule stores for each step, [K, P, ...] each (`LearnedRule.record`).
        accepted: [K, P], 1 where the rule's own step was taken, 0 where a guard rejected it.
        scale: n / S, which makes a sum over a random subset an unbiased estimate of the sum over all.
        layout: the layout of all n parameters.
    """

    losses: Tensor
    gradients: Tensor
    record: dict[str, Tensor]
    accepted: Tensor
    scale: float
    layout: ParameterLayout


class LearnedRule(UpdateRule):
    """A rule with meta-parameters: z_{k+1} = z_k + u_k, u_k = g_theta(gradients, losses, state).

    A subclass defines `make_network`, `initial_state` and `advance`; the estimators `exact`, `es` and `replay`,
    checkpoints, artifacts, evaluation and the torch optimizers need nothing else. The state is a pytree: tensors in
    tuples, named tuples, lists or dictionaries. It may also hold plain numbers, which carry no gradient.

    Attributes:
        network: holds the meta-parameters.
        separable: whether a parameter's update depends on its own gradients and on the `record` alone, so that some
            of the parameters can be replayed without the others (`estimator.coordinates` below 1).
    """

    separable: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @staticmethod
    @abstractmethod
    def make_network(settings: Any) -> nn.Module:
        """Return the network before any meta-training. Random numbers of torch are seeded while it is made."""

    @abstractmethod
    def advance(self, gradients: Tensor, losses: Tensor, state: State) -> tuple[Tensor, State]:
        """Map gradients [P, m, n] and losses [P, m] to the update [P, n] and the next state.

        Differentiable in the gradients, the losses, the state and the meta-parameters.
        """

    @property
    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """The meta-parameters theta by name."""
        return dict(self.network.named_parameters())

    def attached(self) -> Self:
        """Return the rule for use under autograd; override it if the meta-parameters must be prepared differently."""
        return self

    def check_objectives(self, objectives: int) -> None:
        """Raise UserError if the rule was made for another number of objectives; by default it takes any number."""

    def record(self, state: State, update: Tensor) -> dict[str, Tensor]:
        """Return what `replay` needs of a step besides gradients and losses, [P, ...] each.

        Args:
            state: after the step.
            update: how the parameters really moved, [P, n].
        """
        return {"update": update}

    def replay(self, rollout: Rollout, adjoints: Tensor, chunk: int) -> dict[str, Tensor]:
        """Return sum_s <a_s, du_s / dtheta> by meta-parameter, with the inputs of all steps taken as constants.

        The default is first-order back-propagation through time, by `advance` alone. A rule may override it with a
        faster method.

        Args:
            adjoints: a_s [K, P, S], already 0 where a step was not the rule's own.
            chunk: number of steps after which the graph is cut; states are carried over.
        """
        theta = self.meta_parameters
        sums = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
        steps, instances, objectives = len(adjoints), *rollout.losses.shape[1:]
        state = self.attached().initial_state(instances, objectives, rollout.layout)
        for start in range(0, steps, chunk):
            rule, value = self.attached(), rollout.losses.new_zeros(())
            with torch.enable_grad():
                for step in range(start, min(start + chunk, steps)):
                    seen = StepInfo(rollout.losses[step], rollout.gradients[step], None)
                    update, state = rule.advance(seen.jacobian, seen.losses, state)
                    value = value + (update * adjoints[step]).sum() * rollout.scale
                    rejected = rollout.accepted[step] == 0
                    if bool(rejected.any()):
                        state = rule.overruled(state, seen, rollout.record["update"][step], rejected)
            found = torch.autograd.grad(value, list(theta.values()), materialize_grads=True, allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient
            state = detached(state)
        return sums

    @torch.no_grad()
    def propose(self, oracle: Oracle, parameters: Tensor, state: State, seen: StepInfo) -> tuple[Tensor, State]:
        """Return the parameters moved by the update and projected onto the problem's box, and the next state."""
        update, state = self.advance(seen.jacobian, seen.losses, state)
        return oracle.problem.project(parameters + update), state

    @torch.no_grad()
    def update(self, gradients: Tensor, state: State, losses: Tensor | None = None) -> tuple[Tensor, State]:
        """Return what `advance` returns, without a graph; losses that are not given count as 1."""
        seen = gradients.new_ones(gradients.shape[:2]) if losses is None else losses
        return self.advance(gradients, seen, state)

    @classmethod
    def from_weights(
        cls,
        settings: LearnedRuleSettings,
        weights: Weights | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build the rule with these meta-parameters; None: those before any meta-training (`initial`)."""
        network = cls._network(settings)
        if weights is not None:
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(weights[name])
        return cls(network.to(device=device, dtype=dtype))

    @classmethod
    def shapes(cls, settings: LearnedRuleSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the meta-parameters by name, without allocating them."""
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in cls._network(settings).named_parameters()}

    @classmethod
    def _network(cls, settings: LearnedRuleSettings) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(f"initial weights of {settings.kind}"))
            return cls.make_network(settings)


Class = TypeVar("Class", bound=type[LearnedRule])


def register_rule(settings: type[LearnedRuleSettings]) -> Callable[[Class], Class]:
    """Register a learned rule under the `kind` of its settings (a class decorator).

    Raises:
        UserError: the settings have no `kind: Literal["NAME"] = "NAME"`, or the name is taken.
    """

    def register(rule: Class) -> Class:
        kind = settings.own_kind()
        RULES.register(kind)(rule)
        RULE_SETTINGS[kind] = settings
        return rule

    return register


def learned_rule(
    settings: LearnedRuleSettings,
    weights: Weights | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LearnedRule:
    """Build the rule that the settings describe; raises UserError for an unknown kind."""
    kind: type[LearnedRule] = RULES[settings.kind]
    return kind.from_weights(settings, weights, device, dtype)


def initial_weights(settings: LearnedRuleSettings) -> dict[str, Tensor]:
    """Return the meta-parameters before any meta-training, by name, in the rule's order."""
    return {name: tensor.detach().clone() for name, tensor in learned_rule(settings).meta_parameters.items()}


def detached(state: State) -> State:
    """Return the state with all its tensors detached from their graph."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, state)
