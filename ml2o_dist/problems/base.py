"""The `Problem` contract: what rules optimize.

Shapes everywhere: P instances advanced together, m objectives, n parameters (flat), B samples in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.runtime.errors import UserError

Batch = Any
"""What `sample_batch` returns; opaque to everything but the problem that drew it."""


class Problem(ABC):
    """P instances of one multi-objective problem min_z (f_1(z), ..., f_m(z)), z in R^n.

    Attributes:
        instances: P.  objectives: m.  dimension: n.
        positive: every loss is >= 0 by construction (cross-entropy, squared error).
        minima: known minimum of each objective, [P, m], or None.
        bounds: (lower, upper), each [n], of the feasible box, or None.
        reference_point: [m], for the hypervolume, or None.
        device, dtype: where parameters live and in which precision.
    """

    instances: int
    objectives: int
    dimension: int
    positive: bool = False
    minima: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    reference_point: Tensor | None = None
    device: torch.device
    dtype: torch.dtype

    @property
    def layout(self) -> ParameterLayout:
        """The tensors behind the parameters [n]: one vector, unless a problem overrides it."""
        return ParameterLayout.vector(self.dimension)

    @abstractmethod
    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n], row i a pure function of `seeds[i]` (len(seeds) == P)."""

    @abstractmethod
    def sample_batch(self, generator: torch.Generator) -> Batch:
        """Draw one batch per instance from `generator` (a CPU generator); None where the losses are noise-free."""

    @abstractmethod
    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the losses of every sample, [P, B, m], differentiable in `parameters` [P, n]; noise-free: B = 1."""

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the objectives [P, m]: the mean of `sample_losses` over the batch."""
        return self.sample_losses(parameters, batch).mean(dim=1)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [P, m, n], losses [P, m]), both detached: one forward serves all m backward passes."""
        jacobian, losses = autograd_jacobian(self.losses, parameters.detach(), batch)
        return jacobian.detach(), losses.detach()

    def gradient(self, parameters: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [P, n], losses [P, m]), both detached, by one backward pass; `weights` [P, m].

        Raises:
            UserError: no objective depends on the parameters.
        """
        return autograd_gradient(self.losses, parameters, batch, weights)

    def exact(self, batch: Batch) -> bool:
        """Tell whether losses on `batch` are the objectives themselves, so that comparing two points has no error."""
        return batch is None

    def project(self, parameters: Tensor) -> Tensor:
        """Return the nearest feasible point to `parameters` [P, n]: clipped to `bounds`, or unchanged."""
        if self.bounds is None:
            return parameters
        return torch.minimum(torch.maximum(parameters, self.bounds[0]), self.bounds[1])

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return figures on unseen data, each [P, m] (`test_loss`, `test_accuracy`), or {} if there is no such data."""
        return {}

    def data_hashes(self, *, test: bool) -> dict[str, str]:
        """Return the sha256 of the data that the losses are computed on, by name; with `test` also of unseen data.

        The hashes are part of the names of runs and finished cells. Return {} if there is no data.
        """
        return {}

    def pareto_front(self, points: int) -> Tensor:
        """Return about `points` points of the true front, [k, m]; raises UserError where none is known."""
        raise UserError(f"{type(self).__name__} has no known Pareto front")

    def pareto_set(self, points: int) -> Tensor:
        """Return about `points` points of the true Pareto set, [k, n]; raises UserError where none is known."""
        raise UserError(f"{type(self).__name__} has no known Pareto set")


def autograd_jacobian(
    losses: Callable[[Tensor, Batch], Tensor], parameters: Tensor, batch: Batch, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Differentiate `losses(parameters, batch)` [P, m] in `parameters` [P, n]; return (J [P, m, n], losses [P, m]).

    One backward pass per objective over the sum of the instances, which do not interact. With `create_graph`
    both stay attached to `parameters` (the second-order estimator needs it).

    Raises:
        UserError: an objective does not depend on the parameters.
    """
    with torch.enable_grad():
        point = parameters if create_graph else parameters.detach().requires_grad_(True)
        values = losses(point, batch)
        rows = []
        for i in range(values.shape[1]):
            total = values[:, i].sum()
            if not total.requires_grad:
                raise UserError(f"objective {i} has no gradient with respect to the parameters")
            (row,) = torch.autograd.grad(
                total,
                point,
                retain_graph=create_graph or i + 1 < values.shape[1],
                create_graph=create_graph,
                allow_unused=True,
            )
            if row is None:
                raise UserError(f"objective {i} has no gradient with respect to the parameters")
            rows.append(row)
    return torch.stack(rows, dim=1), values


def autograd_gradient(
    losses: Callable[[Tensor, Batch], Tensor], parameters: Tensor, batch: Batch, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate the weighted sum of `losses(parameters, batch)` [P, m]; return (J^T weights [P, n], losses).

    `weights` [P, m]. One backward pass over the sum of the instances, which do not interact.

    Raises:
        UserError: no objective depends on the parameters.
    """
    with torch.enable_grad():
        point = parameters.detach().requires_grad_(True)
        values = losses(point, batch)
        total = (weights.detach() * values).sum()
        gradient = torch.autograd.grad(total, point, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise UserError("the weighted objectives have no gradient with respect to the parameters")
    return gradient, values.detach()


@dataclass(frozen=True)
class ProblemContext:
    """The arguments that a problem is built with besides its own settings.

    `seed` seeds the problem's own randomness (coefficients, data order); starting points have their own seeds.
    `data_root` is the folder of the image data, or "" for the embedded default or ML2O_DATA.
    """

    instances: int = 1
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    data_root: str = ""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise UserError(f"a problem needs at least 1 instance, not {self.instances}")
