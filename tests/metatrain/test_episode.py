"""An episode is a pure function; what is not finite is said, not hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ml2o_dist.config import EstimatorSettings, GuardSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork

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


def test_objectives_are_rescaled_each_by_a_factor_of_its_own_between_the_bounds():
    factors = []
    for seed in range(40):
        spec = replace(SPEC, seed=seed, horizon=1)
        plain, scaled = (
            run_episode(weights(), each).losses[0] for each in (spec, replace(spec, objective_rescale=9.0))
        )
        factors.append(scaled / plain)
    logs = np.log(np.stack(factors)) / np.log(9)
    assert -1 <= logs.min() < -0.8
    assert 0.8 < logs.max() <= 1
    assert np.abs(logs[:, 0] - logs[:, 1]).mean() > 0.3


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


GUARDED = replace(SPEC, rule=RULE.model_copy(update={"guard": GuardSettings(budget=0.1)}))


@pytest.mark.parametrize("estimator", [EstimatorSettings(), EstimatorSettings(kind="es", sigma=0.1, pairs=2)])
def test_guarded_episodes_repeat_bit_for_bit_and_differ_from_unguarded_ones(estimator):
    spec = replace(GUARDED, estimator=estimator)
    one, two = run_episode(weights(0.3), spec), run_episode(weights(0.3), spec)
    assert np.array_equal(one.gradient, two.gradient)
    assert np.array_equal(one.losses, two.losses)
    assert one.finite
    free = run_episode(weights(0.3), replace(SPEC, estimator=estimator))
    assert not np.array_equal(one.losses, free.losses)
    assert one.losses[-1].sum() < free.losses[-1].sum()


@pytest.mark.parametrize("pairs", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_es_counts_its_episodes_and_meets_the_exact_gradient(pairs):
    """With many pairs and a small sigma the estimate is that of `exact`, up to its sampling error."""
    theirs = run_episode(weights(0.1), replace(SPEC, estimator=EstimatorSettings(kind="exact", clip=1e9)))
    estimator = EstimatorSettings(kind="es", sigma=0.003, pairs=pairs, clip=1e9)
    ours = run_episode(weights(0.1), replace(SPEC, estimator=estimator))
    assert ours.inner_steps == 2 * pairs * theirs.inner_steps
    assert ours.meta_loss == pytest.approx(theirs.meta_loss, rel=1e-3)
    # E|g - grad|^2 = (d + 1) |grad|^2 / pairs: along the gradient that is a standard error of sqrt(2 / pairs)
    projection = ours.gradient @ theirs.gradient / (theirs.gradient @ theirs.gradient)
    assert projection == pytest.approx(1, abs=4 * np.sqrt(2 / pairs))


def test_a_guard_keeps_an_episode_finite_that_blows_up_without_it():
    wild = replace(SPEC, rule=RULE.model_copy(update={"lr": 1e6}))
    guarded = replace(wild, rule=wild.rule.model_copy(update={"guard": GuardSettings()}))
    assert run_episode(weights(), replace(wild, estimator=None)).losses.max() > 1e6
    kept = run_episode(weights(), guarded)
    assert kept.finite
    assert kept.losses[-1].sum() < kept.losses[0].sum()
