"""Save and restore module buffers: a closure that a step calls several times must change them only once."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ml2o_dist.torch_optim.modules import every_module


class _Saved(NamedTuple):
    """The buffers of one module: the tensors themselves, and copies of their values where these can be copied."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]

    def changed(self) -> bool:
        now = self.module._buffers
        if set(now.keys()) != set(self.buffers) or any(
            now[name] is not buffer for name, buffer in self.buffers.items()
        ):
            return True
        return any(not torch.equal(value, _present(self.buffers[name])) for name, value in self.values.items())

    def restore(self) -> None:
        now = self.module._buffers
        names = set(now.keys())  # a scripted module's buffers have keys, but cannot be iterated
        for name in names - set(self.buffers):
            del now[name]
        for name, buffer in self.buffers.items():
            if name not in names or now[name] is not buffer:
                now[name] = buffer
        for name, value in self.values.items():
            _present(self.buffers[name]).copy_(value)


class Snapshot:
    """A copy of the present buffers of some modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved = [_saved(module) for module in modules]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the modules' buffers and their values."""
        for each in self._saved:
            each.restore()

    def changed(self) -> Snapshot:
        """Return the part of this snapshot for modules whose buffers have changed since."""
        part = Snapshot([])
        part._saved = [each for each in self._saved if each.changed()]
        return part

    def add(self, other: Snapshot) -> None:
        """Add the modules of another snapshot."""
        self._saved += other._saved

    @property
    def modules(self) -> list[nn.Module]:
        """The modules in this snapshot."""
        return [each.module for each in self._saved]


class ModuleBuffers:
    """The buffers that a closure may change.

    They are the buffers of the modules that own one of the optimizer's parameters, of all modules that contain these,
    and of all their submodules, called or not, in training mode or not. Other modules, such as one that computes a
    loss, are included if the closure's first call changes one of their buffers.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Look for the modules of the `parameters`, before the closure is called for the first time."""
        alive = every_module()
        self._roots = [weakref.ref(module) for module in _with_ancestors(parameters, alive)]
        known = {id(module) for module in self.modules()}
        self._strangers: Snapshot | None = Snapshot(m for m in alive if m._buffers and id(m) not in known)

    def snapshot(self) -> Snapshot:
        """Return a snapshot of the present buffers."""
        return Snapshot(module for module in self.modules() if module._buffers)

    def strangers(self) -> Snapshot:
        """Return, after the closure's first call, the changed buffers of other modules as they were before it."""
        found = Snapshot([]) if self._strangers is None else self._strangers.changed()
        self._strangers = None
        self._roots += [weakref.ref(module) for module in found.modules]
        return found

    def modules(self) -> list[nn.Module]:
        """Return the modules whose buffers these are, and those that have none."""
        found: dict[int, nn.Module] = {}
        waiting: list[nn.Module | None] = [root() for root in self._roots]
        while waiting:
            module = waiting.pop()
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting += module._modules.values()
        return list(found.values())


def _with_ancestors(parameters: Iterable[Tensor], alive: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that own one of the `parameters`, and all that contain such a module."""
    wanted = {id(parameter) for parameter in parameters}
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in alive:
        for child in module._modules.values():
            parents[id(child)].append(module)
    waiting = [module for module in alive if any(id(p) in wanted for p in module._parameters.values())]
    found: dict[int, nn.Module] = {}
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += parents[id(module)]
    return list(found.values())


def _saved(module: nn.Module) -> _Saved:
    buffers = dict(module._buffers.items())
    values = {name: b.detach().clone() for name, b in buffers.items() if b is not None and _can_be_copied(b)}
    return _Saved(module, buffers, values)


def _can_be_copied(buffer: Tensor) -> bool:
    """Tell whether values can be written: not into a lazy or meta buffer, nor into one whose numbers share memory."""
    if is_lazy(buffer) or buffer.is_meta or buffer.layout != torch.strided:
        return False
    expanded = any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
    return not (expanded or buffer.is_inference())


def _present(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
