"""All trainable parameters as one flat vector, on which the rules of this package work, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.torch_optim.modules import embedding_tables


class FlatParameters:
    """The place of each parameter in the flat vector z [1, n], in the order in which they were added.

    z is on the device of the first parameter, in float32, or in float64 if a parameter is. For a parameter of lower
    precision (float16, bfloat16) z holds the master weights from step to step, so that updates smaller than the
    parameter's rounding add up. If other code has changed the parameter, the parameter's own value is used.

    Attributes:
        parameters: the parameters in order.
        names: their names.
        device, dtype: those of z and of the rule's states; the first parameters determine them.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.names: list[str] = []
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._master: Tensor | None = None  # [1, n], the last kept z, if master weights are needed

    @property
    def dimension(self) -> int:
        """n."""
        return sum(parameter.numel() for parameter in self.parameters)

    def layout(self, behind: int = 0, modules: Iterable[nn.Module] | None = None) -> ParameterLayout:
        """Return the names, shapes and kinds of all parameters but the first `behind`, in order.

        Args:
            behind: how many parameters are left out.
            modules: the modules that own the parameters; None looks for them in the whole process, which takes a
                tenth of a second.
        """
        named = list(zip(self.names, self.parameters, strict=True))[behind:]
        tables = embedding_tables((parameter for _, parameter in named), modules)
        return ParameterLayout.of(
            (name, p.shape, "embedding") if id(p) in tables else (name, p.shape) for name, p in named
        )

    def add(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        """Append parameters with their names.

        Raises:
            UserError: a parameter has no values yet, is not a real floating-point tensor, or changes the precision.
        """
        for parameter in parameters:
            if is_lazy(parameter):
                raise UserError(
                    "a parameter of a lazy module has no shape yet: call the model on a batch once, before the first "
                    "step"
                )
            if parameter.is_meta:
                raise UserError(
                    f"a parameter of shape {list(parameter.shape)} is on the meta device, without values: give the "
                    "model a device and its weights (model.to_empty(device=...)) before the optimizer is made"
                )
            if not parameter.is_floating_point():
                raise UserError(f"a parameter of {parameter.dtype} cannot be optimized: real floating-point ones can")
        if parameters and not self.parameters:
            self.device, self.dtype = parameters[0].device, _precision(parameters)
        elif _precision([*self.parameters, *parameters]) != self.dtype:
            raise UserError("a float64 parameter was added to an optimizer of float32 ones: make a new optimizer")
        self.parameters += parameters
        self.names += names
        if self._master is not None:
            self._master = torch.cat([self._master, self._joined(parameters)], dim=1)

    def read(self) -> Tensor:
        """Return z [1, n]. Raises UserError if the parameters have changed their device or precision."""
        device, dtype = self.parameters[0].device, _precision(self.parameters)
        if (device, dtype) != (self.device, self.dtype):
            raise UserError(
                f"the parameters are on {device} in {dtype}, the optimizer's states on {self.device} in {self.dtype}: "
                "move a model, or change its precision, before the first step"
            )
        found = self._joined(self.parameters)
        if self._master is None:
            return found
        same = [
            kept.to(parameter.device, parameter.dtype) == parameter.detach().flatten()
            for parameter, kept in zip(self.parameters, torch.split(self._master[0], self._sizes), strict=True)
        ]
        everywhere = torch.cat([each.to(self.device) for each in same])
        return torch.where(everywhere, self._master, found)

    @torch.no_grad()
    def write(self, point: Tensor) -> None:
        """Write the values of `point` [1, n] into the parameters."""
        for parameter, values in zip(self.parameters, torch.split(point[0], self._sizes), strict=True):
            parameter.copy_(values.view_as(parameter))

    def keep(self, point: Tensor) -> None:
        """Write `point` [1, n] into the parameters, and keep it if a parameter cannot hold its full precision."""
        self.write(point)
        if any(parameter.dtype != self.dtype for parameter in self.parameters):
            self._master = point.detach().clone()

    @property
    def master_weights(self) -> Tensor | None:
        """The kept z [1, n] (master weights), or None if the parameters hold its full precision."""
        return self._master

    def remember(self, master: Tensor | None) -> None:
        """Restore a value of `master_weights`, as from a checkpoint."""
        self._master = master

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Return one tensor for each parameter as a vector [n]; zeros for None."""
        rows = [
            torch.zeros(p.numel(), device=self.device, dtype=self.dtype)
            if part is None
            else (part.to_dense() if part.is_sparse else part).detach().to(self.device, self.dtype).flatten()
            for p, part in zip(self.parameters, parts, strict=True)
        ]
        return torch.cat(rows)

    def spread(self, values: Sequence[float]) -> Tensor:
        """Return one number for each parameter as a row [1, n]."""
        sizes = torch.tensor(self._sizes, device=self.device)
        numbers = torch.tensor(list(values), device=self.device, dtype=self.dtype)
        return numbers.repeat_interleave(sizes).unsqueeze(0)

    @property
    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.parameters]

    def _joined(self, parameters: Sequence[Tensor]) -> Tensor:
        return torch.cat([p.detach().to(self.device, self.dtype).flatten() for p in parameters]).unsqueeze(0)


def _precision(parameters: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32
