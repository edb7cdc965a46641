"""The hand-designed optimizers and the adversaries by name, without the libraries that they need to run."""

from __future__ import annotations

import ast
import math
from functools import cache
from pathlib import Path
from typing import Any

from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.registry import Registry

AGGREGATORS: Registry[Any] = Registry("aggregator", lambda: ["ml2o_dist.rules.aggregators"])
OPTIMIZERS: Registry[Any] = Registry("optimizer")
"""Torch optimizers that plug-ins register."""

OWN_OPTIMIZERS = {
    "sgd": "the direction times the learning rate",
    "momentum": "heavy ball, 0.9",
    "adam": "Adam (0.9, 0.999, 1e-8), bias-corrected",
}
"""This package's own optimizers for an aggregated direction."""


def aggregators() -> dict[str, str]:
    """Return the names of all aggregators, with a line about each."""
    return _described("aggregators.py", "_BUILT_IN") | _registered(AGGREGATORS)


def optimizers() -> dict[str, str]:
    """Return the optimizers for an aggregated direction, with a line about each."""
    return OWN_OPTIMIZERS | _registered(OPTIMIZERS)


def adversaries() -> dict[str, str]:
    """Return the adversaries, with a line about each."""
    return dict(_described("adversaries.py", "ADVERSARIES"))


def split_optimizer_name(text: str) -> tuple[str, str, float | None]:
    """Read `AGGREGATOR[+OPTIMIZER][@LR]` or `OPTIMIZER[@LR]` as (aggregator, optimizer, learning rate).

    By default the optimizer is `adam`, the aggregator `mean` and the learning rate None.

    Raises:
        UserError: an unknown aggregator or optimizer (the nearest name is given), or a learning rate that is not
            a positive, finite number.
    """
    names, at, rate = text.strip().partition("@")
    aggregator, plus, optimizer = names.partition("+")
    if not plus:
        aggregator, optimizer = ("mean", aggregator) if aggregator in OPTIMIZERS.registered() else (aggregator, "adam")
    if aggregator not in aggregators():
        raise unknown("aggregator", aggregator, aggregators(), extensible=True)
    if optimizer not in optimizers():
        raise unknown(f"optimizer in {names!r}:", optimizer, optimizers(), extensible=True)
    if not at:
        return aggregator, optimizer, None
    try:
        lr = float(rate)
    except ValueError:
        lr = math.nan
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"optimizer {text!r}: learning rate {rate!r} must be a positive, finite number")
    return aggregator, optimizer, lr


def _registered(registry: Registry[Any]) -> dict[str, str]:
    return {name: f"of the plug-in {plugin}" for name, plugin in registry.plugins.items()}


@cache
def _described(file: str, variable: str) -> dict[str, str]:
    """Return the keys of a table in the source, with the first text of each entry."""
    for node in ast.parse((Path(__file__).parent / file).read_text()).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == variable:
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): ast.literal_eval(value.args[0]) for key, value in pairs if key}  # type: ignore[attr-defined]
    raise AssertionError(f"{file} has no table {variable}")
