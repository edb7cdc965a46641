"""What T fine-tuned models have in common and what each has learned, tensor by tensor, matched by name.

tau_t = theta_t - theta_0 (Ilharco et al. 2023): meaningful only where all were fine-tuned from the same theta_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ml2o_dist.errors import UserError

State = Mapping[str, Tensor]
"""What `state_dict` returns."""


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The start and the T experts of one network, taken apart; all tensors detached, on one device.

    Attributes:
        tasks: T.
        start: the parameters theta_0 that the tasks share, by name.
        vectors: tau of each of them, [T, ...]: row t is theta_t - theta_0.
        heads: the parameters of the tasks' own modules, each from the expert of its task.
        buffers: floating-point buffers outside of heads (BatchNorm's running moments), [T, ...]: row t is expert t's.
            They are averaged with the preference as weights, never extrapolated: a variance must not become negative.
        constants: buffers of other kinds (BatchNorm's counter), the start's; and those of heads, their expert's.
        aliases: further names of tied tensors, each with the name that the tensor has above.
    """

    tasks: int
    start: dict[str, Tensor]
    vectors: dict[str, Tensor]
    heads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    constants: dict[str, Tensor]
    aliases: dict[str, str]

    @classmethod
    def of(cls, network: nn.Module, start: State, experts: Sequence[State], heads: Sequence[str] = ()) -> TaskVectors:
        """Take apart the state dicts of `start` and of one expert for each task, which must fit `network`.

        Args:
            network: says what the tensors are called, and which are parameters; its own values do not count.
            start: theta_0.
            experts: theta_1 .. theta_T, T >= 2.
            heads: the name of the module that only task t uses, for each task; () where there is none.

        Raises:
            UserError: a state dict that does not fit, a value that is not finite, a head that is missing, a wrong
                number of anything.
        """
        if len(experts) < 2:
            raise UserError(f"a fusion needs at least 2 experts, not {len(experts)}")
        _check_heads(network, heads, len(experts))
        _check_state("the common start", start, network)
        for t, expert in enumerate(experts):
            _check_state(f"expert {t + 1}", expert, network)
        owners = {
            name: t
            for name in (*dict(network.named_parameters()), *dict(network.named_buffers()))
            for t, head in enumerate(heads)
            if name.startswith(f"{head}.")
        }
        shared, vectors, own = {}, {}, {}
        for name, _ in network.named_parameters():
            if name in owners:
                own[name] = experts[owners[name]][name].detach().clone()
                continue
            shared[name] = start[name].detach().clone()
            vectors[name] = torch.stack([expert[name].detach() - shared[name] for expert in experts])
        buffers, constants = {}, {}
        for name, buffer in network.named_buffers():
            if name not in start:  # not persistent: the network makes it itself
                continue
            if name in owners:
                constants[name] = experts[owners[name]][name].detach().clone()
            elif buffer.is_floating_point():
                buffers[name] = torch.stack([expert[name].detach() for expert in experts])
            else:
                constants[name] = start[name].detach().clone()
        return cls(len(experts), shared, vectors, own, buffers, constants, _aliases(network, start))

    def moved(self, weights: Tensor) -> dict[str, Tensor]:
        """Return theta_0 + sum_t w_t tau_t for every shared parameter, and the heads; `weights` [T]."""
        moved = {name: start + combined(weights, self.vectors[name]) for name, start in self.start.items()}
        return moved | self.heads

    def averaged_buffers(self, preference: Tensor) -> dict[str, Tensor]:
        """Return every buffer: sum_t r_t buffer_t of the floating-point ones; `preference` [T]."""
        averaged = {name: combined(preference, buffers) for name, buffers in self.buffers.items()}
        return averaged | self.constants

    def whole_state(self, parameters: dict[str, Tensor], preference: Tensor) -> dict[str, Tensor]:
        """Return a state dict of the network: `parameters`, `averaged_buffers`, and tied tensors by all their names."""
        state = parameters | self.averaged_buffers(preference)
        return state | {alias: state[name] for alias, name in self.aliases.items()}


def combined(weights: Tensor, tensors: Tensor) -> Tensor:
    """Return sum_t w_t X_t [...] of `tensors` X [T, ...] and `weights` w [T], in the tensors' precision."""
    total: Tensor = torch.tensordot(weights.to(tensors), tensors, dims=1)
    return total


def _aliases(network: nn.Module, start: State) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    every = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for pairs in every for pair in pairs):
        if name in start and first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


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


def _check_state(what: str, state: State, network: nn.Module) -> None:
    """Raise UserError, in one line, where `state` does not fit `network`."""
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        parts = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has besides", extra)) if names]
        raise UserError(f"the state dict of {what} does not fit the network: it {' and '.join(parts)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"the state dict of {what} does not fit the network: {name} has shape {list(state[name].shape)}, "
                f"not {list(tensor.shape)}"
            )
        if state[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"the state dict of {what} does not fit the network: {name} is {state[name].dtype}, not {tensor.dtype}"
            )
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise UserError(f"the state dict of {what} has a value in {name} that is not finite")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
