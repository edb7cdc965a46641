"""Registries by name, for the package's own values and those that a plug-in adds."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Generic, TypeVar

from ml2o_dist.runtime.errors import UserError, unknown

T = TypeVar("T")

_plugin: list[str] = []
"""The plug-in that is being loaded, if one is."""

_local: list[tuple[str, str]] = []
"""(what it is, name) of what this process has registered by itself: other processes do not know it."""

_added: list[tuple[Registry[Any], str]] = []
"""What that plug-in has registered so far."""


@contextmanager
def registering(plugin: str) -> Iterator[None]:
    """Load a plug-in in the block; if the block raises, remove what the plug-in registered."""
    _plugin.append(plugin)
    before = len(_added)
    try:
        yield
    except BaseException:
        for registry, name in _added[before:]:
            registry.remove(name)
        del _added[before:]
        raise
    finally:
        _plugin.pop()


def check_known_elsewhere(text: str) -> None:
    """Raise UserError where `text` names something that is registered in this process alone.

    Workers are other processes: they know what the package has and what plug-ins bring.
    """
    for what, name in _local:
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            raise UserError(
                f"the {what} {name!r} is registered in this process alone, workers would not know it: put it into a "
                "file NAME.py, and give that as a plug-in: plugins=['NAME.py']"
            )


class Registry(Mapping[str, T], Generic[T]):
    """Values by name, each given by one decorator.

    The package's modules register its own values; they are imported when a name is first asked for.

    Attributes:
        plugins: for each name, the plug-in that registered it; names of the package are not included.
    """

    def __init__(self, what: str, modules: Callable[[], Iterable[str]] = tuple) -> None:
        """`what` is what error messages call a value; `modules` returns the names of the package's own modules."""
        self.what = what
        self.plugins: dict[str, str] = {}
        self._values: dict[str, T] = {}
        self._modules: Callable[[], Iterable[str]] | None = modules

    def register(self, name: str, definition: object = None) -> Callable[[T], T]:
        """Return a decorator that registers a value under `name`.

        Args:
            definition: the function or class from which the value is made, if there is one; its module shows whether
                it belongs to the package.

        Raises:
            UserError: the name is taken.
        """

        def decorate(value: T) -> T:
            module = str(getattr(value if definition is None else definition, "__module__", ""))
            foreign = bool(_plugin) and not module.startswith("ml2o_dist.")
            if foreign:
                self._load()  # so that a plug-in cannot take a name of the package
            if name in self._values:
                owner = self.plugins.get(name)
                by = f"the plug-in {owner!r}" if owner else "ml2o_dist"
                raise UserError(f"the {self.what} {name!r} is there already, from {by}")
            self._values[name] = value
            if not _plugin and not module.startswith("ml2o_dist."):
                _local.append((self.what, name))
            if foreign:
                self.plugins[name] = _plugin[-1]
                _added.append((self, name))
            return value

        return decorate

    def remove(self, name: str) -> None:
        """Remove a name."""
        self._values.pop(name, None)
        self.plugins.pop(name, None)

    def registered(self) -> Mapping[str, T]:
        """Return the values registered so far, without importing anything."""
        return dict(self._values)

    def __getitem__(self, name: str) -> T:
        """Return the value; raise UserError, with the nearest name, if there is none."""
        if name not in self._values:
            self._load()
        if name not in self._values:
            raise unknown(self.what, name, self._values, extensible=True)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._values:
            self._load()
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._values))

    def __len__(self) -> int:
        self._load()
        return len(self._values)

    def _load(self) -> None:
        modules, self._modules = self._modules, None
        for module in modules() if modules is not None else ():
            import_module(module)


def modules_of(package: str, *, packages: bool = False) -> list[str]:
    """Return the names of the modules in a package, or of its subpackages."""
    found = pkgutil.iter_modules(import_module(package).__path__)
    return [f"{package}.{each.name}" for each in found if each.ispkg == packages]
