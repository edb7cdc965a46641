"""Two- and many-objective test functions of the literature, with their Pareto sets and fronts.

All are free of noise, and all P instances are the same function. Conventions: z in R^n, objectives are minimised.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ml2o_dist.problems.base import ProblemContext
from ml2o_dist.problems.closed_form import ClosedForm, UnitBox, at_least, simplex_points
from ml2o_dist.problems.spec import register_problem
from ml2o_dist.runtime.errors import UserError


@register_problem("fonseca")
class Fonseca(ClosedForm):
    """Two Gaussian wells with a concave front, on which a weighted sum finds only the ends.

        f_1(z) = 1 - exp(-sum_j (z_j - 1/sqrt(n))^2)
        f_2(z) = 1 - exp(-sum_j (z_j + 1/sqrt(n))^2)

    Pareto set: z_1 = .. = z_n in [-1/sqrt(n), 1/sqrt(n)]. Settings: n >= 1. Far away both gradients vanish, so starts
    are uniform in a cube round 0: [-2, 2]^n as in VLMOP2 for n <= 2, narrowed by sqrt(2/n) for larger n (ours), which
    keeps their mean squared distance.
    Source: Fonseca & Fleming 1995; n = 2 is VLMOP2 of Van Veldhuizen & Lamont 1999.
    """

    name = "fonseca"
    positive = True

    def __init__(self, context: ProblemContext, *, n: int = 2) -> None:
        super().__init__(context, objectives=2, dimension=at_least(self.name, "n", n, 1))
        self.minima = self.tensor(torch.zeros(self.instances, 2))
        self.reference_point = self.tensor([1.1, 1.1])  # a tenth beyond the supremum of both objectives

    def objective_values(self, points: Tensor) -> Tensor:
        """Return [k, 2]; by expm1, which stays exact near the wells' bottoms."""
        centre = 1.0 / math.sqrt(self.dimension)
        distances = [(points - centre).square().sum(dim=1), (points + centre).square().sum(dim=1)]
        return -torch.expm1(-torch.stack(distances, dim=1))

    def start(self, stream: torch.Generator) -> Tensor:
        """Draw uniformly from the cube."""
        half_width = 2.0 * math.sqrt(2.0 / max(self.dimension, 2))
        return half_width * (2.0 * torch.rand(self.dimension, generator=stream, dtype=torch.float64) - 1.0)

    def pareto_set(self, points: int) -> Tensor:
        """Return `points` equidistant points of the segment between the wells, [k, n]."""
        end = 1.0 / math.sqrt(self.dimension)
        segment = torch.linspace(-end, end, at_least(self.name, "points", points, 1), dtype=torch.float64)
        return self.tensor(segment[:, None].repeat(1, self.dimension))


ROOT_FLOOR = 1e-8
"""Below it the root in ZDT is replaced by its chord: f_2 moves by at most 2.5e-5, its slope is bounded by 1e4."""


def _root(values: Tensor) -> Tensor:
    """Return sqrt(values) for values >= ROOT_FLOOR, the chord from 0 below it: exact and differentiable at 0."""
    return values / values.clamp(min=ROOT_FLOOR).sqrt()


class _ZDT(UnitBox):
    """f_1 = z_1, f_2 = g h(f_1 / g, f_1) with g = 1 + 9/(n - 1) sum_{j >= 2} z_j; z_2 = .. = z_n = 0 is optimal."""

    def __init__(self, context: ProblemContext, n: int) -> None:
        super().__init__(context, objectives=2, dimension=at_least(self.name, "n", n, 2))
        self.minima = self.tensor(torch.zeros(self.instances, 2))
        # Beyond the largest f_2 (about 10) in the box, so that every feasible point counts.
        self.reference_point = self.tensor([11.0, 11.0])

    @abstractmethod
    def shape(self, ratio: Tensor, first: Tensor) -> Tensor:
        """Return h at ratio = f_1 / g and first = f_1, each [k]."""

    def box_values(self, points: Tensor) -> Tensor:
        first, rest = points[:, 0], points[:, 1:]
        scale = 1.0 + 9.0 * rest.mean(dim=1)
        return torch.stack([first, scale * self.shape(first / scale, first)], dim=1)

    def front_abscissae(self, points: int) -> Tensor:
        """Return `points` values of z_1, [k], that belong to the front: here all of [0, 1]."""
        return torch.linspace(0.0, 1.0, points, dtype=torch.float64)

    def pareto_set(self, points: int) -> Tensor:
        """Return `points` points of the Pareto set, [k, n], equidistant in z_1."""
        first = self.front_abscissae(at_least(self.name, "points", points, 1))
        return self.tensor(torch.nn.functional.pad(first[:, None], (0, self.dimension - 1)))


@register_problem("zdt1")
class ZDT1(_ZDT):
    """A convex front on the edge of a box.

        f_1(z) = z_1
        f_2(z) = g (1 - sqrt(f_1 / g)),   g = 1 + 9/(n - 1) sum_{j >= 2} z_j,   z in [0, 1]^n

    Front: f_2 = 1 - sqrt(f_1). Settings: n >= 2. The root's slope at f_1 = 0 is infinite: below f_1 / g = 1e-8 we take
    its chord (`ROOT_FLOOR`). The Pareto set lies on the bound: criticality there needs projected gradients.
    Source: Zitzler, Deb & Thiele 2000.
    """

    name = "zdt1"
    positive = True

    def __init__(self, context: ProblemContext, *, n: int = 30) -> None:
        super().__init__(context, n)

    def shape(self, ratio: Tensor, first: Tensor) -> Tensor:
        return 1.0 - _root(ratio)


@register_problem("zdt2")
class ZDT2(_ZDT):
    """A concave front on the edge of a box.

        f_1(z) = z_1
        f_2(z) = g (1 - (f_1 / g)^2),   g = 1 + 9/(n - 1) sum_{j >= 2} z_j,   z in [0, 1]^n

    Front: f_2 = 1 - f_1^2. Settings: n >= 2. The Pareto set lies on the bound: criticality there needs projected
    gradients.
    Source: Zitzler, Deb & Thiele 2000.
    """

    name = "zdt2"
    positive = True

    def __init__(self, context: ProblemContext, *, n: int = 30) -> None:
        super().__init__(context, n)

    def shape(self, ratio: Tensor, first: Tensor) -> Tensor:
        return 1.0 - ratio.square()


@register_problem("zdt3")
class ZDT3(_ZDT):
    """A front in five pieces, on the edge of a box; f_2 can be negative.

        f_1(z) = z_1
        f_2(z) = g (1 - sqrt(f_1 / g) - (f_1 / g) sin(10 pi f_1)),   g = 1 + 9/(n - 1) sum_{j >= 2} z_j,   z in [0, 1]^n

    Front: `ZDT3.PIECES` of f_2 = 1 - sqrt(f_1) - f_1 sin(10 pi f_1). Settings: n >= 2. The root is treated as in zdt1.
    Source: Zitzler, Deb & Thiele 2000.
    """

    name = "zdt3"
    # Where each piece of the front begins and ends in f_1. Ours: ends are the local minima of f_2 on g = 1 that are
    # lower than all before, starts are where f_2 falls to the minimum before; by scipy.optimize.brentq, xtol 1e-16.
    PIECES = (
        (0.0, 0.08300153492691),
        (0.18222872802940, 0.25776236338783),
        (0.40931367480866, 0.45388210408883),
        (0.61839679443927, 0.65251170380466),
        (0.82333179832663, 0.85183286543641),
    )
    LOWEST = -0.77336901232665  # f_2 at the end of the last piece, rounded downwards

    def __init__(self, context: ProblemContext, *, n: int = 30) -> None:
        super().__init__(context, n)
        self.minima = self.tensor([0.0, self.LOWEST]).repeat(self.instances, 1)

    def shape(self, ratio: Tensor, first: Tensor) -> Tensor:
        return 1.0 - _root(ratio) - ratio * torch.sin(10.0 * math.pi * first)

    def front_abscissae(self, points: int) -> Tensor:
        """Return `points` values of z_1, [k], equidistant along the pieces laid end to end."""
        starts, ends = torch.tensor(self.PIECES, dtype=torch.float64).unbind(dim=1)
        lengths = (ends - starts).cumsum(dim=0)
        along = torch.linspace(0.0, float(lengths[-1]), points, dtype=torch.float64)
        piece = torch.searchsorted(lengths, along).clamp(max=len(self.PIECES) - 1)
        return torch.minimum(along - lengths[piece] + ends[piece], ends[piece])


@register_problem("dtlz2")
class DTLZ2(UnitBox):
    """Any number of objectives m >= 2; the front is the positive part of the unit sphere.

        f_1(z) = (1 + g) cos(z_1 pi/2) .. cos(z_{m-2} pi/2) cos(z_{m-1} pi/2)
        f_2(z) = (1 + g) cos(z_1 pi/2) .. cos(z_{m-2} pi/2) sin(z_{m-1} pi/2)
        ..
        f_m(z) = (1 + g) sin(z_1 pi/2),   g = sum_{j >= m} (z_j - 1/2)^2,   z in [0, 1]^n

    Pareto set: z_m = .. = z_n = 1/2. Settings: m >= 2; n >= m, or n = 0 for m + 9 (the ten distance variables that the
    source recommends).
    Source: Deb, Thiele, Laumanns & Zitzler 2002.
    """

    name = "dtlz2"
    positive = True

    def __init__(self, context: ProblemContext, *, m: int = 3, n: int = 0) -> None:
        at_least(self.name, "m", m, 2)
        at_least(self.name, "n", n, 0)
        if 0 < n < m:
            raise UserError(f"{self.name}: n is {n}; allowed are integers >= m = {m}, or 0 for m + 9 = {m + 9}")
        super().__init__(context, objectives=m, dimension=n or m + 9)
        self.minima = self.tensor(torch.zeros(self.instances, m))
        self.reference_point = self.tensor([1.1] * m)  # a tenth beyond the front's largest value of each objective

    def box_values(self, points: Tensor) -> Tensor:
        angles, distances = points[:, : self.objectives - 1], points[:, self.objectives - 1 :]
        # cos(a pi/2) written as a sine: exactly 0 at a = 1, where the cosine of a rounded pi/2 would be negative.
        cosines, sines = torch.sin(0.5 * math.pi * (1.0 - angles)), torch.sin(0.5 * math.pi * angles)
        ones = torch.ones_like(points[:, :1])
        products = torch.cat([ones, cosines.cumprod(dim=1)], dim=1).flip(1)  # [k, m]: of m - 1, .., 1, 0 cosines
        last = torch.cat([ones, sines.flip(1)], dim=1)
        return (1.0 + (distances - 0.5).square().sum(dim=1, keepdim=True)) * products * last

    def pareto_set(self, points: int) -> Tensor:
        """Return `points` points (never fewer than m if m > 2), [k, n], whose images lie on rays of the simplex."""
        rays = simplex_points(points, self.objectives)
        # f_m = sin(angle_1), and the norm of f_1 .. f_{m-1} is its cosine; and so on inwards.
        norms = rays.square().cumsum(dim=1).sqrt()
        angles = torch.atan2(rays[:, 1:], norms[:, :-1]).flip(1) * (2.0 / math.pi)
        middle = torch.full((rays.shape[0], self.dimension - angles.shape[1]), 0.5, dtype=torch.float64)
        return self.tensor(torch.cat([angles.clamp(0.0, 1.0), middle], dim=1))


@register_problem("cagrad_toy")
class CAGradToy(ClosedForm):
    """The two-parameter toy of the CAGrad paper: steep log valleys above, two bowls and the Pareto set below.

        f_i(z) = c(z_2) l_i(z) + c(-z_2) q_i(z),   c(t) = max(tanh(t / 2), 0)
        l_1(z) = log(max(|(-z_1 - 7)/2 + tanh(z_2)|, 5e-6)) + 6
        l_2(z) = log(max(|(-z_1 + 3)/2 - tanh(z_2) + 2|, 5e-6)) + 6
        q_1(z) = ((-z_1 + 7)^2 + (z_2 + 8)^2 / 10) / 10 - 20
        q_2(z) = ((-z_1 - 7)^2 + (z_2 + 8)^2 / 10) / 10 - 20

    This is the formula of the published code; the paper has the other sign before the tanh of l_2. Losses reach down to
    -20. Starts are uniform in the square [-10, 10]^2 that the paper plots (ours; the paper uses three fixed points).
    Pareto set (ours): the critical points of z_2 < 0, z_1 in [-7, 7] and z_2 = -u with 0.02 (u - 8) sinh(u) = -q(u),
    q(u) = (49 - z_1^2 + (u - 8)^2 / 10) / 10 - 20. Each is the only minimiser of a weighted sum; above, f >= -6.3.
    Source: Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning", and its code (toy.py).
    """

    name = "cagrad_toy"
    FLOOR = 5e-6

    def __init__(self, context: ProblemContext) -> None:
        super().__init__(context, objectives=2, dimension=2)
        ends = self._critical_points(torch.tensor([7.0, -7.0], dtype=torch.float64))
        self.minima = self.tensor(self.objective_values(ends).diagonal()).repeat(self.instances, 1)
        self.reference_point = self.tensor([0.0, 0.0])  # beyond the front's worst values (-0.4), and round

    def objective_values(self, points: Tensor) -> Tensor:
        first, second = points[:, 0], points[:, 1]
        bend = torch.tanh(second)
        valleys = torch.stack([0.5 * (-first - 7.0) + bend, 0.5 * (-first + 3.0) - bend + 2.0], dim=1)
        logs = valleys.abs().clamp(min=self.FLOOR).log() + 6.0
        depth = 0.1 * (second + 8.0).square()
        bowls = torch.stack([(first - 7.0).square() + depth, (first + 7.0).square() + depth], dim=1) / 10.0 - 20.0
        above, below = torch.tanh(0.5 * second).clamp(min=0.0), torch.tanh(-0.5 * second).clamp(min=0.0)
        return above[:, None] * logs + below[:, None] * bowls

    def start(self, stream: torch.Generator) -> Tensor:
        """Draw uniformly from the square that the paper plots."""
        return 20.0 * torch.rand(2, generator=stream, dtype=torch.float64) - 10.0

    def pareto_set(self, points: int) -> Tensor:
        """Return `points` points of the Pareto set, [k, 2], equidistant in z_1."""
        first = torch.linspace(-7.0, 7.0, at_least(self.name, "points", points, 1), dtype=torch.float64)
        return self.tensor(self._critical_points(first))

    @staticmethod
    def _critical_points(first: Tensor) -> Tensor:
        """Return [k, 2], float64: for each z_1 the z_2 of the Pareto set, bisected: one side grows, the other falls."""
        low, high = torch.full_like(first, 8.0), torch.full_like(first, 9.0)
        for _ in range(60):  # halves an interval of length 1 beyond the last bit
            middle = 0.5 * (low + high)
            bowl = (49.0 - first.square() + 0.1 * (middle - 8.0).square()) / 10.0 - 20.0
            too_deep = 0.02 * (middle - 8.0) * torch.sinh(middle) > -bowl
            low, high = torch.where(too_deep, low, middle), torch.where(too_deep, middle, high)
        return torch.stack([first, -0.5 * (low + high)], dim=1)
