"""Learned multi-objective optimizers, meta-trained on Ray and versioned in MLflow."""

from ml2o_dist.artifact import Artifact, load_artifact, save_artifact
from ml2o_dist.config import MetaTrainSettings, RuleSettings
from ml2o_dist.config_file import load_settings
from ml2o_dist.errors import UserError
from ml2o_dist.problems import Problem, ProblemContext, ProblemFamily, ProblemSpec
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.ml2o import ML2ONetwork, ML2ORule

__all__ = [
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
