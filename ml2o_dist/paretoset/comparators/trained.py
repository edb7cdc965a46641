"""Comparators that train networks: one for each preference, or one that takes the preference."""

from __future__ import annotations

from ml2o_dist.paretoset.comparators.base import Ingredients, register_comparator
from ml2o_dist.paretoset.conditioned import Conditioned, ConditionedInput, Hypernetwork, Plain, WeightLine
from ml2o_dist.paretoset.experts import network_of


@register_comparator("ls", training="ray")
@register_comparator("epo", training="ray", loss="epo")
@register_comparator("mgda", training="once", aggregator="mgda")
def plain(given: Ingredients) -> Conditioned:
    """A network of its own: the linear scalarization, exact Pareto optimal search, and MGDA, which knows no ray."""
    return Plain(given.network)


@register_comparator("phn-ls", training="all")
@register_comparator("phn-epo", training="all", loss="epo")
def hypernetwork(given: Ingredients) -> Conditioned:
    """A Pareto hypernetwork (Navon et al. 2021)."""
    return Hypernetwork(given.network, given.tasks.count, given.settings.seed)


@register_comparator("cosmos", training="all", loss="cosmos")
def cosmos(given: Ingredients) -> Conditioned:
    """The preference as an input (Ruchte & Grabocka 2021)."""
    return ConditionedInput(given.network, given.tasks.count, given.settings.seed)


@register_comparator("pamal", training="all")
def pamal(given: Ingredients) -> Conditioned:
    """A line, or simplex, of weights (Dimitriadis et al. 2023)."""
    settings, tasks = given.settings, given.tasks
    ends = [network_of(tasks, settings.network, settings.seed + t) for t in range(tasks.count)]
    return WeightLine(given.network, ends)
