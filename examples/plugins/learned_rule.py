"""A learned rule of one's own: momentum whose step size is learned for each kind of tensor.

    ml2o meta-train --plugin examples/plugins/learned_rule.py --set rule.kind=by-kind

For a tensor p of kind k, with M_p the running average of its summed gradient and d = sigmoid(`decay`):

    M_p <- d M_p + (1 - d) sum_i g_i,    u_p = -exp(size_k + progress * log(F / F_0)) M_p / |M_p|_rms

with F the sum of the losses and F_0 that of the first step.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ml2o_dist import LearnedRule, LearnedRuleSettings, ParameterLayout, register_rule
from ml2o_dist.problems.layout import KINDS


class ByKindSettings(LearnedRuleSettings):
    """What can be set: `--set rule.lr=0.05`."""

    kind: Literal["by-kind"] = "by-kind"
    lr: float = Field(0.02, gt=0, description="length of the first steps, root mean square")


class Sizes(nn.Module):
    """The meta-parameters."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.full((len(KINDS),), math.log(lr)))
        self.progress = nn.Parameter(torch.tensor(0.1))
        self.decay = nn.Parameter(torch.tensor(2.0))


@register_rule(ByKindSettings)
class ByKind(LearnedRule):
    """Its state is a dictionary of tensors, and the layout in numbers: which tensor a parameter is of, which kind."""

    @staticmethod
    def make_network(settings: ByKindSettings) -> Sizes:
        return Sizes(settings.lr)

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> dict[str, Tensor]:
        like, sizes = self.network.size, torch.tensor([tensor.size for tensor in layout.tensors])
        kinds = torch.tensor([KINDS.index(tensor.kind) for tensor in layout.tensors])
        return {
            "momentum": like.new_zeros(instances, layout.dimension),
            "first": like.new_zeros(instances),
            "tensor": torch.arange(len(sizes)).repeat_interleave(sizes).to(like.device),
            "kind": kinds.repeat_interleave(sizes).to(like.device),
        }

    def advance(self, gradients: Tensor, losses: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        decay, total = torch.sigmoid(self.network.decay), losses.sum(dim=1).abs().clamp_min(1e-12)
        first = torch.where(state["first"] > 0, state["first"], total)
        momentum = decay * state["momentum"] + (1 - decay) * gradients.sum(dim=1)
        place = state["tensor"].expand_as(momentum)
        squares = torch.zeros_like(momentum).scatter_add(1, place, momentum.square()).gather(1, place)
        counts = torch.bincount(state["tensor"])[state["tensor"]]
        scale = torch.where(squares > 0, (squares / counts).clamp_min(1e-30).rsqrt(), 0.0)
        size = self.network.size[state["kind"]] + self.network.progress * (total / first).log()[:, None]
        return -size.exp() * momentum * scale, {**state, "momentum": momentum, "first": first}

    def grown(self, state: dict[str, Tensor], more: ParameterLayout) -> dict[str, Tensor]:
        new = self.initial_state(len(state["first"]), 1, more)
        return {
            "momentum": torch.cat([state["momentum"], new["momentum"]], dim=1),
            "first": state["first"],
            "tensor": torch.cat([state["tensor"], new["tensor"] + state["tensor"].max() + 1]),
            "kind": torch.cat([state["kind"], new["kind"]]),
        }
