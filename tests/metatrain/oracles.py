"""Independent ways to the numbers that the meta-training tests check: plain loops with autograd, no replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ml2o_dist.config import RuleSettings
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule

DOUBLE = torch.float64


def problem_for(objectives: int, instances: int, dimension: int = 5, seed: int = 3) -> Problem:
    """Noisy quadratics: smooth, any number of objectives, losses of every sign."""
    spec = ProblemSpec.of("quadratic", {"m": objectives, "n": dimension, "noise": 0.3, "batch": 4})
    return spec.build(ProblemContext(instances, seed, dtype=DOUBLE))


def random_rule(settings: RuleSettings, seed: int = 0) -> ML2ORule:
    """A float64 rule with random weights everywhere, the last layer included."""
    rule = ML2ORule.from_weights(settings, None, dtype=DOUBLE)
    draws = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.3 * torch.randn(t.shape, dtype=DOUBLE, generator=draws) for name, t in rule.network.state_dict().items()
    }
    return ML2ORule.from_weights(settings, weights, dtype=DOUBLE)


def _over_root(value: Tensor, square: Tensor) -> Tensor:
    """value / sqrt(square), 0 where that is 0 / 0."""
    return torch.where(square > 0, value / torch.where(square > 0, square, torch.ones_like(square)).sqrt(), 0.0)


class WrittenOut:
    """ML2O one coordinate-step at a time with `nn.LSTMCell` and formulas written out: no blocks, no fused sequence."""

    def __init__(self, network: ML2ONetwork) -> None:
        self.network, self.settings = network, network.settings
        self.cells = [_cell(lstm) for lstm in [*network.specific, network.shared]]
        self.states: list[tuple[Tensor, Tensor] | None] = [None] * (len(self.cells))
        self.tied_states: list[tuple[Tensor, Tensor] | None] = []
        self.averages: dict[str, Tensor] = {}
        self.count = 0
        self.last: tuple[Tensor, Tensor] | None = None
        self.kept = self.promised = 0.0
        self.alignment = torch.zeros(1)
        self.total: Tensor | float = 0.0

    def detach(self) -> None:
        self.states = [None if s is None else (s[0].detach(), s[1].detach()) for s in self.states]
        self.tied_states = [None if s is None else (s[0].detach(), s[1].detach()) for s in self.tied_states]

    def update(self, jacobian: Tensor) -> Tensor:
        """Map J [P, m, n] to u [P, n], attached to the network's weights."""
        instances, objectives, dimension = jacobian.shape
        self.count += 1
        rows = [jacobian[:, i].reshape(-1) for i in range(objectives)]
        self._judge(jacobian.sum(dim=1))
        outputs, seen = [], [self._features(i, row) for i, row in enumerate(rows)]
        own = [row.abs() for row in rows]
        if self.settings.features != "log_sign":
            own = [self.averages[f"v{i}"] for i in range(objectives)]
        present = (sum(own) > 0).double()
        if self.settings.objectives == "tied":
            self.tied_states = self.tied_states or [None] * objectives
            for i in range(objectives):
                self.tied_states[i] = self.cells[0](seen[i], self.tied_states[i])
                outputs.append(self.tied_states[i][0])
            pooled = sum(outputs) / objectives
        else:
            for i in range(objectives):
                self.states[i] = self.cells[i](seen[i], self.states[i])
                outputs.append(self.states[i][0])
            pooled = torch.cat(outputs, dim=1)
        self.states[-1] = self.cells[-1](pooled, self.states[-1])
        out = self.network.head(self.states[-1][0])
        if self.settings.output == "scaled":
            update = self.settings.scale * present * out[:, 0]
        else:
            total = sum(rows)
            first = self._average("m", total, 0.9)
            second = self._average("v", total * total, 0.999)
            size, added = out[:, 0], present * out[:, -1]
            self.total = self.total + self.alignment
            if self.settings.output == "controlled":
                grow, decay = self.network.control
                early = self.settings.warmup * 0.9 ** (self.count - 1)
                size = (0.5 * grow * self.total - 0.02 * decay * self.count - early).repeat_interleave(dimension)
            update = -self.settings.lr * torch.exp(size) * (_over_root(first, second) + added)
        update = update.view(instances, dimension)
        self.last = (jacobian.sum(dim=1), update.detach())
        return update

    def _judge(self, total: Tensor) -> None:
        """The averages of <g_t, u_{t-1}> over those of <g_{t-1}, u_{t-1}>, each over |g_{t-1}| |u_{t-1}|.

        They decay by 0.9, and by as much more as the last alignment changed the step's size; one step adds at most four
        times what it promised. 0 where nothing was promised.
        """
        if self.last is None:
            self.alignment = torch.zeros(len(total), dtype=total.dtype)
            return
        gradient, update = self.last
        size = gradient.square().sum(dim=1).sqrt() * update.square().sum(dim=1).sqrt()
        promise = (gradient * update).sum(dim=1) / size
        kept = torch.minimum((total * update).sum(dim=1) / size, 4 * promise.abs())
        kept = torch.maximum(kept, -4 * promise.abs())
        gain = float(self.network.control[0].detach()) / 2 if self.settings.output == "controlled" else 0.0
        decay = 0.9 * torch.exp(-(gain * self.alignment).abs())
        self.kept = decay * self.kept + (1 - decay) * kept
        self.promised = decay * self.promised + (1 - decay) * promise
        values = [float(k / p) if p < 0 else 0.0 for k, p in zip(self.kept, self.promised, strict=True)]
        self.alignment = torch.tensor([max(-1.0, min(1.0, value)) for value in values], dtype=total.dtype)

    def _features(self, i: int, row: Tensor) -> Tensor:
        if self.settings.features == "log_sign":
            large = row.abs() >= torch.e**-10
            safe = torch.where(large, row, torch.ones_like(row))
            size = torch.where(large, safe.abs().log() / 10, torch.full_like(row, -1.0))
            return torch.stack([size, torch.where(large, row.sign(), row * torch.e**10)], dim=1)
        square = self._average(f"v{i}", row * row, 0.999)
        slow, fast = self._average(f"slow{i}", row, 0.9), self._average(f"fast{i}", row, 0.5)
        seen = [_over_root(each, square) for each in (row, slow, fast)]
        if self.settings.features == "alignment":
            seen.append(self.alignment.repeat_interleave(len(row) // len(self.alignment)))
        return torch.stack(seen, dim=1)

    def _average(self, name: str, value: Tensor, decay: float) -> Tensor:
        self.averages[name] = decay * self.averages.get(name, torch.zeros_like(value)) + (1 - decay) * value
        return self.averages[name] / (1 - decay**self.count)


def _cell(lstm: nn.Module):
    """An LSTM cell that shares the module's weights, so that gradients arrive there."""
    w_ih, w_hh, b_ih, b_hh = (getattr(lstm, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    size = w_hh.shape[1]

    def run(inputs: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        hidden, memory = state or (inputs.new_zeros(len(inputs), size),) * 2
        i, f, g, o = (inputs @ w_ih.T + b_ih + hidden @ w_hh.T + b_hh).chunk(4, dim=1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        return o.sigmoid() * memory.tanh(), memory

    return run


def first_order(network: ML2ONetwork, problem: Problem, start: Tensor, batches: Sequence[object], weights: Tensor):
    """Step-by-step first-order back-propagation through time: L built by autograd, every Jacobian detached.

    Returns (L, gradients in the order of `network.parameters()`), L = mean_p sum_t w_t log(sum_i f_i + 1e-8), or the
    normalised meta-loss where the problem is not positive.
    """
    rule, point, loss = WrittenOut(network), start, 0.0
    initial = problem.losses(start, batches[0]).detach()
    for step, weight in enumerate(weights):
        jacobian, _ = problem.jacobian(point.detach(), batches[step])
        point = point + rule.update(jacobian)
        losses = problem.losses(point, batches[step + 1])
        normalised = (losses / (initial.abs() + 1e-8)).mean(dim=1)
        each = (losses.sum(dim=1) + 1e-8).log() if problem.positive else normalised
        loss = loss + weight * each.mean()
    return loss.detach(), torch.autograd.grad(loss, list(network.parameters()))
