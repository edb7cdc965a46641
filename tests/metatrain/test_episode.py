"""An episode is a pure function; what is not finite is said, not hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.ml2o import ML2ONetwork

RULE = RuleSettings(hidden=4, lr=0.05)
SPEC = EpisodeSpec(ProblemSpec.parse("quadratic[n=6,noise=0.1]"), 7, 12, 2, RULE, EstimatorSettings())


def weights(fill: float | None = None):
    state = ML2ONetwork(RULE).state_dict()
    return state if fill is None else {name: torch.full_like(t, fill) for name, t in state.items()}


def test_an_episode_repeats_bit_for_bit_and_changes_with_its_seed():
    one, two = run_episode(weights(), SPEC), run_episode(weights(), SPEC)
    assert np.array_equal(one.gradient, two.gradient)
    assert np.array_equal(one.losses, two.losses)
    assert (one.meta_loss, one.score) == (two.meta_loss, two.score)
    assert not np.array_equal(one.losses, run_episode(weights(), replace(SPEC, seed=8)).losses)


def test_shapes_and_counts():
    result = run_episode(weights(), SPEC)
    assert result.losses.shape == (13, 2)
    assert result.gradient.shape == (sum(t.numel() for t in weights().values()),)
    assert result.gradient.dtype == np.float32
    assert result.inner_steps == 24
    assert result.finite
    assert result.losses[-1].sum() < result.losses[0].sum()


def test_validation_asks_for_no_gradient_but_sees_the_same_trajectory():
    plain = run_episode(weights(), replace(SPEC, estimator=None))
    assert plain.gradient is None
    assert plain.finite
    assert np.isnan(plain.meta_loss)
    np.testing.assert_allclose(plain.losses, run_episode(weights(), SPEC).losses, rtol=1e-6)


def test_coordinates_are_a_share_and_change_the_gradient_only():
    half = replace(SPEC, estimator=EstimatorSettings(coordinates=0.5))
    one, two = run_episode(weights(), SPEC), run_episode(weights(), half)
    assert np.array_equal(one.losses, two.losses)
    assert not np.array_equal(one.gradient, two.gradient)


def test_the_gradient_is_clipped_to_its_norm_without_turning():
    free = run_episode(weights(), replace(SPEC, estimator=EstimatorSettings(clip=1e9))).gradient
    tight = run_episode(weights(), replace(SPEC, estimator=EstimatorSettings(clip=1e-4))).gradient
    assert np.linalg.norm(free) > 1e-4
    assert np.linalg.norm(tight) == pytest.approx(1e-4, rel=1e-4)
    assert np.dot(free, tight) / np.linalg.norm(free) / np.linalg.norm(tight) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("estimator", [EstimatorSettings(), EstimatorSettings(kind="exact"), None])
def test_weights_that_blow_up_give_a_result_that_says_so(estimator):
    result = run_episode(weights(50.0), replace(SPEC, estimator=estimator))
    assert not result.finite
    assert result.gradient is None


def test_exact_and_replay_see_the_same_losses():
    exact = run_episode(weights(), replace(SPEC, estimator=EstimatorSettings(kind="exact")))
    np.testing.assert_allclose(exact.losses, run_episode(weights(), SPEC).losses, rtol=1e-4)
    assert exact.finite
