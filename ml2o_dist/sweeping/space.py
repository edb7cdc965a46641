"""The search space of a sweep: read, checked before anything starts, and turned into a trial's settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from ml2o_dist.config import MetaTrainSettings
from ml2o_dist.config_file import (
    DEFAULT_CONFIG,
    checked,
    first_difference,
    flat_settings,
    found_file,
    laid_over,
    overridden,
    parse_settings,
    put,
    read_named,
    read_tree,
)
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.sweeping.settings import Distribution, SweepSettings

SETTINGS = "sweep.yaml"
"""The name of a sweep's settings file in its run directory."""

_NO_EFFECT = ("compare", "comparison", "trajectories", "tracking", "data", "checkpoint_every", "keep_checkpoints")
"""Settings that have no effect in a trial: only the best is registered, and every validation writes a checkpoint."""

_MUTABLE = (
    "learner.lr", "learner.final_lr", "learner.clip", "learner.ema", "estimator.gamma", "estimator.step_weights",
    "estimator.coordinates", "estimator.clip", "estimator.sigma", "horizon", "meta_batch_size", "instances",
    "family.rescale", "family.objective_rescale",
)  # fmt: skip
"""Settings that may change while a meta-training runs: not the rule, whose weights it trains, nor the run's length."""

MOST_CHECKED = 1000
"""How many combinations of a grid are tried before anything starts."""

_OPERATIONAL = ("tracking", "max_concurrent")
"""Settings that a resumed sweep may change."""


def load_sweep(file: Path | None, overrides: Iterable[str] = (), within: Path | None = None) -> SweepSettings:
    """Read a sweep's settings as `config_file.load_settings` does, with its `meta_train` from the file it names.

    `meta_train` is the name of a file beside this one, or a mapping of settings, which may begin with `extends: FILE`.
    If it is missing, or sets no `family` of its own, it overrides the embedded default.

    Raises:
        UserError: an unreadable file, a misspelt key or a wrong value, also among those of the space.
    """
    tree = read_named(file, SETTINGS, within) if file else {}
    return parse_sweep(tree, found_file(file, SETTINGS).parent if file else Path(), overrides, within)


def parse_sweep(
    tree: Mapping[str, Any], beside: Path, overrides: Iterable[str] = (), within: Path | None = None
) -> SweepSettings:
    """Check a mapping of a sweep's settings; `beside` is the folder of files it names. Raises as `load_sweep`."""
    given = tree.get("meta_train") or {}
    if isinstance(given, str):
        given = read_tree(beside / given, within=within)
    elif isinstance(given, Mapping) and "extends" in given:
        below = read_tree(beside / str(given["extends"]), within=within)
        given = laid_over(below, {key: value for key, value in given.items() if key != "extends"})
    if isinstance(given, dict) and "family" not in given:
        given = laid_over(read_tree(DEFAULT_CONFIG), given)
    whole = overridden({**tree, "meta_train": given}, overrides)
    _check_has_space(whole)
    settings = checked(SweepSettings, whole)
    check_space(settings)
    return settings


def _check_has_space(tree: Mapping[str, Any]) -> None:
    """Raise UserError if `space` is missing; a misspelt `space` is reported elsewhere as an unknown key."""
    others = tree.keys() - SweepSettings.model_fields
    if "space" in tree or others - MetaTrainSettings.model_fields.keys() - {"extends"}:
        return
    if others:
        hint = "this file looks like a meta-training's: name it in a sweep's file, as its `meta_train`"
    else:
        hint = "say it in the file that --config names, as jobs/configs/sweep.yaml, or with --set 'space={...}'"
    raise UserError(f"a sweep needs a `space`, the keys that it searches, as {_EXAMPLE}; {hint}")


_EXAMPLE = "`space: {learner.lr: {loguniform: [1e-4, 0.1]}}`"


def check_space(settings: SweepSettings) -> None:
    """Raise UserError unless a meta-training can be made with every value of the space, one key at a time.

    In a grid every combination must be valid; among drawn values an invalid combination is a trial that fails.
    Values that are only valid together should be given as one group: `estimator: {choice: [{...}, {...}]}`.
    """
    scores = settings.meta_train.validation.every
    if settings.scheduler != "none" and scores >= settings.meta_train.meta_steps:
        raise UserError(
            f"scheduler={settings.scheduler} decides by validations on the way: validation.every={scores} must be less "
            f"than meta_steps={settings.meta_train.meta_steps}"
        )
    if settings.scheduler == "asha" and settings.asha.grace > settings.meta_train.meta_steps:
        raise UserError(f"asha.grace={settings.asha.grace} is more than meta_steps={settings.meta_train.meta_steps}")
    if settings.scheduler == "pbt" and settings.pbt.interval % scores:
        raise UserError(f"pbt.interval={settings.pbt.interval} must be a multiple of validation.every={scores}")
    for key, distribution in settings.space.items():
        for value in distribution.values:
            try:
                trial = trial_settings(settings, {key: value})
            except UserError as error:
                raise UserError(f"space: {key}={json.dumps(value)}: {error}") from None
            if _yardstick(trial) != _yardstick(settings.meta_train):
                raise UserError(f"space: {key} changes what trials are validated on: their scores cannot be compared")
        if _within(key, _NO_EFFECT):
            raise UserError(f"space: {key} has no effect on a trial")
        if settings.scheduler == "pbt" and not _within(key, _MUTABLE):
            raise UserError(
                f"space: {key} cannot change while a meta-training runs, as scheduler=pbt needs it "
                f"(allowed: {', '.join(sorted(_MUTABLE))})"
            )
    if settings.search == "grid":
        _check_combinations(settings)
    keys = sorted(settings.space)
    for key in keys:
        if above := [other for other in keys if key.startswith(f"{other}.")]:
            raise UserError(f"space: {key} is a part of {above[0]}, which is there, too")


def _check_combinations(settings: SweepSettings) -> None:
    """Raise UserError if one of the first `MOST_CHECKED` combinations of a grid is invalid."""
    combinations = product(*(each.values for each in settings.space.values()))
    for combination in islice(combinations, MOST_CHECKED):
        values = dict(zip(settings.space, combination, strict=True))
        try:
            trial_settings(settings, values)
        except UserError as error:
            together = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            raise UserError(f"space: {together}: {error}") from None


def trial_settings(settings: SweepSettings, values: Mapping[str, Any]) -> MetaTrainSettings:
    """Return the settings of the trial that has these `values` by key; raises UserError."""
    tree = settings.meta_train.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        put(tree, key, copy.deepcopy(value), f"space.{key}")
    return parse_settings(tree)


def as_sampled(distribution: Distribution, value: Any) -> Any:
    """Return `value` for Ray Tune and Optuna: a value of a list as JSON text, since they take no lists or mappings."""
    return json.dumps(value) if distribution.interval is None else value


def as_values(settings: SweepSettings, sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by key from sampled ones, undoing `as_sampled`."""
    space = settings.space
    return {key: json.loads(sampled[key]) if space[key].interval is None else sampled[key] for key in space}


def sweep_difference(ours: SweepSettings, theirs: SweepSettings) -> str:
    """Return the first differing key that determines a sweep's results, with both values; "" if there is none."""
    left, right = flat_settings(ours), flat_settings(theirs)
    for key in sorted(left.keys() | right.keys()):
        same = left.get(key) == right.get(key) or key.startswith("meta_train.")
        if key.split(".")[0] not in _OPERATIONAL and not same:
            return f"{key} is {left.get(key)!r} here and {right.get(key)!r} there"
    difference = first_difference(ours.meta_train, theirs.meta_train)
    return f"meta_train.{difference}" if difference else ""


def _yardstick(settings: MetaTrainSettings) -> tuple[Any, ...]:
    return settings.family.validation, settings.validation.horizon, settings.validation.instances


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
