"""A problem for the tests of rules: separable quadratics whose every number can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ml2o_dist.problems import Problem
from ml2o_dist.runtime.seeding import generator


class Bowls(Problem):
    """f_i(z) = 1/2 sum_j a_ij (z_j - c_ij)^2 + <xi_i, z>, times `scale`; noise xi ~ N(0, noise^2 I) for each batch.

    Coefficients and noise are drawn for 4 instances, of which those in `rows` are kept: an instance has the same ones
    in any company. Curvatures a lie in [0.2, 1].
    """

    def __init__(
        self,
        rows: Sequence[int] = (0,),
        m: int = 2,
        n: int = 4,
        noise: float = 0.0,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.rows, self.noise, self.scale = list(rows), noise, scale
        self.instances, self.objectives, self.dimension = len(self.rows), m, n
        self.device, self.dtype = torch.device("cpu"), dtype
        stream = generator("bowls", m, n)
        self.curvatures = self._kept(0.2 + 0.8 * torch.rand(4, m, n, generator=stream, dtype=torch.float64))
        self.centres = self._kept(torch.randn(4, m, n, generator=stream, dtype=torch.float64))

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        rows = [torch.randn(self.dimension, generator=generator("z", s), dtype=torch.float64) for s in seeds]
        return (3.0 * torch.stack(rows)).to(self.dtype)

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        xi = torch.randn(4, self.objectives, self.dimension, generator=generator, dtype=torch.float64)
        return self._kept(self.noise * xi)

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        z = parameters[:, None]
        bowls = 0.5 * self.curvatures * (z - self.centres) ** 2
        return self.scale * (bowls + batch * z).sum(dim=2)[:, None]

    def expected_jacobian(self, parameters: Tensor) -> Tensor:
        """Return E J = `scale` A (z - c), [P, m, n]."""
        return self.scale * self.curvatures * (parameters[:, None] - self.centres)

    def _kept(self, values: Tensor) -> Tensor:
        return values[self.rows].to(self.dtype)
