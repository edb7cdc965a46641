"""An aggregator: a function from the Jacobian to one direction.

ml2o evaluate --plugin examples/plugins/aggregator.py --optimizer normalized+adam@0.01 --problem quadratic
"""

from torch import Tensor

from ml2o_dist import register_aggregator


@register_aggregator("normalized")
def normalized(jacobian: Tensor) -> Tensor:
    """The mean of the objectives' gradients, each divided by its norm; `jacobian` [m, n]."""
    norms = jacobian.norm(dim=1, keepdim=True)
    return (jacobian / norms.clamp_min(1e-12)).mean(dim=0)
