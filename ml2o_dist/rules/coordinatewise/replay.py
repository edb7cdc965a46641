"""The fast replay of the coordinatewise rule: one pass of the LSTMs over the whole sequence and one back through it."""

from __future__ import annotations

import torch
from torch import Tensor

from ml2o_dist.rules.blocks import even_blocks
from ml2o_dist.rules.coordinatewise import features
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.rules.coordinatewise.unrolled import Unrolled
from ml2o_dist.rules.learned import Rollout

REPLAY_BLOCK = 32256
"""Columns (coordinates times objectives) times H replayed at a time: bounds the memory, which is K times a block's
states, and keeps a step in the cache (measured: half of it takes a tenth to a third longer, twice as much is alike; no
power of two, see `rule.BLOCK`)."""

GPU_REPLAY = 2**22
"""Columns times steps of a block on a GPU: a block costs thirty kernel launches a step, a column 0.5 kB a step."""


def replay(network: ML2ONetwork, rollout: Rollout, adjoints: Tensor, chunk: int) -> dict[str, Tensor]:
    """Return sum_s <a_s, du_s / dtheta> by meta-parameter, for a_s [K, P, S] (`LearnedRule.replay`).

    Every feature of a coordinate is a function of its own gradients and of the instance's alignment, which the rollout
    has recorded. All features are therefore computed at once. `Unrolled` then runs the LSTMs over the sequence of the
    chosen coordinates.
    """
    horizon, chosen = len(adjoints), adjoints.shape[2]
    adjoints = adjoints.flatten(start_dim=1)
    unit = rollout.record["unit"][-1]
    unit = torch.where(unit > 0, unit, 1.0)  # 0 where all gradients are 0
    gradients = (rollout.gradients[:-1] * unit[:, None, None]).transpose(1, 2).flatten(start_dim=2)
    alignment, totals = (rollout.record[name].repeat_interleave(chosen, dim=1) for name in ("alignment", "total"))
    counts = torch.arange(1, horizon + 1, device=alignment.device, dtype=alignment.dtype)[:, None]
    controls = [network.control] if network.settings.output == "controlled" else []
    by_controls = [torch.zeros_like(control) for control in controls]
    with torch.enable_grad():
        stacked = network.stacked_weights()
    on_cpu = gradients.device.type == "cpu"
    columns = REPLAY_BLOCK // network.settings.hidden if on_cpu else GPU_REPLAY // chunk
    blocks = even_blocks(gradients.shape[2], columns // gradients.shape[1])
    unrolled = Unrolled(stacked.detach(), network.settings, gradients.shape[1], chunk, blocks[0].stop)
    for block in blocks:
        inputs, directions = features.sequence(network.settings, gradients[:, :, block], alignment[:, block])
        for start in range(0, horizon, chunk):
            part = slice(start, start + chunk)
            outputs = unrolled.forward(inputs[part], restart=start == 0).requires_grad_(True)
            with torch.enable_grad():
                shift = network.shift(totals[part, block], counts[part])
                update = network.step_update(inputs[part], outputs, directions[part], shift)
                value = (update * adjoints[part, block]).sum() * rollout.scale
            by_outputs, *by_each = torch.autograd.grad(value, [outputs, *controls])
            unrolled.backward(by_outputs)
            for sum_, gradient in zip(by_controls, by_each, strict=True):
                sum_ += gradient
    sums = [*unrolled.gradients.tensors(), *by_controls]
    theta = dict(network.named_parameters())
    found = torch.autograd.grad([*stacked.tensors(), *controls], list(theta.values()), sums)
    return dict(zip(theta, found, strict=True))
