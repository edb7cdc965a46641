"""Pareto sets by fusion: models fine-tuned for single tasks become one model that takes a preference.

Tang, Shen, Luo et al. 2024, "Towards Efficient Pareto Set Approximation via Mixture of Experts Based Model Fusion"
(arXiv 2406.09770), and the methods it is compared with. T tasks, r the preference: r_t >= 0, sum r_t = 1.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml2o_dist.paretoset.fusion import Fusion
    from ml2o_dist.paretoset.merging import rewarded_soup, simple_average, task_arithmetic, ties
    from ml2o_dist.paretoset.saved_set import load_set
    from ml2o_dist.paretoset.task_vectors import TaskVectors

__all__ = ["Fusion", "TaskVectors", "load_set", "rewarded_soup", "simple_average", "task_arithmetic", "ties"]

_HOME = {"Fusion": "fusion", "TaskVectors": "task_vectors", "load_set": "saved_set"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'merging')}"), name)
    globals()[name] = value
    return value
