"""The problems. Exports are imported at first use, because classes need torch and names and settings do not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ml2o_dist.problems.spec import (
    FamilyMember,
    ProblemFamily,
    ProblemSpec,
    problem_description,
    problem_names,
    problem_settings,
)

if TYPE_CHECKING:
    from ml2o_dist.problems.base import Batch, Problem, ProblemContext
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

_HOME = {"Batch": "base", "Problem": "base", "ProblemContext": "base", "Rescaled": "rescaled"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
