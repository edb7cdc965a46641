"""A rule's state as JSON and tensors, and back: what a checkpoint of a training that goes on with it holds.

States are frozen values: dataclasses and named tuples of this package, tuples, tensors, numbers, None, and torch's
modules. Nothing is unpickled: a class is looked up by name among those of `ml2o_dist.rules`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Tree = Any
"""JSON: null, a number, a text, or {"kind": ...}."""

_ROOM = "ml2o_dist.rules."


class StateError(ValueError):
    """A saved state that cannot be read back."""


def take_apart(state: Any) -> tuple[Tree, dict[str, Tensor]]:
    """Return what JSON can say of `state`, and its tensors by their place in it.

    Raises:
        TypeError: it holds something that is not named above.
    """
    tensors: dict[str, Tensor] = {}
    return _apart(state, "", tensors), tensors


def put_together(tree: Tree, tensors: Mapping[str, Tensor], modules: Callable[[str], nn.Module]) -> Any:
    """Return the state that was taken apart; `modules` gives a fresh module of the right kind for a place.

    Raises:
        StateError: a place has no tensor, or a class is none of this package's rules.
    """
    if not isinstance(tree, dict):
        return tree
    kind, place = tree["kind"], tree.get("place", "")
    if kind == "tensor":
        if place not in tensors:
            raise StateError(f"the saved state of the rule lacks the tensor {place!r}")
        return tensors[place]
    if kind == "module":
        module = copy.deepcopy(modules(place))
        module.load_state_dict({name: tensors[f"{place}.{name}"] for name in tree["names"]})
        return module
    items = [put_together(item, tensors, modules) for item in tree["items"]]
    if kind == "tuple":
        return tuple(items)
    return _known_class(kind)(*items)


def modules_of(state: Any) -> dict[str, nn.Module]:
    """Return the modules in `state` by their place: those of a fresh state serve `put_together`."""
    found: dict[str, nn.Module] = {}

    def look(value: Any, place: str) -> None:
        if isinstance(value, nn.Module):
            found[place] = value
        for name, item in _parts(value):
            look(item, f"{place}.{name}")

    look(state, "")
    return found


def _apart(value: Any, place: str, tensors: dict[str, Tensor]) -> Tree:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[place] = value.detach().clone()  # two places may be one tensor, which safetensors refuses
        return {"kind": "tensor", "place": place}
    if isinstance(value, nn.Module):
        state = value.state_dict()
        tensors.update({f"{place}.{name}": tensor.clone() for name, tensor in state.items()})
        return {"kind": "module", "place": place, "names": list(state)}
    if isinstance(value, tuple) or dataclasses.is_dataclass(value):
        kind = "tuple" if type(value) is tuple else f"{type(value).__module__}:{type(value).__qualname__}"
        items = [_apart(item, f"{place}.{name}", tensors) for name, item in _parts(value)]
        return {"kind": kind, "items": items}
    raise TypeError(f"a rule's state cannot be saved: {place} is of type {type(value).__qualname__}")


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, tuple):
        return [(str(i), item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    return []


def _known_class(kind: str) -> Callable[..., Any]:
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if module.startswith(_ROOM) else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))):
        raise StateError(f"the saved state of the rule names {kind!r}, which is no state of a rule")
    return found
