"""What an episode saw at each inner step, in a few numbers for each instance. It only reads: results stay as they are.

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

    A cosine with a zero vector is 0, with a vector that is not finite nan. Norms are taken in float64, where no float32
    vector's overflows or vanishes; stored, one above 3.4e38 is inf.
    """

    losses: NDArray[np.float32]
    gradient_norms: NDArray[np.float32]
    gradient_cosines: NDArray[np.float32]
    update_norms: NDArray[np.float32]
    descent_cosines: NDArray[np.float32]


class TrajectoryRecorder:
    """Collects the steps of one episode, on the device it runs on."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def add(self, jacobian: Tensor, losses: Tensor, before: Tensor, after: Tensor) -> None:
        """Take down one step: J [P, m, n] and losses [P, m] at `before` [P, n], and where it led, `after` [P, n]."""
        gradients = jacobian.detach().double()
        update = after.detach().double() - before.detach().double()
        gradient_norms, update_norms = gradients.norm(dim=2), update.norm(dim=1)
        gramian = gradients @ gradients.transpose(1, 2)
        first, second = torch.triu_indices(gradients.shape[1], gradients.shape[1], 1, device=gradients.device)
        mean = gradients.mean(dim=1)
        self._steps.append(
            (
                losses.detach(),
                gradient_norms,
                _cosine(gramian[:, first, second], gradient_norms[:, first], gradient_norms[:, second]),
                update_norms,
                _cosine(-(update * mean).sum(dim=1), update_norms, mean.norm(dim=1)),
            )
        )

    def trajectory(self) -> Trajectory:
        """Return what was taken down."""
        columns = [torch.stack(column).float().cpu().numpy() for column in zip(*self._steps, strict=True)]
        return Trajectory(*columns)


def _cosine(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return product / (left * right) within [-1, 1]; 0 where a norm is 0, nan where anything is not finite."""
    norms = left * right
    return torch.where(norms == 0, torch.zeros_like(norms), product / norms).clamp(-1, 1)
