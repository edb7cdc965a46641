"""Multi-task learning on tables: scikit-learn's embedded data sets, with losses of different kinds side by side.

Task 1 predicts the data set's own target: a class by cross-entropy, or a number by squared error. Tasks 2 .. m predict
columns that are taken out of the inputs (ours), standardised, by squared error. P instances differ by their starting
points and their batches only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem, ProblemContext
from ml2o_dist.problems.closed_form import LARGEST
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.problems.networks import ACTIVATIONS, MOST_PARAMETERS, Dense, layout_of, widths
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.seeding import generator

TABLES = {"breast_cancer": 2, "diabetes": 0, "iris": 3, "wine": 3}
"""Data set -> classes of its target; 0: a number."""

TEST_SHARE = 5
"""One row in this many is kept for `test_metrics`."""

MOST_TASKS = 4


@dataclass(frozen=True, eq=False)
class Table:
    """One split: inputs [N, d] and the m targets, each [N] (int64 classes, or standardised float64)."""

    inputs: Tensor
    targets: tuple[Tensor, ...]


class TabularTasks(Problem):
    """A multi-layer perceptron with one linear head for each task.

    f_1 = E[cross-entropy] or E[(h_1(x) - y_1)^2], f_i = E[(h_i(x) - y_i)^2] for i > 1. Parameters lie in the order
    trunk, head 1, .., head m, each layer as weight and bias; they begin as torch's layers do.

    Attributes:
        data: which of `TABLES`.
    """

    positive = True

    def __init__(
        self, data: str, hidden: tuple[int, ...], context: ProblemContext, *, tasks: int, activation: str, batch: int,
        columns: int, init: float,
    ) -> None:  # fmt: skip
        """`columns` selects the columns that tasks 2 .. m predict."""
        self.data, self.instances, self.objectives = data, context.instances, tasks
        self.device, self.dtype = context.device, context.dtype
        self._train, self._test = (_on(split, self.device, self.dtype) for split in _tables(data, tasks, columns))
        self._activation, self._batch, self._init = ACTIVATIONS[activation], batch, init
        sizes = (self._train.inputs.shape[1], *hidden)
        self._heads = [max(1, TABLES[data]), *[1] * (tasks - 1)]
        self._layers = [(sizes[i + 1], sizes[i]) for i in range(len(hidden))]
        self._layers += [(outputs, sizes[-1]) for outputs in self._heads]
        self.dimension = sum(outputs * (inputs + 1) for outputs, inputs in self._layers)
        if self.dimension > MOST_PARAMETERS:
            raise UserError(f"hidden of tabular: {self.dimension:,} parameters (allowed: {MOST_PARAMETERS:,})")

    @property
    def layout(self) -> ParameterLayout:
        """`trunk.0.weight`, `trunk.0.bias`, ..., `heads.0.weight`, `heads.0.bias`, ..."""
        trunk = len(self._layers) - self.objectives
        names = [f"trunk.{i}" for i in range(trunk)] + [f"heads.{i}" for i in range(self.objectives)]
        return layout_of((name, Dense(i, o)) for name, (o, i) in zip(names, self._layers, strict=True))

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n], row i drawn from `seeds[i]`, uniform in +-init / sqrt(fan in)."""
        bounds = torch.cat(
            [torch.full((o * (i + 1),), self._init / math.sqrt(i), dtype=torch.float64) for o, i in self._layers]
        )
        draws = [torch.rand(self.dimension, generator=generator("tabular", s), dtype=torch.float64) for s in seeds]
        return ((2 * torch.stack(draws) - 1) * bounds).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        """Draw the numbers of B training rows with replacement for each instance, [P, B]."""
        count = len(self._train.inputs)
        return torch.randint(count, (self.instances, self._batch), generator=generator).to(self.device)

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses [P, B, m]; `parameters` [P, n]."""
        return self._losses(parameters, self._train.inputs[batch], [target[batch] for target in self._train.targets])

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return `test_loss` [P, m] on the rows that are never trained on."""
        count = len(parameters)
        with torch.no_grad():
            inputs = self._test.inputs.expand(count, -1, -1)
            targets = [target.expand(count, -1) for target in self._test.targets]
            return {"test_loss": self._losses(parameters, inputs, targets).mean(dim=1)}

    def _losses(self, parameters: Tensor, inputs: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Return the losses [P, B, m] for inputs [P, B, d] and targets [P, B]."""
        parts = iter(torch.split(parameters, [o * (i + 1) for o, i in self._layers], dim=1))
        shapes = iter(self._layers)

        def layer(features: Tensor) -> Tensor:
            part, (outputs, width) = next(parts), next(shapes)
            weight, bias = torch.split(part, [outputs * width, outputs], dim=1)
            return torch.baddbmm(bias.unsqueeze(1), features, weight.reshape(-1, outputs, width).mT)

        features = inputs
        for _ in range(len(self._layers) - self.objectives):
            features = self._activation(layer(features))
        losses = []
        for target in targets:
            answer = layer(features)
            if target.dtype == torch.int64:
                losses.append(F.cross_entropy(answer.flatten(0, 1), target.flatten(), reduction="none").view_as(target))
            else:
                losses.append((answer.squeeze(2) - target).square())
        return torch.stack(losses, dim=2)


@functools.cache
def _tables(data: str, tasks: int, columns: int) -> tuple[Table, Table]:
    """Return the training and the test split, in float64."""
    from sklearn import datasets  # imported late: it takes half a second

    loaded = getattr(datasets, f"load_{data}")()
    draws = generator("tabular", data, columns)
    order = torch.randperm(loaded.data.shape[1], generator=draws)
    held, kept = order[: tasks - 1], order[tasks - 1 :].sort().values
    rows = torch.randperm(len(loaded.data), generator=generator("tabular rows", data))
    every, target = torch.tensor(loaded.data, dtype=torch.float64)[rows], torch.tensor(loaded.target)[rows]
    tests = torch.arange(len(every)) % TEST_SHARE == 0
    every = (every - every[~tests].mean(dim=0)) / every[~tests].std(dim=0)
    if TABLES[data]:
        first = target.long()
    else:
        first = (target.double() - target[~tests].double().mean()) / target[~tests].double().std()
    targets = (first, *every[:, held].unbind(dim=1))
    train, test = (Table(every[mask][:, kept], tuple(each[mask] for each in targets)) for mask in (~tests, tests))
    return train, test


def _on(table: Table, device: torch.device, dtype: torch.dtype) -> Table:
    targets = tuple(t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in table.targets)
    return Table(table.inputs.to(device, dtype), targets)


@register_problem("tabular")
def _build(
    context: ProblemContext,
    *,
    data: str = "wine",
    tasks: int = 2,
    hidden: str | int = "16",
    activation: str = "relu",
    batch: int = 32,
    columns: int = 0,
    init: float = 1.0,
) -> Problem:
    """A table of scikit-learn's: its target, and columns that are taken out of the inputs, as tasks of one network.

    data: wine, iris, breast_cancer (a class), diabetes (a number).  tasks: 1 to 4; each beyond the first predicts a
        column by squared error.  columns: which choice of them, any whole number.
    hidden: widths joined by '-'.  activation: relu, tanh or gelu.  batch: rows in a batch, for each instance.
    init: factor on torch's default initialisation.
    """
    if data not in TABLES:
        raise unknown("data of tabular", str(data), TABLES)
    if activation not in ACTIVATIONS:
        raise unknown("activation", str(activation), ACTIVATIONS)
    for name, value, least, most in (
        ("tasks", tasks, 1, MOST_TASKS),
        ("batch", batch, 1, LARGEST),
        ("columns", columns, 0, 2**63 - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = f"from {least} to {most}" if most == MOST_TASKS else f">= {least} (and <= {most})"
            raise UserError(f"{name} {value!r} of tabular is not an integer {shown}")
    if isinstance(init, bool) or not isinstance(init, int | float) or not 0 < init < math.inf:
        raise UserError(f"init {init!r} of tabular is not a positive number")
    sizes = widths("hidden", hidden)
    return TabularTasks(
        data, sizes, context, tasks=tasks, activation=activation, batch=batch, columns=columns, init=init
    )
