"""The tensors of a network by all their names, and state dicts brought into that form or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ml2o_dist.runtime.errors import UserError

State = Mapping[str, Tensor]
"""The type that `state_dict` returns."""

MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""The precisions in which a weighted sum of tensors is formed."""

COUNTABLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class TensorNames:
    """Every name of every parameter and buffer of a network.

    Two names belong to one tensor if the network registers one tensor twice (tied weights, a module that is registered
    twice), or two tensors in the same memory with the same layout. The first name stands for the tensor; names of
    parameters come before those of buffers.

    Attributes:
        first: each name, with the first name of its tensor.
        tensors: the network's tensor for each first name; its values do not count.
        parameters: the first names of parameters; the others belong to buffers.
        saved: the names that the network's state dict has, in its order.
    """

    first: dict[str, str]
    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    saved: tuple[str, ...]

    @classmethod
    def of(cls, network: nn.Module) -> TensorNames:
        """Name the tensors of `network`.

        Raises:
            UserError: `network` is no module; a tensor that cannot be merged (lazy, sparse, quantized, a parameter of
                integers); two tensors that share a part of their memory; a state dict with more than tensors.
        """
        if not isinstance(network, nn.Module):
            raise UserError(f"the network must be a torch.nn.Module, not {_kind(network)}")
        known: dict[object, str] = {}
        first: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        parameters: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
        for name, tensor in (*parameters.items(), *network.named_buffers(remove_duplicate=False)):
            kind, allowed = ("parameter", MERGEABLE) if name in parameters else ("buffer", MERGEABLE + COUNTABLE)
            _check_mergeable(f"{kind} {name}", tensor, allowed)
            first[name] = known.setdefault(_place(tensor), name)
            tensors.setdefault(first[name], tensor)
        _check_apart(tensors)
        saved = tuple(network.state_dict(keep_vars=True))
        if others := [name for name in saved if name not in first]:
            raise UserError(
                f"the state dict of the network has {_some(others)}, no parameter and no buffer: no merging"
            )
        return cls(first, tensors, frozenset(parameters.keys() & tensors.keys()), saved)

    @property
    def persistent(self) -> list[str]:
        """The first names of the tensors that a state dict has, under whichever of their names."""
        held = {self.first[name] for name in self.saved}
        return [name for name in self.tensors if name in held]

    def groups(self) -> Iterator[list[str]]:
        """Yield all names of each tensor that has several."""
        by_first: dict[str, list[str]] = {}
        for name, first in self.first.items():
            by_first.setdefault(first, []).append(name)
        return (names for names in by_first.values() if len(names) > 1)

    def fitted(self, state: State, what: str) -> dict[str, Tensor]:
        """Return the tensors of a state dict by their first names, detached, each in the network's precision.

        A tied tensor may be given under any of its names, or several.

        Args:
            what: the owner of the state dict, for the message: "expert 2".

        Raises:
            UserError: the value is no state dict of this network; names of one tensor have different values; a value
                of a parameter is not finite.
        """
        _check_state_dict(state, what)
        wrong = f"the state dict of {what} does not fit the network:"
        present: dict[str, list[str]] = {}
        for name in self.saved:
            present.setdefault(self.first[name], []).extend([name] if name in state else [])
        missing = sorted(name for name, names in present.items() if not names)
        extra = sorted(state.keys() - set(self.saved), key=str)
        if missing or extra:
            parts = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has besides", extra)) if names]
            raise UserError(f"{wrong} it {' and '.join(parts)}")
        fitted = {}
        for first, names in present.items():
            own = self.tensors[first]
            found = {name: _fit(state[name].detach(), own, f"{wrong} {name}") for name in names}
            if first in self.parameters:
                for name, tensor in found.items():
                    check_finite(tensor, name, what)
            for name in names[1:]:
                if not torch.equal(found[names[0]], found[name]):
                    raise UserError(
                        f"the state dict of {what} has other values in {name} than in {names[0]}, which are one tensor "
                        "in the network: make them equal, or give each a parameter of its own in the network"
                    )
            fitted[first] = found[names[0]]
        return fitted

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of the network, with all of its names, from tensors by their first names."""
        return {name: tensors[self.first[name]] for name in self.saved}


def check_finite(tensor: Tensor, name: str, what: str) -> None:
    """Raise UserError if `tensor`, called `name` in the state dict of `what`, has a value that is not finite."""
    if not tensor.isfinite().all():
        raise UserError(f"the state dict of {what} has a value in {name} that is not finite")


def _place(tensor: Tensor) -> object:
    """Return a key that is equal for tensors in the same memory in the same layout."""
    address = tensor.untyped_storage().data_ptr()
    if not address or not tensor.numel():  # no memory to share
        return id(tensor)
    return tensor.device, address, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _check_mergeable(shown: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if is_lazy(tensor):
        raise UserError(f"{shown} has no shape yet: run a batch through the network first")
    if tensor.is_meta:
        raise UserError(f"{shown} lies on the device meta: build the network on one with memory")
    if tensor.layout != torch.strided or tensor.dtype not in allowed:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise UserError(f"{shown} is {kind}, which cannot be averaged: merge the networks before they are quantized")


def _check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError where two tensors share a part of their memory."""
    by_storage: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in tensors.items():
        if (address := tensor.untyped_storage().data_ptr()) and tensor.numel():
            by_storage.setdefault((tensor.device, address), []).append(name)
    for names in by_storage.values():
        for one, other in combinations(names, 2):
            if _overlap(tensors[one], tensors[other]):
                raise UserError(
                    f"{one} and {other} share a part of their memory in the network: give each a tensor of its own, or "
                    "tie them as one parameter"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one storage have a byte in common."""
    (low, high), (other_low, other_high) = _extent(one), _extent(other)
    if high <= other_low or other_high <= low:
        return False
    if one.element_size() != other.element_size():
        return True
    begin = min(one.storage_offset(), other.storage_offset())
    size = int(max(high, other_high) // one.element_size() - begin)
    places = torch.arange(size)  # of columns of one matrix, the extents overlap and the elements do not
    each = [places.as_strided(t.shape, t.stride(), t.storage_offset() - begin).reshape(-1) for t in (one, other)]
    return bool(torch.isin(*each).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage and the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset())
    return begin * tensor.element_size(), (begin + int(last) + 1) * tensor.element_size()


def _check_state_dict(state: object, what: str) -> None:
    if isinstance(state, nn.Module):
        raise UserError(f"{what} must be a state dict, not a module ({_kind(state)}): write .state_dict() after it")
    if not isinstance(state, Mapping):
        raise UserError(f"{what} must be a state dict (names and tensors), not {_kind(state)}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"the state dict of {what} has {_kind(tensor)} under {name!r}, and a tensor is wanted")


def _fit(tensor: Tensor, own: Tensor, wrong: str) -> Tensor:
    """Return `tensor` in the precision of the network's `own`; integers must be of its type."""
    if tensor.shape != own.shape:
        raise UserError(f"{wrong} has shape {list(tensor.shape)}, not {list(own.shape)}")
    same_kind = tensor.is_floating_point() == own.is_floating_point() and tensor.is_complex() == own.is_complex()
    convertible = own.dtype in MERGEABLE and tensor.dtype in MERGEABLE
    if tensor.layout != torch.strided or not same_kind or (tensor.dtype != own.dtype and not convertible):
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise UserError(f"{wrong} is {kind}, not {own.dtype}")
    if tensor.is_meta:
        raise UserError(f"{wrong} lies on the device meta and has no values")
    return tensor.to(own.dtype)


def _kind(value: object) -> str:
    return type(value).__name__


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
