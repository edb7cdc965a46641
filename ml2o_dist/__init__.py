"""Learned multi-objective optimizers, meta-trained on Ray and versioned in MLflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml2o_dist.artifact import Artifact, save_artifact
    from ml2o_dist.artifact_sources import load_artifact
    from ml2o_dist.config import EvaluateSettings, GuardSettings, LearnedRuleSettings, MetaTrainSettings, RuleSettings
    from ml2o_dist.config_file import load_settings
    from ml2o_dist.metatrain.estimators.base import Episode, Estimate, register_estimator
    from ml2o_dist.paretoset.comparators.base import Ingredients, Merged, register_comparator
    from ml2o_dist.plugins import load_plugin
    from ml2o_dist.problems.base import Batch, Problem, ProblemContext
    from ml2o_dist.problems.image_sets import register_images
    from ml2o_dist.problems.layout import ParameterLayout
    from ml2o_dist.problems.modules import ModuleProblem
    from ml2o_dist.problems.spec import ProblemFamily, ProblemSpec, register_problem
    from ml2o_dist.rules.aggregators import register_aggregator
    from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
    from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
    from ml2o_dist.rules.learned import LearnedRule, learned_rule, register_rule
    from ml2o_dist.rules.torch_optimizers import register_optimizer
    from ml2o_dist.runtime.errors import UserError
    from ml2o_dist.torch_optim import GML2O, ML2O
    from ml2o_dist.workflows.api import evaluate, meta_train, sweep, train_pareto_set

__all__ = [
    "GML2O",
    "ML2O",
    "Artifact",
    "Batch",
    "Episode",
    "Estimate",
    "EvaluateSettings",
    "GuardSettings",
    "Ingredients",
    "LearnedRule",
    "LearnedRuleSettings",
    "ML2ONetwork",
    "ML2ORule",
    "Merged",
    "MetaTrainSettings",
    "ModuleProblem",
    "Oracle",
    "ParameterLayout",
    "Problem",
    "ProblemContext",
    "ProblemFamily",
    "ProblemSpec",
    "RuleSettings",
    "StepInfo",
    "UpdateRule",
    "UserError",
    "evaluate",
    "learned_rule",
    "load_artifact",
    "load_plugin",
    "load_settings",
    "meta_train",
    "register_aggregator",
    "register_comparator",
    "register_estimator",
    "register_images",
    "register_optimizer",
    "register_problem",
    "register_rule",
    "save_artifact",
    "sweep",
    "train_pareto_set",
]

_HOME = {
    "Artifact": "artifact",
    "Batch": "problems.base",
    "Episode": "metatrain.estimators.base",
    "Estimate": "metatrain.estimators.base",
    "EvaluateSettings": "config",
    "GML2O": "torch_optim",
    "GuardSettings": "config",
    "Ingredients": "paretoset.comparators.base",
    "LearnedRule": "rules.learned",
    "LearnedRuleSettings": "config",
    "ML2O": "torch_optim",
    "ML2ONetwork": "rules.coordinatewise.rule",
    "ML2ORule": "rules.coordinatewise.rule",
    "Merged": "paretoset.comparators.base",
    "MetaTrainSettings": "config",
    "ModuleProblem": "problems.modules",
    "Oracle": "rules.base",
    "ParameterLayout": "problems.layout",
    "Problem": "problems.base",
    "ProblemContext": "problems.base",
    "ProblemFamily": "problems.spec",
    "ProblemSpec": "problems.spec",
    "RuleSettings": "config",
    "StepInfo": "rules.base",
    "UpdateRule": "rules.base",
    "UserError": "runtime.errors",
    "learned_rule": "rules.learned",
    "load_artifact": "artifact_sources",
    "load_plugin": "plugins",
    "load_settings": "config_file",
    "evaluate": "workflows.api",
    "meta_train": "workflows.api",
    "sweep": "workflows.api",
    "train_pareto_set": "workflows.api",
    "register_aggregator": "rules.aggregators",
    "register_comparator": "paretoset.comparators.base",
    "register_estimator": "metatrain.estimators.base",
    "register_images": "problems.image_sets",
    "register_optimizer": "rules.torch_optimizers",
    "register_problem": "problems.spec",
    "register_rule": "rules.learned",
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
