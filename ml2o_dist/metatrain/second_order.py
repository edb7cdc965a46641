"""The exact meta-gradient: autograd through the whole episode, stretch by stretch.

Shapes: K steps, P instances, m objectives, n parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.metatrain.metagradient import meta_loss_kind, step_losses, step_weights
from ml2o_dist.metatrain.recorder import TrajectoryRecorder
from ml2o_dist.problems.base import Problem, autograd_jacobian
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule, ML2OState, StackedWeights, even_blocks

COLUMNS = 2016
"""Of a block on a CPU under autograd: as the weights in the wheel were trained with, whose bits depend on it (the
rule's own blocks are 1.3 to 1.6 times as fast there, for weights to come)."""

STEPS = 400
"""Of the longest stretch, whose graph is in memory at once: 2 GB at n = 11,000, H = 8, m = 2, batch 32."""


def exact(
    network: ML2ONetwork,
    problem: Problem,
    start: Tensor,
    batches: Sequence[object],
    settings: EstimatorSettings,
    recorder: TrajectoryRecorder | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Second-order meta-gradient: autograd through the whole episode, the task's own gradients included.

    Costs about 1.5 to 3 times replay's time and the memory of a stretch's graph: for small problems, where it is free
    of replay's bias. An episode of more than `STEPS` steps is cut into even stretches. All but the last are gone
    through twice: forwards for where they begin, then, the last one first, for their graphs. Takes `start` [P, n] and
    the K + 1 batches of the episode; gamma, unroll and coordinate subsampling, which are biases or variances of replay,
    do not apply. The weighting of steps does.

    Returns:
        L, its gradient in the order of `network.parameters()`, and the losses [K+1, P, m].
    """
    kind, horizon = meta_loss_kind(settings, problem), len(batches) - 1
    first = problem.losses(start, batches[0]).detach()
    by_step = torch.cat([first.new_zeros(1), step_weights(settings.step_weights, horizon, first)])
    with torch.enable_grad():
        attached = network.stacked_weights()
    weights = attached.detach()
    controls = [network.control] if network.settings.output == "controlled" else []
    inputs = [*(tensor.requires_grad_(True) for tensor in weights.tensors()), *controls]
    episode = _Episode(network, weights, problem, batches)
    *earlier, last = even_blocks(horizon, STEPS)
    begins = [episode.begin(start)]
    for part in earlier:
        begins.append(episode.go(part, begins[-1], recorder)[1].leaves())

    loss, gradients = first.new_zeros(()), [torch.zeros_like(each) for each in inputs]
    adjoints: list[Tensor] = []  # of where a stretch ends
    seen: list[Tensor] = []
    for part in (last, *reversed(earlier)):
        begin = begins.pop()
        losses, end = episode.go(part, begin, recorder if part is last else None)
        with torch.enable_grad():
            each = step_losses(kind, losses, first, problem.minima)
            value = (by_step[part.start : part.start + len(losses), None] * each).sum(dim=0).mean()
            later = sum((adjoint * tensor).sum() for adjoint, tensor in zip(adjoints, end.tensors(), strict=False))
        carried = begin.tensors() if begins else []
        found = torch.autograd.grad(value + later, [*inputs, *carried], materialize_grads=True)
        for gradient, one in zip(gradients, found, strict=False):
            gradient += one
        adjoints = list(found[len(inputs) :])
        loss = loss + value.detach()
        seen.insert(0, losses.detach())
        del losses, end, each, value, later  # what is left of the graph, before the next one is there
    by_parameters = torch.autograd.grad([*attached.tensors(), *controls], list(network.parameters()), gradients)
    return loss, list(by_parameters), torch.cat(seen)


@dataclass(frozen=True)
class _Place:
    """Where a stretch begins or ends."""

    point: Tensor
    state: ML2OState

    def tensors(self) -> list[Tensor]:
        return [self.point, *self.state.tensors()]

    def leaves(self) -> _Place:
        """Return it without its history, to be differentiated in."""
        point, *state = (tensor.detach().requires_grad_(True) for tensor in self.tensors())
        return _Place(point, self.state.with_tensors(state))


@dataclass(frozen=True)
class _Episode:
    network: ML2ONetwork
    weights: StackedWeights
    problem: Problem
    batches: Sequence[object]

    def begin(self, start: Tensor) -> _Place:
        state = ML2ORule(self.network).initial_state(len(start), self.problem.objectives, self.problem.layout)
        if start.device.type == "cpu":
            blocks = self.network.initial_blocks(self.problem.objectives, start.numel(), columns=COLUMNS)
            state = replace(state, blocks=blocks)
        return _Place(start.detach().requires_grad_(True), state)

    @torch.enable_grad()
    def go(self, part: slice, begin: _Place, recorder: TrajectoryRecorder | None) -> tuple[Tensor, _Place]:
        """Return the losses [k, P, m] where its steps begin, and behind the last step those at z_K; and its end."""
        point, state = begin.point, begin.state
        seen = []
        for batch in self.batches[part]:
            jacobian, losses = autograd_jacobian(self.problem.losses, point, batch, create_graph=True)
            seen.append(losses)
            update, state = self.network.advance(jacobian, state, self.weights)
            before, point = point, self.problem.project(point + update)
            if recorder is not None:
                recorder.add(jacobian, losses, before, point)
        if part.stop == len(self.batches) - 1:
            seen.append(self.problem.losses(point, self.batches[-1]))
        return torch.stack(seen), _Place(point, state)
