"""Suites: named evaluations, as YAML files in the package or elsewhere. Results record the hash of their suite."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ml2o_dist.config import EvaluateSettings, MetaTrainSettings, ShareSettings
from ml2o_dist.config_file import load_evaluation
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.files import home_folder

FOLDER = Path(__file__).parents[1] / "suites"

_LEFT_OUT = ("plugins", "suite", "about", "optimizers", "rule", "guard", "device", "resources", "data", "tracking")
"""Settings that do not change how optimizers are measured: which ones are evaluated, and where."""


def suite_names() -> list[str]:
    """Return the names of the suites in the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def suite_file(suite: str) -> Path:
    """Return the file of a suite by its name, or by its path, relative to ML2O_HOME.

    Raises:
        UserError: neither a name nor a YAML file.
    """
    if suite in suite_names():
        return FOLDER / f"{suite}.yaml"
    if suite.endswith((".yaml", ".yml")):
        return home_folder() / suite
    error = unknown("suite", suite, suite_names())
    raise UserError(f"{error}; a suite of your own is a file: its path ends in .yaml")


def load_suite(suite: str, overrides: tuple[str, ...] = ()) -> EvaluateSettings:
    """Read a suite, then apply `key=value` overrides. Overrides that change its figures remove its name.

    Raises:
        UserError: as `load_evaluation` does; or a suite without problems or baselines.
    """
    file = suite_file(suite)
    plain = load_evaluation(file)
    for what in ("problems", "baselines"):
        if not getattr(plain, what):
            raise UserError(f"suite {str(file)!r} names no {what}")
    return _named(load_evaluation(file, overrides), file.stem, plain)


def comparison_settings(settings: MetaTrainSettings) -> EvaluateSettings:
    """Return the evaluation at the end of a meta-training: its suite on the problems of `family.test`.

    The result keeps the suite's name if the problems and all other hashed settings are the suite's own.

    Raises:
        UserError: as `load_suite` does.
    """
    chosen = settings.comparison.model_dump(exclude={"suite"}, exclude_none=True)
    plain = load_suite(settings.comparison.suite)
    changed = plain.model_copy(
        update=chosen
        | {
            "problems": settings.family.test,
            "device": settings.device,
            "rule": settings.rule.model_copy(update={"guard": None}),
            "resources": ShareSettings(num_cpus=settings.resources.num_cpus, num_gpus=settings.resources.num_gpus),
            "data": settings.data,
        }
    )
    return _named(changed, plain.suite, plain)


def _named(settings: EvaluateSettings, name: str, plain: EvaluateSettings) -> EvaluateSettings:
    same = suite_sha256(settings) == suite_sha256(plain)
    return settings.model_copy(update={"suite": name if same else ""})


def suite_sha256(settings: EvaluateSettings) -> str:
    """Return the sha256 of the settings that optimizers are measured by: problems, baselines, seeds, steps, tuning."""
    tree: dict[str, Any] = settings.model_dump(mode="json", exclude=set(_LEFT_OUT))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
