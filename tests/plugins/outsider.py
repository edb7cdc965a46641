"""What an outsider writes, in one file: a problem, a learned rule, an optimizer and a comparator."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ml2o_dist import (
    Ingredients,
    LearnedRule,
    LearnedRuleSettings,
    Merged,
    ModuleProblem,
    ParameterLayout,
    Problem,
    ProblemContext,
    register_comparator,
    register_optimizer,
    register_problem,
    register_rule,
)

FACTOR = 1.0
"""Of the losses: a line that the tests change."""


@register_problem("curves")
def curves(context: ProblemContext, *, hidden: int = 4) -> Problem:
    """Two curves of one variable, by squared error."""
    x = torch.linspace(-2, 2, 64).unsqueeze(1)
    y = torch.cat([x.sin(), x.square() / 4], dim=1)

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        return [FACTOR * each for each in (model(x) - y).square().unbind(1)]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 2))

    return ModuleProblem(context, make, losses, (x, y), test=(x, y), batch=16, positive=True)


class SignSettings(LearnedRuleSettings):
    """Nothing but the kind."""

    kind: Literal["sign"] = "sign"


@register_rule(SignSettings)
class Sign(LearnedRule):
    """u = -exp(size) tanh(g / |g|_rms): a smooth sign of the summed gradient; the size is learned."""

    @staticmethod
    def make_network(settings: SignSettings) -> nn.Module:
        return nn.ParameterDict({"size": nn.Parameter(torch.tensor(math.log(0.02)))})

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> tuple[()]:
        return ()

    def advance(self, gradients: Tensor, losses: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        total = gradients.sum(dim=1)
        scale = total.square().mean(dim=1, keepdim=True).clamp_min(1e-20).rsqrt()
        return -self.network["size"].exp() * torch.tanh(total * scale), state


@register_optimizer("rprop")
def rprop(parameters: list[nn.Parameter], lr: float = 0.01) -> torch.optim.Optimizer:
    """By signs."""
    return torch.optim.Rprop(parameters, lr=lr)


@register_comparator("first-expert")
def first_expert(given: Ingredients) -> Merged:
    """The first expert, whatever the preference."""
    return Merged(given.rays[:1], given.experts[:1])
