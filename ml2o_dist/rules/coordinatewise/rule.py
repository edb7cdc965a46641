"""ML2O: the learned rule. An LSTM maps every coordinate's gradients to its update (Yang, Tang, Yang 2023).

Shapes: P instances, m objectives, n parameters, R = P * n coordinates, H hidden, c feature channels, T steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from ml2o_dist.config import RuleSettings
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import StepInfo
from ml2o_dist.rules.blocks import even_blocks
from ml2o_dist.rules.coordinatewise import features
from ml2o_dist.rules.coordinatewise.lstm_cell import Cell, lstm_cell, stacked_weights
from ml2o_dist.rules.learned import LearnedRule, Rollout, register_rule
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed

CONTROL = (0.12, 0.1)
"""Initial a and b of the controller: set by hand (ours) on small MLPs and CNNs with an untrained network."""

WARMUP_DECAY = 0.9
"""Decay of the warm-up per step (ours; among 0.8, 0.9, 0.95 the best on four of five held-out problems)."""

SMALLEST, LARGEST = -30.0, 10.0
"""Bounds of the controller's log step size (ours): lr times 1e-13 and 2e4. The shipped weights went from -2 to 3 on
small networks and up to 7 on quadratics. At the lower bound a step moves hardly any parameter; from there the weights
need 150 steps to return to 0."""

USUAL = 20
"""Gradients whose largest entry is at first between 2^-20 and 2^20 are used unchanged. Others are multiplied by a power
of two (ours), so that their squares neither under- nor overflow; this rounds nothing."""

BLOCK = 64512
"""Columns (coordinates times objectives) times H computed at a time, so that an LSTM's gates, 1 MB, stay in the cache
(measured: half of it takes a quarter longer, twice as much a tenth less). It is no power of two, because rows of such
lengths fall into the same cache lines."""

COLUMNS = 2016
"""Columns of a block on a CPU under autograd. The weights in the wheel were trained with this value, and their bits
depend on it. (Blocks of the rule's usual size are 1.3 to 1.6 times as fast there: an option for future weights.)"""

GPU_BLOCK = 2**20
"""Columns of a block on a GPU: as many as fit in memory, 1 kB a column; every block costs some 30 kernel launches."""


@dataclass(frozen=True)
class BlockState:
    """The state of a block of coordinates: the features' memory and the LSTMs' states, the shared LSTM's last.

    `born` is the step before which the block's averages began: 0, except for parameters that were added later.
    """

    memory: features.Memory
    cells: tuple[Cell, ...]
    born: int = 0

    @property
    def rows(self) -> int:
        """How many coordinates the block has."""
        return self.memory.slow.shape[1]


@dataclass(frozen=True)
class ML2OState:
    """The state after `step` steps: each instance's alignment, and the state of each block of coordinates.

    `unit` [P] is the power of two that the gradients are multiplied by; it is 0 until the first nonzero gradient. In
    states that older versions wrote it is None, and gradients are used unchanged.
    """

    step: int
    alignment: features.Alignment
    blocks: tuple[BlockState, ...]
    unit: Tensor | None = None


for _kind in (BlockState, ML2OState):
    register_pytree_node(_kind, lambda state: ([*vars(state).values()], type(state)), lambda parts, kind: kind(*parts))


class StackedWeights(NamedTuple):
    """The LSTMs' `stacked_weights`, and the head's [o, H + 1] for the stacked (h / 2, 1)."""

    specific: tuple[Tensor, ...]
    shared: Tensor
    head: Tensor

    def tensors(self) -> list[Tensor]:
        """Return the weight tensors in order."""
        return [*self.specific, self.shared, self.head]

    def detach(self) -> StackedWeights:
        """Return the weights detached from their graph."""
        *specific, shared, head = (tensor.detach() for tensor in self.tensors())
        return StackedWeights(tuple(specific), shared, head)


class ML2ONetwork(nn.Module):
    """Specific LSTM per objective -> shared LSTM -> linear layer, the same for every coordinate.

    `objectives: tied` (ours): all objectives share one specific module and its outputs are averaged, so that any m
    works and the order of the objectives does not matter. `per_objective` (as the paper draws it): each objective has
    its own module, outputs are concatenated, and `rule.num_objectives` fixes m. `output: residual` and `controlled`
    (ours) start with a zero linear layer: before training the rule is Adam on the sum of the objectives. The initial
    weights are a pure function of the shape.
    """

    def __init__(self, settings: RuleSettings) -> None:
        super().__init__()
        self.settings = settings
        channels, hidden = features.CHANNELS[settings.features], settings.hidden
        tied = settings.objectives == "tied"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("ml2o initial weights"))
            self.specific = nn.ModuleList(
                nn.LSTM(channels, hidden) for _ in range(1 if tied else settings.num_objectives)
            )
            self.shared = nn.LSTM(hidden * len(self.specific), hidden)
            self.head = nn.Linear(hidden, 2 if settings.output == "residual" else 1)
        if settings.output == "controlled":
            self.control = nn.Parameter(torch.tensor(CONTROL))
        if settings.output != "scaled":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def advance(self, jacobian: Tensor, state: ML2OState, weights: StackedWeights) -> tuple[Tensor, ML2OState]:
        """Map the Jacobian [P, m, n] to the update [P, n] and the next state, differentiably in all arguments.

        `weights` come from `stacked_weights()`.
        """
        state = _with_unit(state, jacobian.detach())
        jacobian = _in_unit(jacobian, state.unit)
        instances, objectives, dimension = jacobian.shape
        total = jacobian.sum(dim=1)
        before = state.alignment
        alignment = self.bounded(features.judge(before, total, self.pace(before.value)), state.step + 1)
        gradients = jacobian.transpose(0, 1).reshape(objectives, instances * dimension)
        value, shift = (
            each[:, None].expand(-1, dimension).reshape(-1)
            for each in (alignment.value, self.shift(alignment.total, state.step + 1))
        )
        updates, after, begin = [], [], 0
        for block in state.blocks:
            part = slice(begin, begin + block.rows)
            begin = part.stop
            seen, direction, memory = features.advance(
                self.settings, gradients[:, part], block.memory, state.step - block.born, value[part]
            )
            outputs, cells = self.step(seen, block.cells, weights)
            updates.append(self.step_update(seen, outputs, direction, shift[part]))
            after.append(BlockState(memory, cells, block.born))
        update = torch.cat(updates).view(instances, dimension)
        alignment = features.remember(alignment, total, update)
        return update, replace(state, step=state.step + 1, alignment=alignment, blocks=tuple(after))

    def stacked_weights(self) -> StackedWeights:
        """Return the weights as `step` takes them, attached to the parameters (see `lstm_cell.stacked_weights`)."""
        specific = [stacked_weights(lstm, halved_inputs=False) for lstm in self.specific]
        head = torch.cat((2 * self.head.weight, self.head.bias[:, None]), dim=1)
        return StackedWeights(tuple(specific), stacked_weights(self.shared, halved_inputs=True), head)

    def initial_blocks(self, objectives: int, rows: int, born: int = 0, columns: int = 0) -> tuple[BlockState, ...]:
        """Return the states of `rows` coordinates before their first step: zeros, in even blocks of `columns`.

        With `columns` = 0 the block size is the fast one for the device.
        """
        on_cpu = self.head.weight.device.type == "cpu"
        fast = BLOCK // self.settings.hidden if on_cpu else GPU_BLOCK
        blocks = even_blocks(rows, (columns or fast) // objectives)
        return tuple(self.initial_block(objectives, part.stop - part.start, born) for part in blocks)

    def initial_block(self, objectives: int, rows: int, born: int = 0) -> BlockState:
        """Return the state of one block of `rows` coordinates before their first step."""
        zero, hidden = self.head.weight.new_zeros(objectives, rows), self.settings.hidden
        tied = self.settings.objectives == "tied"
        widths = [objectives * rows, rows] if tied else [rows] * (objectives + 1)
        cells = tuple((zero.new_zeros(hidden, width), zero.new_zeros(hidden, width)) for width in widths)
        return BlockState(features.initial_memory(self.settings, zero), cells, born)

    def step(self, inputs: Tensor, cells: tuple[Cell, ...], weights: StackedWeights) -> tuple[Tensor, tuple[Cell, ...]]:
        """Run one step of one block, differentiably: features [c, m, R] to outputs [o, R] and the next states."""
        channels, objectives, rows = inputs.shape
        if self.settings.objectives == "tied":
            parts = [lstm_cell(inputs.reshape(channels, objectives * rows), cells[0], weights.specific[0])]
            pooled = parts[0][0].view(-1, objectives, rows).mean(dim=1)
        else:
            parts = [lstm_cell(inputs[:, i], cells[i], weights.specific[i]) for i in range(objectives)]
            pooled = torch.cat([hidden for hidden, _ in parts])
        shared = lstm_cell(pooled, cells[-1], weights.shared)
        outputs = torch.addmm(weights.head[:, -1:], weights.head[:, :-1], shared[0])
        return outputs, (*parts, shared)

    def step_update(self, inputs: Tensor, outputs: Tensor, direction: Tensor, shift: Tensor) -> Tensor:
        """Turn outputs [..., o, R], Adam's direction and the controller's shift, both [..., R], into u [..., R].

        `inputs` [..., c, m, R] are the features; d and out count as 0 where there is no gradient (`features.presence`).
        residual: u = -lr * exp(s) * (direction + d) with outputs (s, d).
        controlled: u = -lr * exp(shift) * (direction + d) with output d. Only the controller sets the step size: a
        network output that also set it learned from rough episodes to step too far.
        scaled: u = scale * out (the paper's kind).
        """
        own = features.presence(inputs) * outputs[..., -1, :]
        if self.settings.output == "scaled":
            return self.settings.scale * own
        size = outputs[..., 0, :] if self.settings.output == "residual" else shift
        return -self.settings.lr * size.exp() * (direction + own)

    def shift(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Return the controller's share of the log step size, shaped like `total`; zero unless `output: controlled`.

        shift = 0.5 a sum_{k <= t} r_k - 0.02 b (t + 1) - w 0.9^t: an integral controller (ours) on the alignment r,
        whose sum is `total` after `count` = t + 1 steps. Steps grow while the promised decrease is achieved and shrink
        when they overshoot. a and b are learned, starting from `CONTROL`. The factors 0.5 and 0.02 set how fast: a few
        tens of meta-steps change a by about its own value, and b changes the last of 200 steps no faster than the
        other weights do. The warm-up w, a setting, keeps the first steps short: their averages are over few gradients,
        and on large networks they would overshoot before the controller reacts.
        """
        if self.settings.output != "controlled":
            return torch.zeros_like(total)
        warmup = self.settings.warmup * WARMUP_DECAY ** (count - 1)
        return 0.5 * self.control[0] * total - 0.02 * self.control[1] * count - warmup

    def pace(self, value: Tensor) -> Tensor | float:
        """Return how much the alignment's last `value` [P] changed the log step size; 0 without a controller."""
        return (0.5 * self.control[0] * value).abs() if self.settings.output == "controlled" else 0.0

    def bounded(self, alignment: features.Alignment, count: int) -> features.Alignment:
        """Return the alignment after `count` steps with its total clamped, so that the log step size keeps its bounds.

        The excess is dropped from the total for good: the next steps count from the bound.
        """
        if self.settings.output != "controlled":
            return alignment
        gain, drift = 0.5 * self.control[0], 0.02 * self.control[1] * count
        ends = (SMALLEST + drift) / gain, (LARGEST + drift) / gain
        total = alignment.total.clamp(torch.minimum(*ends), torch.maximum(*ends))
        return alignment._replace(total=torch.where(gain == 0, alignment.total, total))

    def check_objectives(self, objectives: int) -> None:
        """Raise UserError if a per_objective network gets another number of objectives than it was built for."""
        if self.settings.objectives == "per_objective" and objectives != self.settings.num_objectives:
            raise UserError(
                f"rule.objectives=per_objective was built for rule.num_objectives={self.settings.num_objectives}, "
                f"the problem has {objectives}; use rule.objectives=tied for any number"
            )


@register_rule(RuleSettings)
class ML2ORule(LearnedRule):
    """The network as an update rule, block by block; without autograd unless it is `attached`."""

    separable = True
    network: ML2ONetwork

    def __init__(self, network: ML2ONetwork) -> None:
        super().__init__(network)
        with torch.no_grad():
            self._weights = network.stacked_weights()
        self._columns = 0

    @staticmethod
    def make_network(settings: RuleSettings) -> ML2ONetwork:
        """Return the network, whose initial weights are a pure function of its shape."""
        return ML2ONetwork(settings)

    def attached(self) -> ML2ORule:
        """Return the rule with a graph to its parameters, and on a CPU with narrower blocks."""
        rule = copy.copy(self)
        with torch.enable_grad():
            rule._weights = self.network.stacked_weights()
        rule._columns = COLUMNS if self.network.head.weight.device.type == "cpu" else 0
        return rule

    def check_objectives(self, objectives: int) -> None:
        """Raise UserError if a per_objective network gets another number of objectives than it was built for."""
        self.network.check_objectives(objectives)

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout | int) -> ML2OState:
        """Return zero memory and LSTM states for R = P * n coordinates."""
        # Code packed with models that older versions registered calls this with n instead of a layout.
        dimension = layout if isinstance(layout, int) else layout.dimension
        self.network.check_objectives(objectives)
        weight = self.network.head.weight
        alignment = features.initial_alignment(weight.new_zeros(instances, dimension))
        blocks = self.network.initial_blocks(objectives, instances * dimension, columns=self._columns)
        return ML2OState(0, alignment, blocks, weight.new_zeros(instances))

    def advance(self, gradients: Tensor, losses: Tensor, state: ML2OState) -> tuple[Tensor, ML2OState]:
        """Map gradients [P, m, n] to the update [P, n] and the next state; the losses are ignored."""
        return self.network.advance(gradients, state, self._weights)

    def record(self, state: ML2OState, update: Tensor) -> dict[str, Tensor]:
        """Return each instance's alignment, its bounded sum and the unit of its gradients, [P] each."""
        assert state.unit is not None
        return {"alignment": state.alignment.value, "total": state.alignment.total, "unit": state.unit}

    def replay(self, rollout: Rollout, adjoints: Tensor, chunk: int) -> dict[str, Tensor]:
        """Replay the chosen coordinates in one fused forward pass over the sequence and one backward pass."""
        from ml2o_dist.rules.coordinatewise.replay import replay  # imported late: it imports this module

        return replay(self.network, rollout, adjoints, chunk)

    def overruled(self, state: ML2OState, seen: StepInfo, update: Tensor, where: Tensor) -> ML2OState:
        """Make the alignment judge the step that was really taken; averages and LSTM states are kept (ours).

        The gradient at the point is valid whichever rule chose the step. The promise of a step that was not taken
        could only be judged wrongly.
        """
        total = _in_unit(seen.jacobian.sum(dim=1), state.unit)
        taken = features.remember(state.alignment, total, update)
        alignment = state.alignment._replace(
            update=torch.where(where[:, None], taken.update, state.alignment.update),
            promise=torch.where(where, taken.promise, state.alignment.promise),
        )
        return replace(state, alignment=alignment)

    def grown(self, state: ML2OState, more: ParameterLayout) -> ML2OState:
        """Append blocks of `more` coordinates whose averages and LSTMs begin now."""
        first, alignment = state.blocks[0], state.alignment
        tied = self.network.settings.objectives == "tied"
        objectives = first.cells[0][0].shape[1] // first.rows if tied else len(first.cells) - 1
        update = torch.cat([alignment.update, alignment.update.new_zeros(1, more.dimension)], dim=1)
        blocks = self.network.initial_blocks(objectives, more.dimension, born=state.step)
        return replace(state, alignment=alignment._replace(update=update), blocks=(*state.blocks, *blocks))


def _in_unit(gradients: Tensor, unit: Tensor | None) -> Tensor:
    """Return gradients [P, ..] multiplied by their instance's `unit` [P]."""
    return gradients if unit is None else gradients * unit.view(-1, *[1] * (gradients.dim() - 1))


def _with_unit(state: ML2OState, jacobian: Tensor) -> ML2OState:
    """Return the state with a unit for the Jacobian [P, m, n] and with all remembered gradients in this unit.

    The first nonzero gradient sets the unit. A later gradient whose largest entry exceeds 2^40 in that unit resets it.
    """
    if state.unit is None:
        return state
    largest = torch.linalg.vector_norm(jacobian, ord=math.inf, dim=(1, 2))
    begins = (state.unit == 0) & (largest > 0) & largest.isfinite()
    outgrown = (largest * state.unit > 2.0 ** (2 * USUAL)) & largest.isfinite()
    if not bool((begins | outgrown).any()):
        return state
    exponents = torch.frexp(largest).exponent.clamp(-126, 126)
    powers = torch.where(begins & (exponents.abs() <= USUAL), 0, -exponents)
    found = largest.new_tensor([math.ldexp(1.0, power) for power in powers.tolist()])
    unit = torch.where(begins | outgrown, found, state.unit)
    ratio = torch.where(state.unit > 0, unit / state.unit, 1.0)
    same, alignment = ratio == 1, state.alignment  # its averages have no unit; the last step is not judged
    alignment = alignment._replace(
        update=torch.where(same[:, None], alignment.update, 0.0), promise=torch.where(same, alignment.promise, 0.0)
    )
    by_row = ratio.repeat_interleave(jacobian.shape[2])
    blocks, begin = [], 0
    for block in state.blocks:
        factor = by_row[begin : begin + block.rows]
        begin += block.rows
        slow, fast, second = block.memory
        memory = features.Memory(slow * factor, fast * factor, second * factor.square())
        blocks.append(replace(block, memory=memory))
    return replace(state, unit=unit, alignment=alignment, blocks=tuple(blocks))
