"""The learner against torch's Adam on the mean gradient, and its round trip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ml2o_dist.metatrain.episode import EpisodeResult
from ml2o_dist.metatrain.learner import Learner
from tests.metatrain.settings import small


def result(gradient):
    return EpisodeResult(0.0, 0.0, gradient, np.zeros((2, 2), np.float32), gradient is not None, 1, 1.0)


def gradients(learner, steps, slots, seed=0):
    size = sum(t.numel() for t in learner.weights.values())
    return np.random.default_rng(seed).normal(size=(steps, slots, size)).astype(np.float32) * 0.01


def flat(weights):
    return torch.cat([t.flatten() for t in weights.values()])


def test_updates_are_adam_on_the_mean_with_a_cosine_rate_and_clipping():
    settings = small(meta_steps=10, learner={"lr": 0.01, "final_lr": 0.001, "clip": 0.05, "ema": 0.0})
    learner = Learner(settings)
    theirs = flat(learner.weights).requires_grad_(True)
    adam = torch.optim.Adam([theirs], lr=0.01)
    for step, slots in enumerate(gradients(learner, 5, 3)):
        info = learner.update([result(g) for g in slots])
        theirs.grad = torch.from_numpy(slots.mean(axis=0))
        norm = torch.nn.utils.clip_grad_norm_([theirs], 0.05)
        rate = 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * step / 10))
        adam.param_groups[0]["lr"] = rate
        adam.step()
        assert info.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        assert info.learning_rate == pytest.approx(rate)
    assert torch.allclose(flat(learner.weights), theirs.detach(), atol=1e-6)
    assert torch.equal(flat(learner.averaged_weights), flat(learner.weights))


def test_slots_that_were_not_finite_are_left_out_and_counted():
    one, two = Learner(small()), Learner(small())
    first, second = gradients(one, 1, 2)[0]
    assert one.update([result(first), result(None), result(second)]).skipped == 1
    two.update([result(first), result(second)])
    assert torch.equal(flat(one.weights), flat(two.weights))


def test_a_step_without_any_finite_slot_changes_no_weight():
    learner = Learner(small())
    before = flat(learner.weights)
    info = learner.update([result(None), result(None)])
    assert info.skipped == 2
    assert math.isnan(info.gradient_norm)
    assert torch.equal(flat(learner.weights), before)
    assert learner.version == 1


def test_the_average_lags_behind():
    learner = Learner(small(learner={"ema": 0.9}))
    start = flat(learner.weights)
    for slots in gradients(learner, 6, 2):
        learner.update([result(g) for g in slots])
    moved, averaged = flat(learner.weights) - start, flat(learner.averaged_weights) - start
    assert 0 < averaged.norm() < moved.norm()


@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_learner_goes_on_bit_for_bit(before):
    learner = Learner(small())
    every = gradients(learner, 6, 2)
    for slots in every[:before]:
        learner.update([result(g) for g in slots])
    copy = Learner(small())
    copy.restore({name: t.clone() for name, t in learner.tensors().items()}, learner.version)
    for slots in every[before:]:
        learner.update([result(g) for g in slots])
        copy.update([result(g) for g in slots])
    assert torch.equal(flat(copy.weights), flat(learner.weights))
    assert torch.equal(flat(copy.averaged_weights), flat(learner.averaged_weights))
    assert copy.version == learner.version == 6


@pytest.mark.parametrize("before", [0, 11])
def test_a_step_to_weights_that_are_not_finite_is_refused_and_changes_nothing(before):
    """Adam's steps on equal gradients are learner.lr long: the 12th of 3e37 leaves what float32 can hold."""
    learner = Learner(small(meta_steps=100, learner={"lr": 3e37, "final_lr": 3e37, "clip": 1e9}))
    (slots,) = np.ones_like(gradients(learner, 1, 1))
    if before == 0:
        learner._theta.data.fill_(-3.3e38)
    for _ in range(before):
        learner.update([result(slots[0])])
    state, version = learner.tensors(), learner.version
    with pytest.raises(ArithmeticError, match=r"not.*finite.*learner\.lr=3"):
        learner.update([result(slots[0])])
    assert learner.version == version == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.tensors().items())
