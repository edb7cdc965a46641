"""ML2O: the learned rule. An LSTM maps every coordinate's gradients to its update (Yang, Tang, Yang 2023).

Shapes: P instances, m objectives, n parameters, R = P * n coordinates, H hidden, c feature channels, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ml2o_dist.config import RuleSettings
from ml2o_dist.errors import UserError
from ml2o_dist.rules import features
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.rules.lstm_cell import Cell, CellWeights, cell_weights, lstm_cell
from ml2o_dist.seeding import derive_seed

CONTROL = (0.12, 0.1)
"""Where the controller's a and b start: set by hand (ours) on small MLPs and CNNs, the network untrained."""

BLOCK = 4096
"""Coordinates walked at a time, so that an LSTM's gates stay in the cache (measured: 1,024 to 8,192 are alike)."""


@dataclass(frozen=True)
class ML2OState:
    """After `step` steps: the features' memory, and per block of coordinates the LSTMs' (h, c), each [H, rows]."""

    step: int
    memory: features.Memory
    agreement: features.Agreement
    blocks: tuple[tuple[Cell, ...], ...]


class ML2ONetwork(nn.Module):
    """Specific LSTM per objective -> shared LSTM -> linear layer, the same for every coordinate.

    `objectives: tied` (ours): one specific module serves every objective and its outputs are averaged, so that any
    m works and their order does not matter. `per_objective` (as the paper draws it): a module each, outputs
    concatenated, m fixed by `rule.count`. `output: residual` and `controlled` (ours) start with a zero linear layer:
    before training the rule is Adam on the sum of the objectives. The weights are a pure function of the shape.
    """

    def __init__(self, settings: RuleSettings) -> None:
        super().__init__()
        self.settings = settings
        channels, hidden = features.CHANNELS[settings.features], settings.hidden
        tied = settings.objectives == "tied"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("ml2o initial weights"))
            self.specific = nn.ModuleList(nn.LSTM(channels, hidden) for _ in range(1 if tied else settings.count))
            self.shared = nn.LSTM(hidden * len(self.specific), hidden)
            self.head = nn.Linear(hidden, 2 if settings.output == "residual" else 1)
        if settings.output == "controlled":
            self.control = nn.Parameter(torch.tensor(CONTROL))
        if settings.output != "scaled":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def unroll(self, inputs: Tensor, cells: list[Cell] | None) -> tuple[Tensor, list[Cell]]:
        """Run T steps at once, differentiably.

        Args:
            inputs: features [T, c, m, R].
            cells: the LSTMs' (h, c), here [1, rows, H], after the steps before (specific ones, then shared); None at
                the start.

        Returns:
            outputs [T, o, R] and the states after the last step.
        """
        steps, channels, objectives, rows = inputs.shape
        after: list[Cell] = []

        def run(index: int, lstm: nn.LSTM, sequence: Tensor) -> Tensor:
            out, cell = lstm(sequence, None if cells is None else cells[index])
            after.append(cell)
            return out  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

        if self.settings.objectives == "tied":
            every = inputs.permute(0, 2, 3, 1).reshape(steps, objectives * rows, channels)
            pooled = run(0, self._lstm(0), every).view(steps, objectives, rows, -1).mean(dim=1)
        else:
            parts = [run(i, self._lstm(i), inputs[:, :, i].transpose(1, 2)) for i in range(objectives)]
            pooled = torch.cat(parts, dim=2)
        out = self.head(run(len(self.specific), self.shared, pooled))
        return out.transpose(1, 2), after

    def advance(self, jacobian: Tensor, state: ML2OState, weights: list[CellWeights]) -> tuple[Tensor, ML2OState]:
        """Map the Jacobian [P, m, n] to the update [P, n] and the next state, differentiably in everything.

        `weights` are those of `cell_weights()`.
        """
        instances, objectives, dimension = jacobian.shape
        total = jacobian.sum(dim=1)
        agreement = features.judge(state.agreement, total)
        gradients = jacobian.transpose(0, 1).reshape(objectives, instances * dimension)
        value, shift = (
            each[:, None].expand(-1, dimension).reshape(-1)
            for each in (agreement.value, self.shift(agreement.total, state.step + 1))
        )
        inputs, direction, memory = features.advance(self.settings, gradients, state.memory, state.step, value)
        flat, blocks = self.step(inputs, direction, shift, state.blocks, weights)
        update = flat.view(instances, dimension)
        agreement = features.remember(agreement, total, update)
        return update, ML2OState(state.step + 1, memory, agreement, tuple(blocks))

    def cell_weights(self) -> list[CellWeights]:
        """Return the LSTMs' weights as `step` takes them, specific ones first, attached to the parameters."""
        return [cell_weights(lstm) for lstm in [*self.specific, self.shared]]

    def initial_cells(self, objectives: int, rows: int) -> list[tuple[Cell, ...]]:
        """Return zero LSTM states for R = `rows` coordinates, a tuple for each block of them."""
        like, hidden = self.head.weight, self.settings.hidden
        wide = objectives if self.settings.objectives == "tied" else 1
        blocks = []
        for start, stop in _blocks(rows):
            widths = [(stop - start) * wide] * len(self.specific) + [stop - start]
            blocks.append(tuple((like.new_zeros(hidden, width), like.new_zeros(hidden, width)) for width in widths))
        return blocks

    def step(
        self,
        inputs: Tensor,
        direction: Tensor,
        shift: Tensor,
        blocks: Sequence[tuple[Cell, ...]],
        weights: list[CellWeights],
    ) -> tuple[Tensor, list[tuple[Cell, ...]]]:
        """Run one step, block by block, differentiably.

        Args:
            inputs: features [c, m, R].  direction: Adam's, [R].  shift: the controller's, [R].
            blocks: the states after the step before; `initial_cells` at the start.
            weights: `cell_weights()`.

        Returns:
            the update [R] and the states after this step.
        """
        updates, after = [], []
        for (start, stop), cells in zip(_blocks(direction.numel()), blocks, strict=True):
            outputs, cells = self._block(inputs[:, :, start:stop], cells, weights)
            updates.append(self.step_update(outputs, direction[start:stop], shift[start:stop]))
            after.append(cells)
        return torch.cat(updates), after

    def _block(
        self, inputs: Tensor, cells: tuple[Cell, ...], weights: list[CellWeights]
    ) -> tuple[Tensor, tuple[Cell, ...]]:
        channels, objectives, rows = inputs.shape
        if self.settings.objectives == "tied":
            parts = [lstm_cell(inputs.reshape(channels, objectives * rows), cells[0], weights[0])]
            pooled = parts[0][0].view(-1, objectives, rows).mean(dim=1)
        else:
            parts = [lstm_cell(inputs[:, i], cells[i], weights[i]) for i in range(objectives)]
            pooled = torch.cat([hidden for hidden, _ in parts])
        shared = lstm_cell(pooled, cells[-1], weights[-1])
        return torch.addmm(self.head.bias[:, None], self.head.weight, shared[0]), (*parts, shared)

    def step_update(self, outputs: Tensor, direction: Tensor, shift: Tensor) -> Tensor:
        """Turn outputs [..., o, R], Adam's direction and the controller's shift, both [..., R], into u [..., R].

        residual: u = -lr * exp(s) * (direction + d) with outputs (s, d); controlled: u = -lr * exp(shift) *
        (direction + d) with output d, for the step's size is the controller's alone (a second hand on it learned from
        rough episodes to step too far); scaled: u = scale * out (the paper's kind).
        """
        if self.settings.output == "scaled":
            return self.settings.scale * outputs[..., 0, :]
        size = outputs[..., 0, :] if self.settings.output == "residual" else shift
        return -self.settings.lr * size.exp() * (direction + outputs[..., -1, :])

    def shift(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Return the controller's share of the log step size, shaped like `total`; zero unless `output: controlled`.

        shift = 0.5 a sum_{k <= t} r_k - 0.02 b (t + 1): an integral controller (ours) on the agreement r, whose sum is
        `total` after `count` = t + 1 steps. Steps grow while they keep what they promise and shrink when they
        overshoot; a and b are learned, from `CONTROL` on. The factors set their pace: a few tens of meta-steps move a
        by as much as it is worth, and b moves the last of 200 steps no faster than the other weights do.
        """
        if self.settings.output != "controlled":
            return torch.zeros_like(total)
        return 0.5 * self.control[0] * total - 0.02 * self.control[1] * count

    def check_objectives(self, objectives: int) -> None:
        """Raise UserError where a per_objective network meets another number of objectives than it was built for."""
        if self.settings.objectives == "per_objective" and objectives != self.settings.count:
            raise UserError(
                f"rule.objectives=per_objective was built for rule.count={self.settings.count} objectives, "
                f"the problem has {objectives}; use rule.objectives=tied for any number"
            )

    def _lstm(self, index: int) -> nn.LSTM:
        lstm = self.specific[index]
        assert isinstance(lstm, nn.LSTM)
        return lstm


class ML2ORule(UpdateRule):
    """The network as an update rule: z_{k+1} = z_k + u_k, computed without autograd, block by block."""

    def __init__(self, network: ML2ONetwork) -> None:
        self.network = network
        with torch.no_grad():
            self._weights = network.cell_weights()

    @classmethod
    def from_weights(
        cls,
        settings: RuleSettings,
        weights: Mapping[str, Tensor] | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ML2ORule:
        """Build the rule from a state dict; None gives the untrained network (`initial`)."""
        network = ML2ONetwork(settings)
        if weights is not None:
            network.load_state_dict(dict(weights))
        return cls(network.to(device=device, dtype=dtype))

    def initial_state(self, instances: int, objectives: int, dimension: int) -> ML2OState:
        """Return zero memory and LSTM states for R = P * n coordinates."""
        self.network.check_objectives(objectives)
        rows = instances * dimension
        zero = self.network.head.weight.new_zeros(objectives, rows)
        agreement = features.initial_agreement(zero[0].view(instances, dimension))
        blocks = tuple(self.network.initial_cells(objectives, rows))
        return ML2OState(0, features.initial_memory(zero), agreement, blocks)

    @torch.no_grad()
    def step(self, oracle: Oracle, parameters: Tensor, state: ML2OState) -> tuple[Tensor, ML2OState, StepInfo]:
        """Draw a batch, take the Jacobian J [P, m, n] and move every coordinate by the network's update."""
        jacobian, losses = oracle.jacobian(parameters, oracle.draw())
        update, state = self.update(jacobian, state)
        return oracle.problem.project(parameters + update), state, StepInfo(losses, jacobian)

    @torch.no_grad()
    def update(self, jacobian: Tensor, state: ML2OState) -> tuple[Tensor, ML2OState]:
        """Map the Jacobian [P, m, n] to the update [P, n] and the next state."""
        return self.network.advance(jacobian, state, self._weights)


def _blocks(rows: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, rows, BLOCK), rows]))
