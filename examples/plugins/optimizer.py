"""An optimizer to compare with: any function from parameters to a `torch.optim.Optimizer`.

    ml2o evaluate --plugin examples/plugins/optimizer.py --optimizer nadam --optimizer mgda+nadam@0.01 \
        --problem quadratic
"""

from collections.abc import Iterable

import torch

from ml2o_dist import register_optimizer


@register_optimizer("nadam")
def nadam(parameters: Iterable[torch.nn.Parameter], lr: float = 0.002) -> torch.optim.Optimizer:
    """Adam with Nesterov's momentum; its learning rate is tuned where none is written."""
    return torch.optim.NAdam(parameters, lr=lr)
