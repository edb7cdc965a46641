"""Former module of the coordinatewise rule; code in models that older versions registered still imports it here."""

from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule

__all__ = ["ML2ONetwork", "ML2ORule"]
