"""Reference of all settings by dotted key: default, range and meaning."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ml2o_dist.config import (
    RULE_SETTINGS,
    LearnedRuleSettings,
    MemberSettings,
    MetaTrainSettings,
    PluginSettings,
    RuleSettings,
)
from ml2o_dist.config_file import flat_settings, load_settings
from ml2o_dist.runtime.errors import unknown

_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: dotted, as `--set` takes it.
        default: as YAML would have it; None: it must be given.
        allowed: its kind and range.
        meaning: what it does.
        embedded: its value in the embedded configuration, which `ml2o meta-train` runs without `--config`; None for
            settings of other commands.
    """

    key: str
    default: str | None
    allowed: str
    meaning: str
    embedded: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as `ml2o settings --json` prints it."""
        return asdict(self)


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield all settings of a kind, group by group."""
    for name, info in model.model_fields.items():
        key = f"{prefix}{info.alias or name}"
        group = _group(info.annotation)
        if group is None:
            yield Setting(key, _default(info), _allowed(info), info.description or "")
            continue
        if group is LearnedRuleSettings:
            yield from settings_of(RuleSettings, f"{key}.")
            shared = {each.key for each in settings_of(LearnedRuleSettings, f"{key}.")} | {f"{key}.kind"}
            for kind, others in RULE_SETTINGS.items():
                if kind != "coordinatewise":
                    own = (each for each in settings_of(others, f"{key}.") if each.key not in shared)
                    yield from (replace(each, meaning=f"of {key}.kind={kind}: {each.meaning}") for each in own)
            continue
        yield from settings_of(group, f"{key}.")


def meta_train_settings() -> list[Setting]:
    """Return the settings of a meta-training, each with its value in the embedded configuration."""
    embedded = flat_settings(load_settings(None))
    return [
        replace(each, embedded=_written(embedded[each.key])) if each.key in embedded else each
        for each in settings_of(MetaTrainSettings)
    ]


def chosen(settings: list[Setting], key: str) -> list[Setting]:
    """Return the setting of a key, or all of a group; raises UserError with the nearest key."""
    found = [each for each in settings if each.key == key or each.key.startswith(f"{key}.")]
    if not found:
        group = key.rpartition(".")[0]
        near = {each.key for each in settings if each.key.rpartition(".")[0] == group} if group else set()
        raise unknown("setting", key, near or {each.key.partition(".")[0] for each in settings})
    return found


def _group(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind if get_origin(annotation) in (None, Union, types.UnionType) else None
    return None


def _default(info: FieldInfo) -> str | None:
    return None if info.is_required() else _written(info.get_default(call_default_factory=True))


def _written(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, default=str)


def _allowed(info: FieldInfo) -> str:
    kind, metadata = _kind(info.annotation)
    limits = [*metadata, *info.metadata]
    bounds = [f"{sign} {getattr(each, name):g}" for name, sign in _BOUNDS for each in limits if hasattr(each, name)]
    return ", ".join([kind, *bounds])


def _kind(annotation: Any) -> tuple[str, list[Any]]:
    """Return what kind of value it is, in words, and the limits that are part of it."""
    if hasattr(annotation, "__metadata__"):
        kind, limits = _kind(annotation.__origin__)
        return kind, [*limits, *annotation.__metadata__]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts)), []
    if origin in (Union, types.UnionType):
        found = [_kind(part) for part in parts]
        return " or ".join(kind for kind, _ in found), [limit for _, limits in found for limit in limits]
    if origin is tuple:
        return f"list of {_kind(parts[0])[0]}", []
    if origin is dict:
        return "mapping", []
    if annotation is PluginSettings:
        return "plug-in", []
    if annotation is MemberSettings:
        return "{problem, weight, choices}", []
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", "value")), []
