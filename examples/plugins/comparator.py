"""A Pareto comparator: a way to merge the experts, for each preference.

ml2o pareto-set train --plugin examples/plugins/comparator.py --set comparators=[soup,slerp]
"""

import torch

from ml2o_dist import Ingredients, Merged, register_comparator


@register_comparator("slerp")
def slerp(given: Ingredients) -> Merged:
    """Rewarded soup whose task vectors keep their mean length."""
    names = [name for name in given.start if given.start[name].is_floating_point()]
    steps = [{name: expert[name] - given.start[name] for name in names} for expert in given.experts]
    states = []
    for ray in given.rays:
        state = dict(given.start)
        for name in names:
            parts = [float(r) * step[name] for r, step in zip(ray, steps, strict=True)]
            length = sum(part.norm() for part in parts)
            mixed = torch.stack(parts).sum(dim=0)
            state[name] = given.start[name] + mixed * (length / mixed.norm().clamp_min(1e-12))
        states.append(state)
    return Merged(given.rays, states)
