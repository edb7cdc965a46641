"""Learned optimizers as `torch.optim.Optimizer`: ML2O and, guarded, GML2O."""

from ml2o_dist.torch_optim.gml2o import GML2O
from ml2o_dist.torch_optim.ml2o import ML2O

__all__ = ["GML2O", "ML2O"]
