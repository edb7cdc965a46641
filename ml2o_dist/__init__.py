"""Learned multi-objective optimizers, meta-trained on Ray and versioned in MLflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml2o_dist.artifact import Artifact, load_artifact, save_artifact
    from ml2o_dist.config import MetaTrainSettings, RuleSettings
    from ml2o_dist.config_file import load_settings
    from ml2o_dist.errors import UserError
    from ml2o_dist.problems import Problem, ProblemContext, ProblemFamily, ProblemSpec
    from ml2o_dist.rules.base import Oracle, UpdateRule
    from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
    from ml2o_dist.torch_optim import GML2O, ML2O

__all__ = [
    "GML2O",
    "ML2O",
    "Artifact",
    "ML2ONetwork",
    "ML2ORule",
    "MetaTrainSettings",
    "Oracle",
    "Problem",
    "ProblemContext",
    "ProblemFamily",
    "ProblemSpec",
    "RuleSettings",
    "UpdateRule",
    "UserError",
    "load_artifact",
    "load_settings",
    "save_artifact",
]

_HOME = {
    "Artifact": "artifact",
    "GML2O": "torch_optim",
    "ML2O": "torch_optim",
    "ML2ONetwork": "rules.coordinatewise.rule",
    "ML2ORule": "rules.coordinatewise.rule",
    "MetaTrainSettings": "config",
    "Oracle": "rules.base",
    "Problem": "problems",
    "ProblemContext": "problems",
    "ProblemFamily": "problems",
    "ProblemSpec": "problems",
    "RuleSettings": "config",
    "UpdateRule": "rules.base",
    "UserError": "errors",
    "load_artifact": "artifact",
    "load_settings": "config_file",
    "save_artifact": "artifact",
}
"""The module of each public name. They are imported when first asked for: torch alone takes seconds, --help none."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
