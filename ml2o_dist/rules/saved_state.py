"""Convert a rule's state to JSON and tensors, and back, for the checkpoints of a training that can be resumed.

States are frozen values: dataclasses and named tuples of this package, tuples, tensors, numbers, None, and torchjd's
modules. These keep their memory in parameters, buffers and plain attributes; one of them has its own Adam. Nothing is
unpickled: classes are looked up by name in `ml2o_dist.rules`, and saved memory is written into fresh modules.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tree = Any
"""JSON: null, a number, a text, or {"kind": ...}."""

_ROOM = "ml2o_dist.rules."
_MOVED = {
    "ml2o_dist.rules.ml2o": "ml2o_dist.rules.coordinatewise.rule",
    "ml2o_dist.rules.gml2o": "ml2o_dist.rules.guarded",
    "ml2o_dist.rules.features": "ml2o_dist.rules.coordinatewise.features",
}
"""Present modules of classes, by the module of an older version that a saved state may name."""

_RENAMED = {"Agreement": "Alignment"}
"""Present names of classes, by those of an older version."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, str)
_SAVED = (*_PLAIN, tuple, list, dict, Tensor, np.ndarray, torch.dtype, torch.device, torch.optim.Adam)
"""Types of module attributes that are saved. Others, such as a solver's problem, are the fresh module's own."""


class StateError(ValueError):
    """A saved state that cannot be read back."""


def take_apart(state: Any) -> tuple[Tree, dict[str, Tensor]]:
    """Return the part of `state` that JSON can hold, and its tensors by their place in the state.

    Raises:
        TypeError: the state holds something of a type not listed above.
    """
    tensors: dict[str, Tensor] = {}
    return _apart(state, "", tensors), tensors


def put_together(
    tree: Tree,
    tensors: Mapping[str, Tensor],
    modules: Callable[[str], nn.Module],
    classes: Mapping[str, type] | None = None,
) -> Any:
    """Return the state from the results of `take_apart`.

    Args:
        modules: returns a fresh module of the right kind for a place.
        classes: the classes of a fresh state (`classes_of`), for plug-ins' rules; the package's own are known.

    Raises:
        StateError: the tree cannot be a result of `take_apart`, a place has no tensor or no module, or a class is
            neither of this package's rules nor in `classes`.
    """
    if not isinstance(tree, dict):
        if isinstance(tree, _PLAIN):
            return tree
        raise StateError(f"the saved state of the rule has a {type(tree).__name__} in it")
    kind, place = _text(tree, "kind"), _text(tree, "place", "")
    if kind in ("tensor", "array"):
        if place not in tensors:
            raise StateError(f"the saved state of the rule lacks the tensor {place!r}")
        return tensors[place] if kind == "tensor" else tensors[place].numpy(force=True)
    if kind == "module":
        try:
            module = copy.deepcopy(modules(place))
        except KeyError:
            raise StateError(f"the saved state of the rule has a module at {place!r}, where none is") from None
        _fill(module, tree.get("parts"), lambda part: put_together(part, tensors, modules, classes))
        return module
    if kind == "dtype":
        found = getattr(torch, _text(tree, "name"), None)
        if not isinstance(found, torch.dtype):
            raise StateError(f"the saved state of the rule names the dtype {tree['name']!r}, which there is not")
        return found
    if kind == "device":
        try:
            return torch.device(_text(tree, "name"))
        except RuntimeError as error:
            raise StateError(f"the saved state of the rule names the device {tree['name']!r}") from error
    parts = tree.get("items")
    if not isinstance(parts, list):
        raise StateError(f"the saved state of the rule has a {kind[:100]!r} without items")
    items = [put_together(item, tensors, modules, classes) for item in parts]
    if kind == "dict":
        keys = tree.get("keys")
        if not isinstance(keys, list) or len(keys) != len(items) or not all(isinstance(key, _PLAIN) for key in keys):
            raise StateError("the saved state of the rule has a mapping whose keys and items do not agree")
        return dict(zip(keys, items, strict=True))
    if kind in ("tuple", "list"):
        return tuple(items) if kind == "tuple" else items
    found_class = (classes or {}).get(kind) or _known_class(kind)
    try:
        return found_class(*items)
    except TypeError as error:
        raise StateError(f"the saved state of the rule has a {kind} of {len(items)} parts: {error}") from error


def check_alike(state: Any, fresh: Any, place: str = "") -> None:
    """Raise StateError unless `state` has the kinds and shapes of a `fresh` state of the same rule and problem.

    A value that is None in one of them may be anything in the other: a rule may fill or clear it between steps.
    """
    if state is None or fresh is None or isinstance(fresh, nn.Module):
        return
    if isinstance(fresh, Tensor) and isinstance(state, Tensor):
        # A float's precision may change with the first step.
        if state.shape != fresh.shape or state.is_floating_point() != fresh.is_floating_point():
            raise StateError(
                f"the saved state of the rule has at {place!r} a tensor of {state.dtype} {list(state.shape)}, "
                f"not of {fresh.dtype} {list(fresh.shape)}"
            )
        return
    numbers = isinstance(state, int | float) and isinstance(fresh, int | float)
    parts, wanted = _parts(state), _parts(fresh)
    if not numbers and (type(state) is not type(fresh) or len(parts) != len(wanted)):
        raise StateError(
            f"the saved state of the rule has at {place!r} a {type(state).__name__} of {len(parts)} parts, "
            f"not a {type(fresh).__name__} of {len(wanted)}"
        )
    for (name, part), (_, other) in zip(parts, wanted, strict=True):
        check_alike(part, other, f"{place}.{name}")


def _text(tree: Mapping[str, Any], key: str, otherwise: str | None = None) -> str:
    value = tree.get(key, otherwise)
    if not isinstance(value, str):
        raise StateError(f"the saved state of the rule has no {key} where it needs one")
    return value


def modules_of(state: Any) -> dict[str, nn.Module]:
    """Return the modules in `state` by their place; `put_together` needs those of a fresh state."""
    found: dict[str, nn.Module] = {}

    def look(value: Any, place: str) -> None:
        if isinstance(value, nn.Module):
            found[place] = value
        for name, item in _parts(value):
            look(item, f"{place}.{name}")

    look(state, "")
    return found


def classes_of(state: Any) -> dict[str, type]:
    """Return the named tuples and dataclasses in `state` by the names that `take_apart` gives them."""
    found = {}
    if type(state) is not tuple and (isinstance(state, tuple) or dataclasses.is_dataclass(state)):
        found[_class_name(state)] = type(state)
    for _, item in _parts(state):
        found |= classes_of(item)
    return found


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _apart(value: Any, place: str, tensors: dict[str, Tensor]) -> Tree:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(value).clone()
        return {"kind": "array", "place": place}
    if isinstance(value, Tensor):
        tensors[place] = value.detach().clone()  # two places may be one tensor, which safetensors refuses
        return {"kind": "tensor", "place": place}
    if isinstance(value, nn.Module):
        parts = {
            name: {key: _apart(each, f"{place}.{name}.{key}", tensors) for key, each in _memory(part)}
            for name, part in value.named_modules()
        }
        return {"kind": "module", "place": place, "parts": parts}
    if isinstance(value, torch.optim.Adam):
        return _apart(value.state_dict(), place, tensors) | {"kind": "adam"}
    if isinstance(value, torch.dtype | torch.device):
        return {"kind": type(value).__name__, "name": str(value).removeprefix("torch.")}
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        items = [_apart(value[key], f"{place}.{key}", tensors) for key in keys]
        return {"kind": type(value).__name__, "keys": list(keys), "items": items}
    if isinstance(value, tuple) or dataclasses.is_dataclass(value):
        kind = "tuple" if type(value) is tuple else _class_name(value)
        items = [_apart(item, f"{place}.{name}", tensors) for name, item in _parts(value)]
        return {"kind": kind, "items": items}
    raise TypeError(f"a rule's state cannot be saved: {place} is of type {type(value).__qualname__}")


def _memory(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's own memory, without that of its submodules."""
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and isinstance(value, _SAVED):
            yield name, value


def _fill(module: nn.Module, parts: Any, put: Callable[[Tree], Any]) -> None:
    """Write the saved memory into a fresh module; raises StateError if the module has no such memory."""
    own = dict(module.named_modules())
    if not isinstance(parts, dict) or not parts.keys() <= own.keys():
        raise StateError("the saved state of the rule has a module of other parts than the rule's")
    for name, saved in parts.items():
        part = own[name]
        if not isinstance(saved, dict) or any(
            key in _OF_EVERY_MODULE or hasattr(type(part), key) for key in saved.keys() - dict(_memory(part)).keys()
        ):
            raise StateError(f"the saved state of the rule has something else than {type(part).__name__} remembers")
        for key, tree in saved.items():
            if isinstance(tree, dict) and tree.get("kind") == "adam":
                adam = torch.optim.Adam(part.parameters())  # they come before the attributes
                try:
                    adam.load_state_dict(put(tree | {"kind": "dict"}))
                except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # from torch for others'
                    raise StateError(f"the saved state of the rule has an Adam that is none: {error}") from error
                setattr(part, key, adam)
            elif key in part._parameters:
                value = put(tree)
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    raise StateError(f"the saved state of the rule has no tensor for the parameter {key}")
                part._parameters[key] = nn.Parameter(value)
            else:
                setattr(part, key, put(tree))
        if hasattr(part, "init_gtg"):  # nashmtl makes its solver's problem at step 0, from the weights that it has
            part.__dict__["step"] = 0.0


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, tuple | list):
        return [(str(i), item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return [(str(key), item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    return []


def _known_class(kind: str) -> Callable[..., Any]:
    module, _, name = kind.partition(":")
    module, name = _MOVED.get(module, module), _RENAMED.get(name, name)
    try:
        found = getattr(importlib.import_module(module), name) if module.startswith(_ROOM) else None
    except (ImportError, AttributeError, ValueError):
        found = None
    if (
        isinstance(found, type)
        and found.__module__ == module
        and (dataclasses.is_dataclass(found) or issubclass(found, tuple))
    ):
        return found
    raise StateError(f"the saved state of the rule names {kind[:200]!r}, which is no state of a rule")
