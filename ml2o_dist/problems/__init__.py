"""What is optimized. Importing this package registers every problem by name."""

from ml2o_dist.problems import analytic as analytic
from ml2o_dist.problems import multitask as multitask
from ml2o_dist.problems import quadratic as quadratic
from ml2o_dist.problems import tabular as tabular
from ml2o_dist.problems.base import (
    Batch,
    FamilyMember,
    Problem,
    ProblemContext,
    ProblemFamily,
    ProblemSpec,
    problem_description,
    problem_names,
    problem_settings,
)
from ml2o_dist.problems.rescaled import Rescaled

__all__ = [
    "Batch",
    "FamilyMember",
    "Problem",
    "ProblemContext",
    "ProblemFamily",
    "ProblemSpec",
    "Rescaled",
    "problem_description",
    "problem_names",
    "problem_settings",
]
