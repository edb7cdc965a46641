"""Records a few numbers for each instance at every inner step of an episode. Recording never changes the results.

Shapes: K steps, P instances, m objectives, n parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """One recorded episode, step k at index k, everything float32.

    Attributes:
        losses: the objectives at z_k on the step's batch, [K, P, m].
        gradient_norms: |g_i| of the same, [K, P, m].
        gradient_cosines: cos(g_i, g_j) of the pairs (0, 1), (0, 2), ..., (1, 2), ..., [K, P, m (m - 1) / 2].
        update_norms: |z_{k+1} - z_k|, after projection onto the problem's box, [K, P].
        descent_cosines: cos(z_{k+1} - z_k, -mean_i g_i), [K, P]: 1 is straight descent of the mean objective.

    A cosine with a zero vector is 0, with a vector that is not finite nan. Norms are computed in float64, in which the
    norm of a float32 vector neither overflows nor vanishes; a stored norm above 3.4e38 is inf.
    """

    losses: NDArray[np.float32]
    gradient_norms: NDArray[np.float32]
    gradient_cosines: NDArray[np.float32]
    update_norms: NDArray[np.float32]
    descent_cosines: NDArray[np.float32]


class TrajectoryRecorder:
    """Collects the steps of one episode on its device: one matrix product for each step, the rest at the end."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._gramians: list[Tensor] = []

    @torch.no_grad()
    def add(self, jacobian: Tensor, losses: Tensor, before: Tensor, after: Tensor) -> None:
        """Record one step from `before` [P, n], with J [P, m, n] and losses [P, m] there, to `after` [P, n]."""
        gradients = jacobian.double()
        descent = before.double() - after.double()
        rows = torch.cat([gradients, gradients.mean(dim=1, keepdim=True), descent[:, None]], dim=1)
        self._losses.append(losses.detach())
        self._gramians.append(rows @ rows.transpose(1, 2))

    def trajectory(self) -> Trajectory:
        """Return the recorded steps."""
        products = torch.stack(self._gramians)  # [K, P, m + 2, m + 2]: g_1 .. g_m, their mean, -update
        norms = products.diagonal(dim1=2, dim2=3).sqrt()
        objectives = products.shape[2] - 2
        first, second = torch.triu_indices(objectives, objectives, 1, device=products.device)
        pairs = _cosine(products[:, :, first, second], norms[:, :, first], norms[:, :, second])
        descent = _cosine(products[:, :, -2, -1], norms[:, :, -2], norms[:, :, -1])
        columns = (torch.stack(self._losses), norms[:, :, :objectives], pairs, norms[:, :, -1], descent)
        return Trajectory(*(column.float().cpu().numpy() for column in columns))


def _cosine(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return product / (left * right) within [-1, 1]; 0 where a norm is 0, nan where anything is not finite."""
    norms = left * right
    return torch.where(norms == 0, torch.zeros_like(norms), product / norms).clamp(-1, 1)
