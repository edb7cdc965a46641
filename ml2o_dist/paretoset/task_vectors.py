"""The common part of T fine-tuned models and each model's task vector, tensor by tensor, matched by name.

tau_t = theta_t - theta_0 (Ilharco et al. 2023): meaningful only where all were fine-tuned from the same theta_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.fitted_states import State, TensorNames, check_finite
from ml2o_dist.runtime.errors import UserError

COUNTER = "num_batches_tracked"
"""BatchNorm's count of batches. It differs between experts with the length of their training; no output uses it."""


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The start and the T experts of one network, taken apart; all tensors detached, on one device.

    A tensor with several names (tied weights) stands here once, under the first of them.

    Attributes:
        tasks: T.
        start: the parameters theta_0 that the tasks share, by name.
        vectors: tau of each of them, [T, ...]: row t is theta_t - theta_0.
        heads: the parameters of the tasks' own modules, each from the expert of its task.
        buffers: floating-point buffers outside of heads that differ between experts (BatchNorm's running moments),
            [T, ...]: row t is expert t's. They are averaged with the preference as weights, never extrapolated: a
            variance must not become negative.
        constants: buffers that are equal in all experts; those of heads, their expert's; BatchNorm's counters, the
            start's where they differ.
        names: all names of the network's tensors.
    """

    tasks: int
    start: dict[str, Tensor]
    vectors: dict[str, Tensor]
    heads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    names: TensorNames

    @classmethod
    def of(cls, network: nn.Module, start: State, experts: Sequence[State], heads: Sequence[str] = ()) -> TaskVectors:
        """Take apart the state dicts of `start` and of one expert for each task, which must fit `network`.

        A state dict may have a tied tensor under one of its names or under all, as torch and safetensors write it.

        Args:
            network: gives the tensors' names, and which are parameters; its own values are not used.
            start: theta_0.
            experts: theta_1 .. theta_T, T >= 2.
            heads: the name of the module that only task t uses, for each task; () where there is none.

        Raises:
            UserError: a state dict that does not fit, a value that is not finite, a tied tensor with two values, a
                buffer of integers that differs between experts, a head that is missing or shares a tensor with the
                rest, a wrong number of anything.
        """
        if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
            raise UserError(f"experts must be a list of state dicts, one for each task, not {type(experts).__name__}")
        if len(experts) < 2:
            raise UserError(f"a fusion needs at least 2 experts, not {len(experts)}")
        names = TensorNames.of(network)
        _check_heads(network, heads, len(experts))
        owners = _owners(names, heads)
        common = names.fitted(start, "the common start")
        each = [
            {name: tensor.to(common[name].device) for name, tensor in names.fitted(expert, f"expert {t + 1}").items()}
            for t, expert in enumerate(experts)
        ]
        shared, vectors, buffers = {}, {}, {}
        own: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name in names.persistent:
            kept = own if name in names.parameters else constants
            if name in owners:
                kept[name] = each[owners[name]][name].clone()
            elif name in names.parameters:
                shared[name] = common[name].clone()
                vectors[name] = torch.stack([expert[name] - shared[name] for expert in each])
            elif all(torch.equal(each[0][name], expert[name]) for expert in each):
                constants[name] = each[0][name].clone()
            elif each[0][name].is_floating_point() or each[0][name].is_complex():
                for t, expert in enumerate(each):
                    check_finite(expert[name], name, f"expert {t + 1}")
                buffers[name] = torch.stack([expert[name] for expert in each])
            elif name.rpartition(".")[2] == COUNTER:
                constants[name] = common[name].clone()
            else:
                raise _unequal(name, each)
        return cls(len(experts), shared, vectors, own, buffers, constants, names)

    def moved(self, weights: Tensor) -> dict[str, Tensor]:
        """Return theta_0 + sum_t w_t tau_t for every shared parameter, and the heads; `weights` [T]."""
        moved = {name: start + combined(weights, self.vectors[name]) for name, start in self.start.items()}
        return moved | self.heads

    def averaged_buffers(self, preference: Tensor) -> dict[str, Tensor]:
        """Return every buffer: sum_t r_t buffer_t of those that differ between experts; `preference` [T]."""
        averaged = {name: combined(preference, buffers) for name, buffers in self.buffers.items()}
        return averaged | self.constants

    def whole_state(self, parameters: dict[str, Tensor], preference: Tensor) -> dict[str, Tensor]:
        """Return a state dict of the network: `parameters`, `averaged_buffers`, and tied tensors by all their names."""
        return self.names.whole(parameters | self.averaged_buffers(preference))


def combined(weights: Tensor, tensors: Tensor) -> Tensor:
    """Return sum_t w_t X_t [...] of `tensors` X [T, ...] and `weights` w [T], in the tensors' precision."""
    total: Tensor = torch.tensordot(weights.to(tensors), tensors, dims=1)
    return total


def _owners(names: TensorNames, heads: Sequence[str]) -> dict[str, int]:
    """Return the task of each tensor that lies in a head; raise UserError where it has a name outside of it, too."""

    def task(name: str) -> int | None:
        return next((t for t, head in enumerate(heads) if name.startswith(f"{head}.")), None)

    for group in names.groups():
        for other in group[1:]:
            if task(group[0]) != task(other):
                inside, outside = (group[0], other) if task(group[0]) is not None else (other, group[0])
                raise UserError(
                    f"{inside} of the head of task {(task(inside) or 0) + 1} is one tensor with {outside}: a head has "
                    "nothing in common with the rest; untie them, or name no heads"
                )
    return {name: t for name in names.tensors if (t := task(name)) is not None}


def _unequal(name: str, experts: Sequence[State]) -> UserError:
    t = next(t for t, expert in enumerate(experts) if not torch.equal(experts[0][name], expert[name]))
    return UserError(
        f"buffer {name} ({experts[0][name].dtype}) of expert {t + 1} differs from that of expert 1, and what is no "
        "floating-point number cannot be averaged: make it equal in all experts, or a task's own by naming heads"
    )


def _check_heads(network: nn.Module, heads: Sequence[str], tasks: int) -> None:
    if not heads:
        return
    if len(heads) != tasks or len(set(heads)) != tasks:
        raise UserError(f"heads {list(heads)} must name a module of its own for each of {tasks} tasks, or none at all")
    modules = dict(network.named_modules())
    for t, head in enumerate(heads):
        if not head or head not in modules:
            raise UserError(f"the head of task {t + 1}, module {head!r}, is missing in the network")
        if not any(True for _ in modules[head].parameters()):
            raise UserError(f"the head of task {t + 1}, module {head!r}, has no parameter")
        if inside := [other for other in heads if other.startswith(f"{head}.")]:
            raise UserError(f"the head of task {t + 1}, module {head!r}, has another task's head {inside[0]!r} in it")
