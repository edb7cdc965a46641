"""Plug-ins: users' files and modules that register problems, learned rules, optimizers and the like by a decorator.

A plug-in is one file or an installed module. Every process that needs it loads it: an object that is sent to another
process carries the plug-in's file along (`Carrying`). The plug-in's sha256 is part of the names of runs and finished
cells.

A plug-in is code that runs. It is loaded only if the user names it or has installed it under the entry-point group
`ml2o_dist.plugins`, never because a run directory or an artifact names it.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.registry import registering

GROUP = "ml2o_dist.plugins"
"""The entry-point group: `mine = "my_package.my_module"` in a project's metadata."""

LARGEST = 4 * 2**20
"""Most bytes of a plug-in file: every episode carries it."""

_loaded: dict[str, Plugin] = {}


@dataclass(frozen=True)
class Plugin:
    """A plug-in that is loaded in this process, or that is being sent to another process to be loaded there.

    Attributes:
        name: the file's name, or the module's.
        sha256: the sha256 of the file, or of all Python files of a module.
        source: the file's text; "" for a module.
    """

    name: str
    sha256: str
    source: str

    @property
    def libraries(self) -> tuple[str, ...]:
        """The distributions that its figures depend on, from the module's `LIBRARIES`."""
        return tuple(getattr(sys.modules.get(_module_name(self)), "LIBRARIES", ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _install, (self.name, self.sha256, self.source)


class Carrying:
    """An object that is pickled with this process's plug-ins; unpickling loads these first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (loaded(), type(self), dict(self.__dict__))


class Carried(Carrying):
    """A value of any kind that is pickled with the plug-ins."""

    def __init__(self, value: Any) -> None:
        self.value = value


def loaded() -> tuple[Plugin, ...]:
    """Return the plug-ins of this process, in the order in which they were loaded."""
    return tuple(_loaded.values())


def load_plugin(given: str, beside: Path | None = None) -> Plugin:
    """Load a file `NAME.py`, or an installed module by its dotted name, unless it is already loaded.

    Args:
        beside: the folder where a relative file is looked for first; then the current one, then ML2O_HOME.

    Raises:
        UserError: the plug-in does not exist, cannot be imported, or registers a name that is taken.
    """
    if given.endswith(".py"):
        file = _found(given, beside)
        content = file.read_bytes()
        if len(content) > LARGEST:
            raise UserError(f"plug-in {given!r} has {len(content):,} bytes; at most {LARGEST:,} are allowed")
        try:
            source = content.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"plug-in {given!r} is not UTF-8 text") from error
        return _install(file.name, hashlib.sha256(content).hexdigest(), source)
    return _install(given, _module_sha256(given), "")


def load_installed() -> None:
    """Load every plug-in that an installed package names in the entry-point group; raises UserError."""
    for entry in sorted(entry_points(group=GROUP), key=lambda each: each.value):
        load_plugin(entry.module)


def find_loaded(name: str, sha256: str) -> Plugin:
    """Return the plug-in that a run or a configuration was made with.

    Raises:
        UserError: the plug-in is not loaded here, or another one of the same name is.
    """
    if sha256 in _loaded:
        return _loaded[sha256]
    others = [each for each in loaded() if each.name == name]
    if others:
        raise UserError(
            f"plug-in {name!r} has sha256 {others[0].sha256[:12]}..., the one that this was made with "
            f"{sha256[:12]}...: restore that file, or begin anew in another folder"
        )
    raise UserError(f"this was made with the plug-in {name!r} (sha256 {sha256[:12]}...): give it, --plugin {name}")


def _install(name: str, sha256: str, source: str) -> Plugin:
    """Load a plug-in from its source, or a module by its name, unless it is loaded."""
    if sha256 in _loaded:
        return _loaded[sha256]
    if any(each.name == name for each in loaded()):
        raise UserError(f"plug-in {name!r} is loaded already, with another content")
    plugin = Plugin(name, sha256, source)
    try:
        with registering(name):
            if source:
                _run(plugin)
            elif _module_sha256(name) != sha256:
                raise UserError(f"plug-in {name!r} is another version here: install the same everywhere")
            else:
                import_module(name)
    except UserError as error:
        raise UserError(f"plug-in {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"plug-in {name!r} cannot be loaded: {_reason(error, plugin)}") from error
    _loaded[sha256] = plugin
    return plugin


def _run(plugin: Plugin) -> None:
    """Execute a file as a module that pickle finds by name."""
    name = _module_name(plugin)
    module = ModuleType(name)
    module.__file__ = f"<plug-in {plugin.name}>"
    linecache.cache[module.__file__] = (len(plugin.source), None, plugin.source.splitlines(True), module.__file__)
    sys.modules[name] = module
    try:
        exec(compile(plugin.source, module.__file__, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise


def _module_name(plugin: Plugin) -> str:
    if not plugin.source:
        return plugin.name
    stem = "".join(c if c.isalnum() else "_" for c in plugin.name.removesuffix(".py"))
    return f"ml2o_plugin_{stem}_{plugin.sha256[:8]}"


def _found(given: str, beside: Path | None) -> Path:
    from ml2o_dist.runtime.files import home_folder

    folders = list(dict.fromkeys([*([beside] if beside else []), Path.cwd(), home_folder()]))
    for folder in folders:
        if (folder / given).is_file():
            return folder / given
    where = "" if Path(given).is_absolute() else f" in {', nor in '.join(map(str, folders))}"
    raise UserError(f"plug-in {given!r} does not exist{where}")


def _module_sha256(name: str) -> str:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"plug-in {name!r} is neither a file NAME.py nor an installed module")
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    digest = hashlib.sha256(name.encode())
    for file in files:
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(origin.parent)}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _reason(error: BaseException, plugin: Plugin) -> str:
    """Return the error as text, with the last line of the plug-in in its traceback."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if plugin.name in frame.filename]
    text = " ".join(str(error).split())
    return f"{f'line {own[-1]}: ' if own else ''}{type(error).__name__}{f': {text}' if text else ''}"


def _arrived(plugins: Iterable[Plugin], kind: type, values: dict[str, Any]) -> Any:
    """Rebuild a `Carrying` object; its plug-ins are already loaded, since pickle reads them first."""
    found: Any = object.__new__(kind)
    found.__dict__.update(values)
    return found
