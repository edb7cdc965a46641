"""The weight-ensembling mixture of experts: one network whose modules are merged anew for each preference.

theta^M(r) = theta_0^M + sum_t w_t^M(r) tau_t^M for every upscaled module M, w^M its router's output for r; modules that
are not upscaled are task arithmetic, theta_0 + lambda_0 sum_t tau_t (arXiv 2406.09770, section 4). Only the routers
are trained. For a fixed preference the result is a plain network of the original size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ml2o_dist.paretoset.fitted_states import State
from ml2o_dist.paretoset.preferences import checked_preference
from ml2o_dist.paretoset.router import Routers
from ml2o_dist.paretoset.task_vectors import TaskVectors, combined
from ml2o_dist.runtime.errors import UserError

SCALE = 0.3
"""lambda_0, as in the paper: the usual factor of task arithmetic."""


class Fusion(nn.Module):
    """A network for every preference: call `fusion(preference, ...)`, or get a plain network from `export`.

    Only the routers have parameters; the experts are buffers, so that the module can be moved like any other.

    Attributes:
        tasks: T.
        upscaled: the names of the modules that have a router, in order, each with its parameters' names.
        routers: see `Routers`.
    """

    def __init__(
        self,
        network: nn.Module,
        start: State,
        experts: Sequence[State],
        *,
        modules: str = "all",
        heads: Sequence[str] = (),
        scale: float = SCALE,
        begin: str = "soup",
        seed: int = 0,
    ) -> None:
        """Fuse `experts` (state dicts of `network`, fine-tuned from `start`), one for each task.

        Args:
            network: the architecture; it is copied, and its own values do not count.
            modules: which modules get a router: `all` (each module that has parameters of its own), `mlp` (each module
                with this name, the paper's choice for transformers), or a glob over module names, as `blocks.*.mlp`.
                Submodules belong to the router of the module that contains them.
            heads: the name of each task's own module, taken from its expert for every preference; () for none.
            scale: lambda_0, the weight of every task vector in modules without a router; with begin="arithmetic" also
                the routers' initial output.
            begin: the kind of the routers' initial output, see `Routers`.
            seed: the seed of the routers' initial weights.

        Raises:
            UserError: a state dict that does not fit, a missing head, a pattern that fits no module, an unknown
                `begin`.
        """
        super().__init__()
        vectors = TaskVectors.of(network, start, experts, heads)
        self.tasks = vectors.tasks
        self.upscaled = upscaled_parameters(
            network, modules, {name: first for name, first in vectors.names.first.items() if first in vectors.start}
        )
        self._network = (copy.deepcopy(network).requires_grad_(False),)  # in a tuple: its parameters are not ours
        routed = [name for names in self.upscaled.values() for name in names]
        equal = torch.full((self.tasks,), float(scale), dtype=torch.float64)
        rest = {name: tensor for name, tensor in vectors.moved(equal).items() if name not in routed}
        self._start = Tensors({name: vectors.start[name] for name in routed})
        self._vectors = Tensors({name: vectors.vectors[name] for name in routed})
        self._first = vectors.names.first
        self._own = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
        saved = set(vectors.names.persistent)
        unsaved = {name: tensor.clone() for name, tensor in vectors.names.tensors.items() if name not in saved}
        self._fixed = Tensors(rest)
        self._constants = Tensors(vectors.constants | unsaved)
        self._buffers_of_experts = Tensors(vectors.buffers)
        self.routers = Routers(len(self.upscaled), self.tasks, scale, seed, begin)

    @property
    def network(self) -> nn.Module:
        """The architecture; its values are not used."""
        return self._network[0]

    def state(self, preference: Tensor) -> dict[str, Tensor]:
        """Return all parameters and buffers of the network for `preference` [T], differentiable in the routers.

        A tied tensor is given under one of its names, as `torch.func.functional_call` requires.
        """
        weights = self.routers(preference.to(self.routers.bias))
        start, vectors = dict(self._start.items()), dict(self._vectors.items())
        state = dict(self._fixed.items())
        state |= {name: each.clone() for name, each in self._constants.items()}  # BatchNorm counts in place
        for g, names in enumerate(self.upscaled.values()):
            state |= {name: start[name] + combined(weights[g], vectors[name]) for name in names}
        state |= {name: combined(preference, each) for name, each in self._buffers_of_experts.items()}
        return {name: state[self._first[name]] for name in self._own}

    def forward(self, preference: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the network of `preference` [T] returns for the other arguments.

        Raises:
            UserError: `preference` is no point of the simplex.
        """
        checked = checked_preference(preference, self.tasks)
        own = preference if isinstance(preference, Tensor) else checked
        return functional_call(self.network, self.state(own), args, kwargs)

    def train(self, mode: bool = True) -> Fusion:
        """Put the network into training or evaluation mode, too."""
        self.network.train(mode)
        super().train(mode)
        return self

    @torch.no_grad()
    def export(self, preference: Sequence[float] | Tensor) -> nn.Module:
        """Return the plain network of one preference, with parameters of its own, in evaluation mode.

        Tied tensors stay tied.

        Raises:
            UserError: `preference` is no point of the simplex.
        """
        state = self.state(checked_preference(preference, self.tasks))
        plain = copy.deepcopy(self.network)
        own = {first: state[first].detach().clone() for first in self._first.values()}
        every = (plain.named_parameters(remove_duplicate=False), plain.named_buffers(remove_duplicate=False))
        for name, tensor in (pair for pairs in every for pair in pairs):
            tensor.data = own[self._first[name]]
        return plain.requires_grad_(True).eval()


class Tensors(nn.Module):
    """Tensors by name, which may have dots; they are moved with the module that holds them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = list(tensors)
        for i, tensor in enumerate(tensors.values()):
            self.register_buffer(str(i), tensor)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in the order they came in."""
        return zip(self._names, self.buffers(), strict=True)


def upscaled_parameters(network: nn.Module, pattern: str, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the modules of `network` that `pattern` picks, each with the parameters that it owns.

    See `Fusion` for the patterns. If matching modules are nested, the outer one gets the router; a parameter that two
    modules share belongs to the first.

    Args:
        names: every name of a parameter that the tasks share, with the one name that stands for it.

    Raises:
        UserError: no module fits the pattern.
    """
    if not isinstance(pattern, str):
        raise UserError(f"modules must be one pattern, not {pattern!r}: a glob picks several, as blocks.*.mlp")
    taken: set[str] = set()
    picked: dict[str, list[str]] = {}
    for module_name, module in network.named_modules(remove_duplicate=False):
        if pattern != "all" and (
            not _fits(module_name, pattern) or any(_within(module_name, outer) for outer in picked)
        ):
            continue
        prefix = f"{module_name}." if module_name else ""
        inside = module.named_parameters(prefix=prefix[:-1], recurse=pattern != "all", remove_duplicate=False)
        own = dict.fromkeys(names[name] for name, _ in inside if name in names)
        if new := [name for name in own if name not in taken]:
            picked[module_name] = new
            taken.update(new)
    if not picked:
        named = [name for name, module in network.named_modules() if name and any(True for _ in module.parameters())]
        shown = ", ".join(named[:8]) + (" ..." if len(named) > 8 else "")
        words = "all, mlp," if any(_fits(name, "mlp") for name in named) else "all,"
        raise UserError(
            f"modules {pattern!r} fits no module that the tasks share (allowed: {words} or a glob over {shown})"
        )
    return picked


def _fits(name: str, pattern: str) -> bool:
    return name.rpartition(".")[2] == "mlp" if pattern == "mlp" else bool(name) and fnmatchcase(name, pattern)


def _within(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")
