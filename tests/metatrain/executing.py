"""What `Trainer.run` is given in place of workers, and what tells two trainers apart."""

from __future__ import annotations

import numpy as np

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.metatrain.episode import run_episode


class Cut(Exception):
    """Stands for whatever ends a run from outside."""


def in_process(items, weights):
    return [run_episode(weights, item.spec) for item in items]


def later(execute):
    """What `Trainer.run` asks for, of a loop over the items: it runs when its results are waited for."""
    return lambda items, weights: lambda: execute(items, weights)


def cut_after(calls):
    """An executor that works `calls` times and is then cut off."""
    left = [calls]

    def execute(items, weights):
        if not left[0]:
            raise Cut
        left[0] -= 1
        return in_process(items, weights)

    return execute


def digests(trainer):
    return weights_sha256(trainer.learner.weights), weights_sha256(trainer.best_weights)


def equal(results, expected):
    """Tell whether two lists of episodes have the same results, bit for bit."""
    return [r.meta_loss for r in results] == [r.meta_loss for r in expected] and all(
        np.array_equal(a.gradient, b.gradient) for a, b in zip(results, expected, strict=True)
    )
