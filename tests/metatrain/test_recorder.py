"""What is recorded of a step agrees with closed forms, whichever estimator takes the step, and disturbs nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ml2o_dist.config import EstimatorSettings, RuleSettings
from ml2o_dist.metatrain.episode import EpisodeSpec, run_episode
from ml2o_dist.metatrain.recorder import TrajectoryRecorder
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork, ML2ORule
from ml2o_dist.runtime.seeding import derive_seed, generator

RULE = RuleSettings(hidden=4, lr=0.05)
REPLAY, EXACT = EstimatorSettings(), EstimatorSettings(kind="exact")


def spec(problem: str, instances: int = 1, estimator: EstimatorSettings | None = REPLAY, horizon: int = 6):
    return EpisodeSpec(ProblemSpec.parse(problem), 7, horizon, instances, RULE, estimator, record=True)


def weights():
    return ML2ONetwork(RULE).state_dict()


def recorded(jacobian, losses=None, before=None, after=None):
    """One step's figures for J [P, m, n]."""
    jacobian = torch.as_tensor(jacobian, dtype=torch.float32)
    instances, objectives, dimension = jacobian.shape
    zero = torch.zeros(instances, dimension)
    recorder = TrajectoryRecorder()
    recorder.add(
        jacobian,
        torch.zeros(instances, objectives) if losses is None else torch.as_tensor(losses),
        zero if before is None else torch.as_tensor(before),
        zero + 1 if after is None else torch.as_tensor(after, dtype=torch.float32),
    )
    return recorder.trajectory()


def test_a_step_by_hand():
    """g_1 = (3, 4), g_2 = (4, -3), g_3 = (-3, -4): lengths 5; right angle, opposite, right angle; mean (4/3, -1)."""
    step = recorded([[[3, 4], [4, -3], [-3, -4]]], [[1.0, 2.0, 3.0]], [[1.0, 1.0]], [[0.6, 1.0]])
    np.testing.assert_allclose(step.losses, [[[1, 2, 3]]])
    np.testing.assert_allclose(step.gradient_norms, [[[5, 5, 5]]])
    np.testing.assert_allclose(step.gradient_cosines, [[[0, -1, 0]]], atol=1e-7)  # pairs (0,1), (0,2), (1,2)
    np.testing.assert_allclose(step.update_norms, [[0.4]], rtol=1e-6)
    np.testing.assert_allclose(step.descent_cosines, [[0.8]], rtol=1e-6)  # (-0.4, 0) against (-4/3, 1)
    assert all(array.dtype == np.float32 for array in vars(step).values())


def test_straight_descent_is_1_and_straight_ascent_is_minus_1():
    gradient = [[[2.0, -6.0, 3.0]]]
    assert recorded(gradient, after=[[-2.0, 6.0, -3.0]]).descent_cosines[0, 0] == 1
    assert recorded(gradient, after=[[2.0, -6.0, 3.0]]).descent_cosines[0, 0] == -1


def test_a_zero_vector_has_cosine_0_and_what_is_not_finite_stays_so():
    step = recorded([[[0, 0], [1, 2]], [[math.nan, 1], [1, 2]], [[math.inf, 0], [1, 0]]])
    assert step.gradient_norms[0].tolist()[0] == [0, pytest.approx(math.sqrt(5))]
    assert step.gradient_cosines[0, 0, 0] == 0
    assert np.isnan(step.gradient_cosines[0, 1:, 0]).all()
    assert np.isnan(step.gradient_norms[0, 1, 0])
    assert step.gradient_norms[0, 2, 0] == math.inf
    assert np.isnan(step.descent_cosines[0, 1:]).all()
    still = recorded([[[1.0, 2.0]]], after=[[0.0, 0.0]])
    assert (still.update_norms[0, 0], still.descent_cosines[0, 0]) == (0, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_and_cosines_hold_where_squares_leave_float32(scale):
    step = recorded([[[3 * scale, 4 * scale], [4 * scale, 3 * scale]]], after=[[-7 * scale, -7 * scale]])
    np.testing.assert_allclose(step.gradient_norms, [[[5 * scale, 5 * scale]]], rtol=1e-6)
    np.testing.assert_allclose(step.gradient_cosines, [[[0.96]]], rtol=1e-6)
    np.testing.assert_allclose(step.descent_cosines, [[1]], rtol=1e-6)


@pytest.mark.parametrize("estimator", [REPLAY, EXACT], ids=["replay", "exact"])
@pytest.mark.parametrize(("objectives", "instances", "dimension"), [(2, 1, 5), (3, 3, 5), (1, 2, 4), (2, 1, 1)])
def test_an_episode_agrees_with_the_quadratic_s_closed_form(estimator, objectives, instances, dimension):
    """Walk the same points with the rule; gradients are A_i (z - c_i), written out from the coefficients."""
    asked = spec(f"quadratic[m={objectives},n={dimension}]", instances, estimator)
    trajectory = run_episode(weights(), asked).trajectory
    pairs = objectives * (objectives - 1) // 2
    assert trajectory.losses.shape == trajectory.gradient_norms.shape == (6, instances, objectives)
    assert trajectory.gradient_cosines.shape == (6, instances, pairs)
    assert trajectory.update_norms.shape == trajectory.descent_cosines.shape == (6, instances)

    problem = asked.problem.build(ProblemContext(instances, derive_seed("problem", asked.seed)))
    point = problem.initial_parameters([derive_seed("start", asked.seed, i) for i in range(instances)])
    rule = ML2ORule.from_weights(RULE, weights())
    oracle, state = (
        Oracle(problem, generator("batches", asked.seed)),
        rule.initial_state(instances, objectives, ParameterLayout.vector(dimension)),
    )
    hessians = problem.factors.transpose(2, 3) @ problem.factors  # [P, m, n, n]
    for k in range(6):
        offsets = point[:, None] - problem.centres
        gradients = (hessians @ offsets[..., None])[..., 0].numpy().astype(np.float64)
        losses = 0.5 * (offsets.numpy() * gradients).sum(axis=2)
        after, state, _ = rule.step(oracle, point, state)
        update, mean = (after - point).numpy().astype(np.float64), gradients.mean(axis=1)
        norms = np.linalg.norm(gradients, axis=2)
        np.testing.assert_allclose(trajectory.losses[k], losses, rtol=1e-3)
        np.testing.assert_allclose(trajectory.gradient_norms[k], norms, rtol=1e-3)
        cosines = [
            (gradients[:, i] * gradients[:, j]).sum(axis=1) / norms[:, i] / norms[:, j]
            for i in range(objectives)
            for j in range(i + 1, objectives)
        ]
        np.testing.assert_allclose(trajectory.gradient_cosines[k].T, np.reshape(cosines, (pairs, instances)), atol=1e-4)
        lengths = np.linalg.norm(update, axis=1)
        np.testing.assert_allclose(trajectory.update_norms[k], lengths, rtol=1e-3)
        expected = -(update * mean).sum(axis=1) / lengths / np.linalg.norm(mean, axis=1)
        np.testing.assert_allclose(trajectory.descent_cosines[k], expected, atol=1e-3)
        point = after


@pytest.mark.parametrize("estimator", [REPLAY, EXACT], ids=["replay", "exact"])
def test_the_update_is_the_move_after_projection(estimator):
    """zdt1's box: a huge step is cut off at it, so no move is longer than the box's diagonal."""
    asked = replace(spec("zdt1", estimator=estimator), rule=replace_lr(100.0))
    trajectory = run_episode(ML2ONetwork(asked.rule).state_dict(), asked).trajectory
    assert trajectory.update_norms.max() <= math.sqrt(30) * (1 + 1e-6)
    assert trajectory.update_norms[0, 0] > 0


def replace_lr(lr: float) -> RuleSettings:
    return RuleSettings(hidden=4, lr=lr)


@pytest.mark.parametrize("estimator", [REPLAY, EXACT, None], ids=["replay", "exact", "validation"])
def test_recording_changes_no_bit_of_the_rest(estimator):
    asked = spec("quadratic[m=3,n=6,noise=0.1]", 2, estimator)
    with_it, without = (run_episode(weights(), replace(asked, record=on)) for on in (True, False))
    assert without.trajectory is None
    assert (with_it.meta_loss, with_it.score) == (without.meta_loss, without.score) or estimator is None
    assert with_it.score == without.score
    assert np.array_equal(with_it.losses, without.losses)
    if estimator is not None:
        assert np.array_equal(with_it.gradient, without.gradient)


@pytest.mark.parametrize("estimator", [REPLAY, EXACT], ids=["replay", "exact"])
def test_an_episode_that_blows_up_is_recorded_as_it_was(estimator):
    state = {name: torch.full_like(t, 50.0) for name, t in weights().items()}
    result = run_episode(state, spec("quadratic[n=6,noise=0.1]", estimator=estimator, horizon=12))
    assert not result.finite
    assert result.trajectory.losses.shape == (12, 1, 2)
    assert not np.isfinite(result.trajectory.losses[-1]).all()
    assert np.isfinite(result.trajectory.losses[0]).all()
