"""SMG and DSSMG against a plain-Python reference, in any company, and where gradients and losses misbehave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems import ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.problems.analytic import Fonseca
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle, look
from ml2o_dist.rules.line_search import first_step
from ml2o_dist.rules.stochastic import DSSMG, SMG, DecreasingSteps, DSSMGState
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.crossed import crossed
from tests.rules import stochastic_reference as reference
from tests.rules.bowls import Bowls
from tests.rules.stochastic_reference import run, weights_of

RULES = [SMG, DSSMG]


def plain(problem: Bowls) -> tuple[reference.Bowl, list[float], Callable[[], reference.Rows]]:
    """Return the one instance of `problem`, its start and its noise, as plain Python."""
    box = None if problem.bounds is None else (problem.bounds[0][0].item(), problem.bounds[1][0].item())
    bowl = reference.Bowl(problem.curvatures[0].tolist(), problem.centres[0].tolist(), problem.scale, box)
    stream = generator("test")
    start = bowl.project(problem.initial_parameters([0])[0].tolist())
    return bowl, start, lambda: problem.sample_batch(stream)[0].tolist()


def assert_equal(values: Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(values[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 1), (2, 6), (3, 4), (5, 3)])
def test_dssmg_is_the_plain_python_one(m: int, n: int, scale: float) -> None:
    problem = Bowls(m=m, n=n, noise=0.5, scale=scale)
    bowl, start, draw = plain(problem)
    expected = reference.dssmg(bowl, start, 0.7, 0.3, draw)
    furthest = 0.0
    for point, state in run(DSSMG(p=0.7, c=0.3), problem, 60)[1:]:
        z, weights = next(expected)
        assert_equal(point, z)
        assert_equal(weights_of(state), weights)
        furthest = max(furthest, max(weights) - 1.0 / m)
    assert (furthest > 0.05) == (m > 1)


@pytest.mark.parametrize(("m", "n"), [(2, 6), (3, 4)])
def test_dssmg_in_a_box_is_the_plain_python_one(m: int, n: int) -> None:
    problem = Bowls(m=m, n=n, noise=0.5)
    problem.bounds = (torch.full((n,), 0.5, dtype=torch.float64), torch.full((n,), 8.0, dtype=torch.float64))
    bowl, start, draw = plain(problem)
    expected = reference.dssmg(bowl, start, 0.55, 1.0, draw)
    at_bound = 0
    for point, state in run(DSSMG(), problem, 60, torch.tensor([start], dtype=torch.float64))[1:]:
        z, weights = next(expected)
        assert_equal(point, z)
        assert_equal(weights_of(state), weights)
        at_bound += sum(x == 0.5 for x in z)
    assert at_bound > 20


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 1), (2, 6)])
def test_smg_is_the_plain_python_one(m: int, n: int, scale: float) -> None:
    problem = Bowls(m=m, n=n, noise=0.5, scale=scale)
    bowl, start, draw = plain(problem)
    expected = reference.smg(bowl, start, 0.6, draw)
    for point, _ in run(SMG(p=0.6), problem, 60)[1:]:
        assert_equal(point, next(expected))


@crossed("rule, n, m, dtype", RULES, [1, 7], [1, 2, 3, 5], [torch.float32, torch.float64])
def test_instances_move_as_alone(rule: type[DecreasingSteps], n: int, m: int, dtype: torch.dtype) -> None:
    start = Bowls(range(4), m, n, dtype=dtype).initial_parameters(range(4))
    point, state = run(rule(), Bowls(range(4), m, n, noise=0.3, dtype=dtype), 30, start)[-1]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for i in range(4):
        alone, own = run(rule(), Bowls([i], m, n, noise=0.3, dtype=dtype), 30, start[i : i + 1])[-1]
        torch.testing.assert_close(point[i : i + 1], alone, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state.alpha_0[i : i + 1], own.alpha_0, rtol=tolerance, atol=0)
    assert (point.shape, point.dtype) == ((4, n), dtype)
    assert ((point - start).abs().amax(dim=1) > 0.1).all()
    if isinstance(state, DSSMGState):
        assert (state.weights.shape, state.weights.dtype) == ((4, m), dtype)
        assert (state.weights >= 0).all()
        torch.testing.assert_close(state.weights.sum(dim=1), torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("rule", RULES)
def test_losses_in_other_units_give_the_same_run(rule: type[DecreasingSteps], scale: float) -> None:
    """The weights' steps as well: gamma is free of the losses' unit."""
    reference_run = run(rule(), Bowls(range(4), 3, noise=0.5, dtype=torch.float32), 50)
    scaled = run(rule(), Bowls(range(4), 3, noise=0.5, scale=scale, dtype=torch.float32), 50)
    torch.testing.assert_close(scaled[-1][0], reference_run[-1][0], rtol=1e-4, atol=1e-4)
    if rule is DSSMG:
        torch.testing.assert_close(weights_of(scaled[-1][1]), weights_of(reference_run[-1][1]), rtol=0, atol=1e-5)


def test_off_a_plateau_both_step_sizes_shrink() -> None:
    problem = Fonseca(ProblemContext(64, dtype=torch.float64), n=10)
    point = problem.initial_parameters(range(64))
    oracle, rule = Oracle(problem, generator("test")), DSSMG(c=0.5)
    seen = look(oracle, point)
    weights = torch.full_like(seen.losses, 0.5)
    found = first_step(oracle, point, seen.jacobian.mean(dim=1), weights, seen.losses, seen.batch)
    assert (found.steepening > 2).any()
    _, state = rule.propose(oracle, point, rule.initial_state(64, 2, ParameterLayout.vector(10)), seen)
    torch.testing.assert_close(state.alpha_0, found.alpha)
    square = seen.jacobian.square().sum(dim=(1, 2)) * found.steepening**2
    torch.testing.assert_close(0.5 * square * state.gamma_0, torch.ones(64, dtype=torch.float64))


class Broken(Bowls):
    """`Bowls` in which draw number `at` (1, 2, ..) has `value` in one entry of instance 1's batch."""

    at, value, drawn = 1, float("nan"), 0

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        batch = super().sample_batch(generator)
        self.drawn += 1
        if self.drawn == self.at:
            batch[1, 0, 2] = self.value
        return batch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_that_are_not_finite_end_their_own_instance_only(
    rule: type[DecreasingSteps], at: int, value: float
) -> None:
    """At the first batch, the second (of DSSMG), and later ones, whether or not they serve a search."""
    problem = Broken(range(3), noise=0.3)
    problem.at, problem.value = at, value
    trace, expected = run(rule(), problem, 5), run(rule(), Bowls(range(3), noise=0.3), 5)
    step = at if rule is SMG else (at + 1) // 2
    for t in range(6):
        assert trace[t][0][1].isnan().all() == (t >= step)
        assert torch.equal(trace[t][0][[0, 2]], expected[t][0][[0, 2]])


class Waking(Bowls):
    """`Bowls` whose losses are flat for the first `asleep` draws."""

    asleep, drawn = 3, 0

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        self.drawn += 1
        return torch.full_like(super().sample_batch(generator), float(self.drawn > self.asleep))

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return super().sample_losses(parameters, 0.0 * batch) * batch[:, None, :, 0]


@pytest.mark.parametrize("rule", RULES)
def test_a_flat_start_waits_at_no_cost_and_is_searched_again(rule: type[DecreasingSteps]) -> None:
    problem = Waking([0], m=2)
    problem.asleep = 3 * (2 if rule is DSSMG else 1)
    oracle, made = Oracle(problem, generator("test")), rule()
    point, state = problem.initial_parameters([0]), made.initial_state(1, 2, ParameterLayout.vector(4))
    for _ in range(3):
        following, state, _ = made.step(oracle, point, state)
        assert torch.equal(following, point)
        assert state.alpha_0.item() == 0.0
    assert oracle.forwards == 3 * (2 if rule is DSSMG else 1)  # no trial
    moved, after, _ = made.step(oracle, point, state)
    awake = run(made, Bowls([0], m=2), 1, point)[1][1]
    torch.testing.assert_close(after.alpha_0, awake.alpha_0)
    assert after.steps == 4
    assert not torch.equal(moved, point)


class Walled(Bowls):
    """`Bowls` whose losses are NaN everywhere but where instance 0 starts."""

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        at_start = (parameters == self.initial_parameters([0])).all(dim=1)
        return super().sample_losses(parameters, batch).where(at_start[:, None, None], torch.nan)


@pytest.mark.parametrize("rule", RULES)
def test_where_every_trial_is_nan_the_instance_stays(rule: type[DecreasingSteps]) -> None:
    trace = run(rule(), Walled([0]), 2)
    assert torch.equal(trace[2][0], trace[0][0])
    assert trace[2][1].alpha_0.item() == 0.0


def test_a_point_critical_in_the_box_stays_and_keeps_its_weights() -> None:
    """f_1 pulls out of the box: its gradient's outward part must not drive the weights away from it."""
    problem = Bowls(m=2, n=2)
    problem.curvatures = torch.ones(1, 2, 2, dtype=torch.float64)
    problem.centres = torch.tensor([[[1.0, -9.0], [-1.0, 0.0]]], dtype=torch.float64)
    problem.bounds = (torch.tensor([-5.0, 0.0], dtype=torch.float64), torch.tensor([5.0, 5.0], dtype=torch.float64))
    point, state = run(DSSMG(alpha_0=0.1), problem, 20, torch.zeros(1, 2, dtype=torch.float64))[-1]
    assert torch.equal(point, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(weights_of(state), torch.tensor([[0.5, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_a_look_and_a_proposal_charged_in_full(rule: type[DecreasingSteps]) -> None:
    problem, made = Bowls(range(2), m=3, noise=0.5), rule(alpha_0=0.25)
    point, state = problem.initial_parameters([0, 1]), made.initial_state(2, 3, ParameterLayout.vector(4))
    oracle, other = Oracle(problem, generator("a")), Oracle(problem, generator("a"))
    whole, after, info = made.step(oracle, point, state)
    seen = look(other, point)
    candidate, following = made.propose(other, point, state, seen)
    assert torch.equal(whole, candidate)
    assert torch.equal(info.jacobian, seen.jacobian)
    for field in dataclasses.fields(after):
        assert torch.equal(*(torch.as_tensor(getattr(each, field.name)) for each in (after, following)))
    charged = (oracle.batches, oracle.forwards, oracle.backwards)
    assert charged == ((2, 2, 4) if rule is DSSMG else (1, 1, 3))
    again, _ = made.propose(Oracle(problem, generator("b")), point, state, seen)
    assert torch.equal(again, whole)  # neither the point nor the state was changed in place
    assert state.steps == 0


def test_the_steps_are_read_off_the_state() -> None:
    rule = DSSMG(p=0.75, alpha_0=0.5)
    for t, (_, state) in enumerate(run(rule, Bowls(range(2), noise=0.1), 5)):
        assert rule.decay(state) == pytest.approx((t + 1) ** -0.75, rel=1e-15)
        torch.testing.assert_close(rule.alpha(state), torch.full((2,), 0.5 * (t + 1) ** -0.75, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_settings_without_a_guarantee_are_refused_by_name(rule: type[DecreasingSteps]) -> None:
    for p in (0.5, 1.01, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"{rule.__name__}: p is {p!r};.*0.5 < p <= 1"):
            rule(p=p)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"alpha_0 is {value!r};.*positive"):
            rule(alpha_0=value)
        with pytest.raises(UserError, match=rf"DSSMG: c is {value!r};.*positive"):
            DSSMG(c=value)
    assert rule(p=1.0).p == 1.0


@pytest.mark.parametrize("exponent", [-90, -40, 40, 80])
def test_a_power_of_two_on_all_losses_changes_no_point_and_no_weight(exponent):
    """In float32, where products of two gradients of this size have no place."""
    ends = []
    for factor in (1.0, 2.0**exponent):
        problem = ProblemSpec.parse("quadratic[n=6,noise=0.3,batch=8]").build(ProblemContext(2, 0))
        rule, oracle = DSSMG(), Oracle(Rescaled(problem, loss_scale=factor), torch.Generator().manual_seed(1))
        point = problem.initial_parameters([0, 1])
        state = rule.initial_state(2, 2, ParameterLayout.vector(6))
        for _ in range(30):
            point, state, _ = rule.step(oracle, point, state)
        ends.append((point, state.weights))
    assert not torch.equal(ends[0][1], torch.full((2, 2), 0.5))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
