"""Training over preferences as a `Problem`, so that every rule of this package, hand-designed or learned, can do it.

P = 1 instance, m = T objectives, n the parameters of a `Conditioned` model. A batch is a preference (or a few) and
images for every task; objective t is sum_i w_it l_t(z; r_i) with the weights w of the `Scalarization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from ml2o_dist.paretoset.conditioned import Conditioned, flat_parameters, named_views
from ml2o_dist.paretoset.preferences import draw_preferences
from ml2o_dist.paretoset.scalarization import Scalarization
from ml2o_dist.paretoset.tasks import TaskBatch, TaskSet, sample_losses
from ml2o_dist.problems.base import Batch, Problem
from ml2o_dist.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Preferences [p, T] float64, and one batch of images for each group of tasks."""

    preferences: Tensor
    images: list[TaskBatch]


class PreferenceProblem(Problem):
    """A conditioned model, trained on a task set.

    Attributes:
        model, tasks, scalarization: as given.
    """

    positive = True

    def __init__(
        self,
        model: Conditioned,
        tasks: TaskSet,
        scalarization: Scalarization,
        *,
        batch: int,
        device: torch.device,
        preference: Tensor | None = None,
    ) -> None:
        """Create the problem: `batch` samples per group of tasks; `preference` [T] if all training is for one ray."""
        self.model, self.tasks, self.scalarization = model.to(device), tasks, scalarization
        self.instances, self.objectives = 1, tasks.count
        self.dimension = sum(parameter.numel() for parameter in model.parameters())
        self.device, self.dtype = device, torch.float32
        self._batch, self._preference = batch, preference

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return the model's initial parameters, [1, n]; their seed was given when it was built."""
        return flat_parameters(self.model).repeat(len(seeds), 1)

    def sample_batch(self, generator: torch.Generator) -> PreferenceBatch:
        """Draw preferences, uniform on the simplex unless there is a fixed one, and images of the training split."""
        rays = self.scalarization.rays
        if self._preference is None:
            preferences = draw_preferences(rays, self.objectives, generator)
        else:
            preferences = self._preference.double().cpu().expand(rays, -1)
        return PreferenceBatch(preferences, self.tasks.draw("train", self._batch, generator, self.device))

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return the weighted losses of every sample, [1, B, T], for a scalarization with constant weights.

        Raises:
            UserError: the weights depend on the point, so that two points cannot be compared.
        """
        if not self.scalarization.constant:
            raise UserError(
                f"loss {self.scalarization.name!r} has other weights at every point, so that a guard or a line search "
                "cannot compare two points by it: use loss ls with this optimizer"
            )
        weights = self.scalarization.weights(batch.preferences, batch.preferences)
        losses = self._ray_losses(parameters[0], batch, 0)
        return (weights.to(losses) * losses).unsqueeze(0)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [1, T, n], weighted losses [1, T]), both detached."""
        rays = len(batch.preferences)
        with torch.enable_grad():
            point = parameters[0].detach().requires_grad_(True)
            losses = torch.stack([self._ray_losses(point, batch, i).mean(dim=0) for i in range(rays)])
            if rays == 1:
                rows = _rows(losses[0], point)
                weights = self.scalarization.weights(batch.preferences, losses.detach(), rows)
                jacobian = weights[0].unsqueeze(1) * rows
            else:
                weights = self.scalarization.weights(batch.preferences, losses.detach())
                jacobian = _rows((weights * losses).sum(dim=0), point)
        return jacobian.unsqueeze(0), (weights * losses.detach()).sum(dim=0, keepdim=True)

    def gradient(self, parameters: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (J^T weights [1, n], weighted losses [1, T]), both detached; but for `epo` by one backward pass."""
        if self.scalarization.name == "epo":
            jacobian, losses = self.jacobian(parameters, batch)
            return torch.einsum("pt,ptn->pn", weights.to(jacobian), jacobian), losses
        with torch.enable_grad():
            point = parameters[0].detach().requires_grad_(True)
            rays = [self._ray_losses(point, batch, i).mean(dim=0) for i in range(len(batch.preferences))]
            losses = torch.stack(rays)
            own = self.scalarization.weights(batch.preferences, losses.detach())
            objectives = (own * losses).sum(dim=0)
            row = _rows((weights[0].to(objectives) * objectives).sum().unsqueeze(0), point)
        return row, objectives.detach().unsqueeze(0)

    def measure(
        self, parameters: Tensor, preference: Tensor, split: str, samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return losses [T] and accuracies [T] of the network that `parameters` [1, n] give for `preference` [T]."""
        views = named_views(self.model, parameters[0].detach())
        r = preference.to(self.device, self.dtype)
        self.model.eval()
        try:
            return self.tasks.measure(
                lambda images: functional_call(self.model, views, (r, [images]))[0], split, self.device, samples
            )
        finally:
            self.model.train()

    def _ray_losses(self, point: Tensor, batch: PreferenceBatch, ray: int) -> Tensor:
        """Return the plain losses [B, T] of the network for one of the batch's preferences."""
        r = batch.preferences[ray].to(self.device, self.dtype)
        images = [each.images for each in batch.images]
        return sample_losses(functional_call(self.model, named_views(self.model, point), (r, images)), batch.images)


def _rows(objectives: Tensor, point: Tensor) -> Tensor:
    """Return the gradients [T, n] of the objectives [T]; raises UserError if one does not depend on the point."""
    rows = []
    for t, objective in enumerate(objectives):
        row = None
        if objective.requires_grad:
            (row,) = torch.autograd.grad(objective, point, retain_graph=t + 1 < len(objectives), allow_unused=True)
        if row is None:
            raise UserError(f"task {t + 1} has no gradient with respect to what is trained")
        rows.append(row)
    return torch.stack(rows)
