"""The evolution strategy against closed forms: quadratic and linear meta-losses, whose smoothed gradients are known."""

from __future__ import annotations

import math

import pytest
import torch

from ml2o_dist.config import EstimatorSettings
from ml2o_dist.metatrain.estimators.es import evolution_strategy


def settings(**changes):
    return EstimatorSettings(kind="es", meta_loss="normalised", step_weights="uniform", **changes)


def trial_of(function):
    """An episode of one step whose meta-loss is function(theta): the losses at z_0 are 1."""

    def trial(theta):
        return torch.stack((torch.ones(1, 1), function(theta).reshape(1, 1)))

    return trial


@pytest.mark.parametrize("sigma", [0.01, pytest.param(1.0, marks=pytest.mark.long)])
def test_the_mean_over_many_pairs_is_the_gradient_of_a_quadratic(sigma):
    """Smoothing adds a constant to a quadratic, so that the estimate is unbiased for its own gradient at any sigma."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    centre, theta = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])

    def function(x):
        return 10 + 0.5 * (x - centre) @ matrix @ (x - centre)

    pairs = 4000
    loss, gradient, losses = evolution_strategy(
        theta, trial_of(function), settings(sigma=sigma, pairs=pairs), "normalised", None, 3
    )
    expected = matrix @ (theta - centre)
    # variance of one coordinate of one pair, (g e) e_i: |g|^2 + g_i^2
    error = ((expected.square().sum() + expected.square()) / pairs).sqrt()
    assert ((gradient - expected).abs() < 4 * error).all()
    smoothed = function(theta) + 0.5 * sigma**2 * matrix.trace()
    assert loss == pytest.approx(smoothed.item(), rel=0.02)
    assert losses.shape == (2, 1, 1)


def test_a_pair_gives_the_directional_derivative_along_its_direction():
    slope, seen = torch.tensor([2.0, -1.0, 0.5, 4.0]), []

    def function(x):
        seen.append(x)
        return slope @ x

    _, gradient, _ = evolution_strategy(torch.zeros(4), trial_of(function), settings(sigma=0.5), "normalised", None, 0)
    direction = seen[0] / 0.5
    assert torch.equal(seen[1], -seen[0])
    torch.testing.assert_close(gradient, (slope @ direction) * direction)


def test_perturbations_are_named_by_the_seed():
    def gradient(seed):
        return evolution_strategy(torch.zeros(3), trial_of(torch.sum), settings(), "normalised", None, seed)[1]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_trial_that_is_not_finite_shows(bad):
    loss, gradient, losses = evolution_strategy(
        torch.zeros(2), trial_of(lambda x: x.sum() * bad), settings(), "normalised", None, 0
    )
    assert not loss.isfinite()
    assert not losses.isfinite().all()
    assert not gradient.isfinite().all()
