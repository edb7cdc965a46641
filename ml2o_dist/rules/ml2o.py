"""Where the coordinatewise rule was: models that older versions registered bring code that imports it from here."""

from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule

__all__ = ["ML2ONetwork", "ML2ORule"]
