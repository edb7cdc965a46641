"""The learner: the shared weights, the meta-optimizer, and the state of both that a resume needs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.rules.learned import initial_weights
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.reading_tensors import check_floats


@dataclass(frozen=True)
class UpdateInfo:
    """The figures of one update: norm of the reduced meta-gradient before clipping, learning rate, slots left out."""

    gradient_norm: float
    learning_rate: float
    skipped: int


class Learner:
    """Holds theta (flat, float32, CPU), Adam's moments, and the exponential moving average of theta.

    `version` counts updates. The previous `staleness` versions are kept, since episodes may still have to be rolled out
    under them. Results are reduced in slot order in float64, so that the weights do not depend on which worker
    computed which episode or when.
    """

    def __init__(self, settings: MetaTrainSettings) -> None:
        self.settings = settings
        self.version = 0
        initial = initial_weights(settings.rule)
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        start = torch.cat([tensor.flatten() for tensor in initial.values()])
        self._theta = start.clone().requires_grad_(True)
        self._average = start.clone()
        self._adam = torch.optim.Adam([self._theta], lr=settings.learner.lr)
        self._earlier: deque[Tensor] = deque(maxlen=settings.staleness)  # theta of earlier versions, oldest first

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights instead of the untrained rule's."""
        start = torch.cat([weights[name].flatten() for name in self._shapes])
        with torch.no_grad():
            self._theta.copy_(start)
        self._average.copy_(start)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The meta-parameters by name at `version`."""
        return self._named(self._theta.detach())

    def weights_of(self, version: int) -> dict[str, Tensor]:
        """Return the meta-parameters of `version`: the current one, or one of the `staleness` before it."""
        back = self.version - version
        return self._named(self._earlier[-back]) if back else self.weights

    @property
    def averaged_weights(self) -> dict[str, Tensor]:
        """The meta-parameters of the moving average, which are validated and exported."""
        return self._named(self._average)

    def update(self, results: Sequence[EpisodeResult]) -> UpdateInfo:
        """Reduce the meta-gradients of one meta-step, given in slot order, and take one Adam step.

        Slots that were not finite are left out and counted; if none is left, the weights do not change.

        Raises:
            ArithmeticError: the step would leave weights that are not finite; nothing has changed.
        """
        before = self.tensors()
        gradients = [torch.from_numpy(r.gradient.copy()).double() for r in results if r.gradient is not None]
        learner, rate = self.settings.learner, self._rate()
        norm = math.nan
        if gradients:
            mean = torch.stack(gradients).sum(dim=0) / len(gradients)
            norm = math.sqrt(math.fsum(mean.square().tolist()))  # torch's norm depends on the number of threads
            self._theta.grad = (mean * min(1.0, learner.clip / max(norm, 1e-30))).float()
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
            if not bool(self._theta.isfinite().all()):
                self.restore(before, self.version)
                raise ArithmeticError(f"the weights would not be finite; learner.lr={learner.lr:g} is too large")
            decay = min(learner.ema, (1 + self.version) / (10 + self.version))
            self._average.lerp_(self._theta.detach(), 1 - decay)
        self.version += 1
        self._earlier.append(before["theta"])
        return UpdateInfo(norm, rate, len(results) - len(gradients))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs besides the version, by name."""
        state = self._adam.state.get(self._theta, {})
        zero = torch.zeros_like(self._theta)
        return {
            "theta": self._theta.detach().clone(),
            "average": self._average.clone(),
            "exp_avg": state.get("exp_avg", zero).detach().clone(),
            "exp_avg_sq": state.get("exp_avg_sq", zero).detach().clone(),
            "adam_step": torch.as_tensor(state.get("step", 0.0)).float().reshape(1).clone(),
            **{f"earlier/{back}": theta for back, theta in enumerate(reversed(self._earlier), start=1)},
        }

    def check(self, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor], version: int) -> None:
        """Raise UserError unless `restore` can load `tensors` and `best` has the rule's meta-parameters."""
        earlier = [f"earlier/{back}" for back in range(1, min(version, self.settings.staleness) + 1)]
        shapes = dict.fromkeys(("theta", "average", "exp_avg", "exp_avg_sq", *earlier), self._theta.shape)
        wanted = {**shapes, "adam_step": torch.Size([1]), **{f"best/{name}": s for name, s in self._shapes.items()}}
        found = {**tensors, **{f"best/{name}": tensor for name, tensor in best.items()}}
        if missing := sorted(wanted.keys() - found.keys()):
            raise UserError(f"it lacks the tensor {missing[0]}")
        if best.keys() != self._shapes.keys():
            raise UserError("its best weights have tensors that the rule has not")
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise UserError(f"its tensor {name} has shape {list(found[name].shape)}, not {list(shape)}")
        check_floats({name: found[name] for name in wanted}, "its tensors")

    def restore(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Load the state that `tensors()` returned at `version`."""
        with torch.no_grad():
            self._theta.copy_(tensors["theta"])
        self._average.copy_(tensors["average"])
        self.version = version
        self._earlier.clear()
        self._earlier.extend(tensors[f"earlier/{back}"] for back in range(min(version, self.settings.staleness), 0, -1))
        self._adam.state.clear()
        if tensors["adam_step"].item() > 0:
            self._adam.state[self._theta] = {
                "step": tensors["adam_step"].reshape(()).clone(),
                "exp_avg": tensors["exp_avg"].clone(),
                "exp_avg_sq": tensors["exp_avg_sq"].clone(),
            }

    def _rate(self) -> float:
        learner = self.settings.learner
        cosine = 0.5 * (1 + math.cos(math.pi * self.version / self.settings.meta_steps))
        return learner.final_lr + (learner.lr - learner.final_lr) * cosine

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
