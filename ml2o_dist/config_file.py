"""Settings from a YAML file and `--set dotted.key=value`, checked into one resolved, hashed value."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ml2o_dist.artifact_sources import located
from ml2o_dist.config import RULE_SETTINGS, DataSettings, EvaluateSettings, LearnedRuleSettings, MetaTrainSettings
from ml2o_dist.plugins import load_plugin
from ml2o_dist.problems.image_files import data_folder
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.files import home_folder
from ml2o_dist.runtime.reading import one_line, parse_yaml, read_yaml

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=BaseModel)
Job = TypeVar("Job", MetaTrainSettings, EvaluateSettings)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
"""The embedded default: needs no download."""

RUN_CONFIG = "config.yaml"
"""The file name of the settings of a meta-training in a run directory; in a sweep's, those of its best trial."""

MOST_EXTENDED = 20
"""How many files may be chained by `extends`."""

MOST_GROUPS = 20
"""Most dots in a key: `rule.guard.budget` has two."""

LONGEST_SHOWN = 300
"""Most characters of a wrong setting or value that an error message shows."""

_PROBLEMS = ("train", "validation", "test")
"""The keys of `family` that name problems."""

_OPERATIONAL = (
    "workers",
    "resources",
    "faults",
    "checkpoint_every",
    "keep_checkpoints",
    "compare",
    "comparison",
    "trajectories",
    "data",
    "tracking",
)
"""Keys that change how a run is executed but not its final weights; a resumed run may change them."""


def load_settings(
    file: Path | None = None, overrides: Iterable[str] = (), within: Path | None = None
) -> MetaTrainSettings:
    """Read settings from a YAML `file` (None: the embedded default), then apply `key=value` overrides in order.

    A file may begin with `extends: other.yaml` (a path beside it): its mappings are merged over that file's.
    `found_file` defines where `file` is looked for.

    Args:
        within: the folder that all these files must lie in, links followed; None where the user named the file.

    Raises:
        UserError: an unreadable file, a misspelt key or a wrong value, in one line that says what is allowed.
    """
    return read_settings(MetaTrainSettings, file or DEFAULT_CONFIG, overrides, within=within)


def load_evaluation(
    file: Path | None = None, overrides: Iterable[str] = (), within: Path | None = None
) -> EvaluateSettings:
    """Read the settings of an evaluation as `load_settings` does; without a `file` from the overrides alone."""
    return read_settings(EvaluateSettings, file, overrides, "evaluate.yaml", within)


def read_settings(
    kind: type[Settings],
    file: Path | None,
    overrides: Iterable[str],
    of_run: str = RUN_CONFIG,
    within: Path | None = None,
) -> Settings:
    """Read settings of any `kind`; `of_run` is their file in a run directory. Raises UserError as `load_settings`."""
    tree = read_named(file, of_run, within) if file else {}
    return checked(kind, overridden(tree, overrides))


def read_named(file: Path, of_run: str, within: Path | None = None) -> dict[str, Any]:
    """Read the file that `found_file` finds, and load the plug-ins that it names; raises UserError.

    Only a file that the user has named loads plug-ins. A file in a run directory does not: it may come from anywhere.
    """
    found = found_file(file, of_run)
    of_folder = found.name == of_run and file.name != of_run
    tree = read_tree(found, within=within)
    for key in set(_flat(tree)) & set(_MOVED_KEYS) if within is None and not of_folder else ():
        current_key(key)
    plugins = tree.get("plugins")
    if within is None and not of_folder and isinstance(plugins, list) and all(isinstance(p, str) for p in plugins):
        load_named(tree.pop("plugins"), found.parent)
    return tree


def load_named(plugins: Iterable[str], beside: Path | None = None) -> None:
    """Load plug-ins; their files are looked for `beside` the file that names them. Raises UserError."""
    for plugin in plugins:
        load_plugin(plugin, beside)


def found_file(given: Path, of_run: str = RUN_CONFIG) -> Path:
    """Return the file that `given` names, looked for in the current folder, then in ML2O_HOME, as run directories are.

    If `given` is a run directory, return its file `of_run`.

    Raises:
        UserError: the file is in neither folder.
    """
    here, home = Path.cwd(), home_folder()
    paths = [str(given), str(home / given)]
    for path in paths:
        if os.path.isdir(path) and os.path.isfile(os.path.join(path, of_run)):
            return Path(path, of_run)
        if os.path.exists(path) and not os.path.isdir(path):
            return Path(path)
    folder = any(map(os.path.isdir, paths))
    if given.is_absolute() and not folder:
        return given  # the code that reads it reports why it cannot be read
    where = f"the current folder, {here}" + (f", nor in ML2O_HOME, {home}" if home != here else "")
    what = f"is a folder without {of_run}" if folder else "does not exist"
    raise UserError(f"config file {str(given)!r} {what}" + ("" if given.is_absolute() else f" in {where}"))


def overridden(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `key=value` overrides to a nested mapping, in order; returns it. Raises UserError."""
    for override in overrides:
        _override(tree, override)
    return tree


def parse_settings(tree: Any) -> MetaTrainSettings:
    """Check a nested mapping of settings; raises UserError as `load_settings` does."""
    return checked(MetaTrainSettings, tree)


def resolve_settings(settings: Job) -> Job:
    """Resolve what depends on this process: workers have other folders and environments, a resumed run other GPUs.

    `device: auto` is cuda where the workers ask for a share of a GPU, else cpu. Raises UserError for `data.root`.
    """
    device = "cuda" if settings.resources.num_gpus > 0 else "cpu"
    return settings.model_copy(
        update={
            "data": DataSettings(root=str(data_folder(settings.data.root))),
            **({"init_from": located(settings.init_from)} if isinstance(settings, MetaTrainSettings) else {}),
            "device": device if settings.device == "auto" else settings.device,
        }
    )


def dump_settings(settings: BaseModel) -> str:
    """Return the resolved settings as YAML; reading it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json", by_alias=True), sort_keys=False)


def settings_hash(settings: BaseModel) -> str:
    """Return the sha256 of the resolved settings."""
    tree = settings.model_dump(mode="json", by_alias=True)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def first_difference(ours: MetaTrainSettings, theirs: MetaTrainSettings) -> str:
    """Name the first key that determines the weights and differs, with both values; "" where there is none."""
    left, right = (_flat(s.model_dump(mode="json", by_alias=True)) for s in (ours, theirs))
    for key in sorted(left.keys() | right.keys()):
        if key.split(".")[0] not in _OPERATIONAL and left.get(key) != right.get(key):
            return f"{key} is {left.get(key)!r} here and {right.get(key)!r} there"
    return ""


def flat_settings(settings: BaseModel) -> dict[str, Any]:
    """Return every setting by its dotted key, as plain values."""
    return _flat(settings.model_dump(mode="json", by_alias=True))


def changed_settings(settings: MetaTrainSettings) -> tuple[str, dict[str, Any]]:
    """Return, in words, what a run's settings are compared with, and the settings that differ from it by dotted key.

    Settings that share problems with the embedded default were made from it and are compared with it. Others are
    compared with the defaults of config.py; as these include no family, the whole family counts as different. Values
    that a run resolves by itself (`data.root` and the device behind `auto`) do not count.
    """
    embedded = load_settings()
    shared = any(getattr(settings.family, part) == getattr(embedded.family, part) for part in _PROBLEMS)
    base = embedded if shared else MetaTrainSettings(family=settings.family)
    ours, theirs = flat_settings(settings), flat_settings(base)
    if ours["device"] == ("cuda" if settings.resources.num_gpus > 0 else "cpu"):
        theirs["device"] = ours["device"]
    changed = {
        key: value
        for key, value in ours.items()
        if key != "data.root" and (theirs.get(key) != value or (key.startswith("family.") and not shared))
    }
    return ("the embedded default" if shared else "the defaults of config.py"), changed


def checked(kind: type[Settings], tree: Any) -> Settings:
    """Check a nested mapping of settings of any `kind`; raises UserError as `load_settings` does."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _one_line(kind, error, tree) from None


def read_tree(source: Path, extended: tuple[Path, ...] = (), within: Path | None = None) -> dict[str, Any]:
    """Read a YAML file, merged over the one that it extends; both lie in `within`, if given. Raises UserError."""
    try:
        tree = read_yaml(source, "config file", within)
    except FileNotFoundError as error:
        raise UserError(f"config file {str(source)!r} cannot be read: {error.strerror}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {str(source)!r} must hold `key: value` lines, not {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"config file {str(source)!r}: extends must name a file, not {one_line(repr(base))}")
    chain = (*extended, source.absolute())
    below = source.absolute().parent / base
    if any(_is_same_file(below, each) for each in chain):
        raise UserError(f"config file {str(source)!r} extends itself")
    if len(chain) > MOST_EXTENDED:
        raise UserError(f"config file {str(source)!r} extends more than {MOST_EXTENDED} files, one after the other")
    return laid_over(read_tree(below, chain, within), tree)


def _is_same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except (OSError, ValueError):  # the code that reads it reports why it cannot be read
        return False


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above`, mapping by mapping."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        if key == "rule" and isinstance(value, dict):
            under = _of_kind(under, value.get("kind"))
        both[key] = laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    shown = f"--set {_short(override)!r}"
    if not equals or not key.strip():
        raise UserError(f"{shown} is not of the form dotted.key=value")
    value = "" if text == "" else parse_yaml(text, f"{shown}: the value")
    put(tree, key.strip(), value, shown)


def put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Put `value` into a nested mapping at a dotted `key`; raises UserError, which names the `source` of both."""
    key = current_key(key)
    *path, last = key.split(".")
    if len(path) > MOST_GROUPS:
        raise UserError(f"{source}: no setting lies {len(path)} groups deep")
    node: Any = tree
    for part in path:
        if node.get(part) is None:  # a group that is off is None in a resolved configuration
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"{source}: {part!r} is a value, it has no keys below it")
    if path[-1:] == ["rule"] and last == "kind":
        kept = _of_kind(node, value)
        node.clear()
        node.update(kept)
    node[last] = value


_MOVED_KEYS = {"slots": "meta_batch_size", "begin": "init_from", "rule.count": "rule.num_objectives"}
"""Keys of older versions as a user may still write them."""


def current_key(key: str, warn: bool = True) -> str:
    """Return the present name of a dotted key of an older version, and warn once if a user wrote it."""
    for prefix in ("", "meta_train.", "space."):
        new = _MOVED_KEYS.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if new is not None:
            if warn:
                _say_renamed(key, f"{prefix}{new}")
            return f"{prefix}{new}"
    return key


@cache
def _say_renamed(old: str, new: str) -> None:
    log.warning("the setting %s is called %s now; the old name goes on working", old, new)


def _of_kind(rule: Any, kind: Any) -> Any:
    """Return the settings of a rule without those that another `kind` of rule lacks."""
    if not isinstance(rule, dict) or kind in (None, rule.get("kind", "coordinatewise")):
        return rule
    return {key: value for key, value in rule.items() if key in LearnedRuleSettings.model_fields}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _one_line(kind: type[BaseModel], error: ValidationError, tree: Any) -> UserError:
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: each["type"] == "missing")  # "missing" errors last: the key may be misspelt
    place = one_line(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        model = _model_at(kind, first["loc"][:-1], tree)
        return unknown("setting", place, [_join(first["loc"][:-1], key) for key in _keys(model)])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(f"{place}: {cause}")
    where = f"setting {place!r}" if place else "settings"
    if first["type"] == "missing":
        return UserError(
            f"{where} is missing: a config file says everything that has no default, or begins with `extends: FILE`, "
            f"another file that it only changes, as {DEFAULT_CONFIG}"
        )
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    given = "" if first["type"] == "value_error" else f", not {_short(repr(first['input']))}"
    message = message.replace("a valid tuple", "a list, as [a, b]")
    verb = "must " if message.startswith("be ") else ""
    return UserError(f"{where}: {verb}{message[0].lower()}{message[1:]}{given}")


def _model_at(model: type[BaseModel], path: tuple[int | str, ...], tree: Any) -> type[BaseModel]:
    """Return the settings at `path` in settings of kind `model`; `tree` gives the kind of their rule."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
        if isinstance(part, str) and (found := _annotation(model, part)) is not None:
            model = found
            if model is LearnedRuleSettings:
                model = RULE_SETTINGS[tree.get("kind", "coordinatewise") if isinstance(tree, Mapping) else ""]
    return model


def _annotation(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    info = model.model_fields.get(key)
    if info is None:
        return None
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _join(path: tuple[int | str, ...], key: str) -> str:
    return ".".join([*(str(part) for part in path), key])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
