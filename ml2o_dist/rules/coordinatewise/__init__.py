"""The network of the paper: one LSTM step for every coordinate."""

from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork as ML2ONetwork
from ml2o_dist.rules.coordinatewise.rule import ML2ORule as ML2ORule
