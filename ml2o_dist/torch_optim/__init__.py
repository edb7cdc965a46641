"""Learned optimizers as `torch.optim.Optimizer`: ML2O and, guarded, GML2O."""

from ml2o_dist.torch_optim.optimizers import GML2O, ML2O

__all__ = ["GML2O", "ML2O"]
