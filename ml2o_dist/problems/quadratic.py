"""Random convex quadratics, whose Pareto set and front are known in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.problems.base import Batch, Problem, ProblemContext
from ml2o_dist.problems.closed_form import at_least, at_least_real, simplex_points
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

CENTRE_SPREAD = 1.0  # standard deviation of the minimisers' coordinates
START_SPREAD = 3.0  # of the starts' coordinates: starts usually lie outside the Pareto set's hull


MOST_OBJECTIVES = 1000
MOST_COEFFICIENTS, MOST_DRAWN = 2**26, 2**28
"""Most entries of one instance's matrices, half a gigabyte, and of one batch's noise, one gigabyte."""


@register_problem("quadratic")
class Quadratic(Problem):
    """Random strictly convex quadratics, different ones for every instance; noise on the gradients by option.

        f_i(z) = 1/2 (z - c_i)^T A_i (z - c_i),   i = 1 .. m,
        A_i = Q^T diag(condition^-u) Q, Q random orthogonal, u_1 = 0, u_2 = 1, the other u uniform in [0, 1],
        c_i ~ N(0, I)

    so that the largest eigenvalue is 1 and the condition number `condition` (n = 1: u_1 is uniform instead). Sample s
    of a noisy batch adds noise * xi_{i,s}^T z, xi ~ N(0, I), to f_i: the gradient of every sample has an error of
    standard deviation `noise` in each coordinate, and losses and gradients belong together. The claimed minima (0),
    Pareto set and front are those of the expectation f; set and front are instance 0's, other instances have others.
    Pareto set: (sum_i w_i A_i)^-1 sum_i w_i A_i c_i for w in the simplex.
    The reference point is 1.1 times the worst value of each objective at another's minimiser, over all instances
    (none for m = 1).
    Settings: m >= 1; n >= 1; condition >= 1; noise >= 0 (0: exact losses, B = 1); batch >= 1 (B, where there is noise).
    """

    def __init__(
        self,
        context: ProblemContext,
        *,
        m: int = 2,
        n: int = 10,
        condition: float = 10.0,
        noise: float = 0.0,
        batch: int = 32,
    ) -> None:
        self.instances = context.instances
        self.objectives = at_least("quadratic", "m", m, 1, MOST_OBJECTIVES)
        self.dimension = at_least("quadratic", "n", n, 1)
        if m * n**2 > MOST_COEFFICIENTS:
            raise UserError(f"quadratic: m is {m} and n is {n}; m * n^2 is allowed up to {MOST_COEFFICIENTS}")
        self.noise = at_least_real("quadratic", "noise", noise, 0.0)
        self.batch = at_least("quadratic", "batch", batch, 1)
        if self.noise and batch * m * n * self.instances > MOST_DRAWN:
            raise UserError(
                f"quadratic: batch is {batch}, m {m}, n {n}, for {self.instances} instances; their product is allowed "
                f"up to {MOST_DRAWN}"
            )
        self.device, self.dtype = context.device, context.dtype
        self.positive = self.noise == 0.0
        limit = at_least_real("quadratic", "condition", condition, 1.0)
        drawn = [_coefficients(context.seed, i, m, n, limit) for i in range(self.instances)]
        # R_i with A_i = R_i^T R_i: half a squared norm of R_i (z - c_i) cannot be rounded below zero.
        self.factors = torch.stack([factors for factors, _ in drawn]).to(self.device, self.dtype)
        self.centres = torch.stack([centres for _, centres in drawn]).to(self.device, self.dtype)
        self.minima = torch.zeros(self.instances, m, device=self.device, dtype=self.dtype)
        if m > 1:
            offsets = self.centres[:, None] - self.centres[:, :, None]  # [P, objective, minimiser, n]
            payoff = 0.5 * torch.einsum("pikn,pijn->pijk", self.factors, offsets).square().sum(dim=3)
            self.reference_point = 1.1 * payoff.amax(dim=(0, 2))

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        """Return starting points [P, n], normal around 0; drawn in float64, so that all dtypes start at one point."""
        if len(seeds) != self.instances:
            raise ValueError(f"{len(seeds)} seeds for {self.instances} instances")
        streams = [generator("start", "quadratic", seed) for seed in seeds]
        rows = [torch.randn(self.dimension, generator=stream, dtype=torch.float64) for stream in streams]
        return (START_SPREAD * torch.stack(rows)).to(self.device, self.dtype)

    def sample_batch(self, generator: torch.Generator) -> Batch:
        """Draw xi [P, B, m, n], already times `noise`; None where there is no noise."""
        if self.noise == 0.0:
            return None
        shape = (self.instances, self.batch, self.objectives, self.dimension)
        return (self.noise * torch.randn(shape, generator=generator, dtype=self.dtype)).to(self.device)

    def sample_losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Return f_i(z) + noise xi_{i,s}^T z, [P, B, m]; without noise f_i(z), [P, 1, m]."""
        values = 0.5 * self._residuals(parameters).square().sum(dim=2).unsqueeze(1)
        if batch is None:
            return values
        return values + torch.einsum("pbmn,pn->pbm", batch, parameters)

    def jacobian(self, parameters: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (J [P, m, n], losses [P, m]) in closed form: A_i (z - c_i) + noise * mean_s xi_{i,s}."""
        with torch.no_grad():
            jacobian = torch.einsum("pikn,pik->pin", self.factors, self._residuals(parameters))
            if batch is not None:
                jacobian = jacobian + batch.mean(dim=1)
            return jacobian, self.losses(parameters, batch)

    def pareto_set(self, points: int) -> Tensor:
        """Return the minimisers of `points` weighted sums of instance 0's objectives, [k, n].

        Weights: `simplex_points` (equidistant for m = 2, only one for m = 1, the vertices among them).
        """
        factors, centres = self.factors[0].double(), self.centres[0].double()
        hessians = factors.transpose(1, 2) @ factors
        weights = simplex_points(points, self.objectives).to(self.device)
        matrices = torch.einsum("ki,iab->kab", weights, hessians)
        right = torch.einsum("ki,iab,ib->ka", weights, hessians, centres)
        minimisers: Tensor = torch.linalg.solve(matrices, right)
        return minimisers.to(self.dtype)

    def pareto_front(self, points: int) -> Tensor:
        """Return the expected objectives of instance 0 on `pareto_set(points)`, [k, m]."""
        offsets = self.pareto_set(points)[:, None] - self.centres[0]
        return 0.5 * torch.einsum("iab,kib->kia", self.factors[0], offsets).square().sum(dim=2)

    def _residuals(self, parameters: Tensor) -> Tensor:
        """Return R_i (z - c_i), [P, m, n]."""
        return torch.einsum("pikn,pin->pik", self.factors, parameters[:, None] - self.centres)


def _coefficients(seed: int, instance: int, m: int, n: int, condition: float) -> tuple[Tensor, Tensor]:
    """Draw R [m, n, n] with A_i = R_i^T R_i, and the minimisers c [m, n], in float64, seeded by seed and instance."""
    stream = generator("quadratic", seed, instance)
    rotations = torch.linalg.qr(torch.randn(m, n, n, generator=stream, dtype=torch.float64)).Q
    exponents = torch.rand(m, n, generator=stream, dtype=torch.float64)
    if n > 1:
        exponents[:, 0], exponents[:, 1] = 0.0, 1.0
    factors = (condition ** (-0.5 * exponents))[:, :, None] * rotations
    return factors, CENTRE_SPREAD * torch.randn(m, n, generator=stream, dtype=torch.float64)
