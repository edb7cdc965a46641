"""Random quadratics against numpy, scipy's min-norm point and their own statistics."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.quadratic import Quadratic
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.problems.contract import check_named_problem, dominated
from tests.problems.oracles import min_norm

DOUBLE = torch.float64


def build(text: str, instances: int = 1, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Quadratic:
    problem = ProblemSpec.parse(text).build(ProblemContext(instances=instances, seed=seed, dtype=dtype))
    assert isinstance(problem, Quadratic)
    return problem


def hessians(problem: Quadratic, instance: int) -> Tensor:
    """Return A_i [m, n, n] of one instance, by differentiating the losses twice."""

    def objective(i: int, point: Tensor) -> Tensor:
        return problem.losses(point.expand(problem.instances, -1), None)[instance, i]

    start = torch.zeros(problem.dimension, dtype=DOUBLE)
    return torch.stack([hessian(partial(objective, i), start) for i in range(problem.objectives)])


@pytest.mark.parametrize(
    "text",
    [
        "quadratic",
        "quadratic[m=1]",
        "quadratic[m=3]",
        "quadratic[m=5,n=4]",
        "quadratic[n=1]",
        "quadratic[m=1,n=1]",
        "quadratic[condition=1]",
        "quadratic[condition=1000,n=60]",
        "quadratic[noise=0.5]",
        "quadratic[m=3,noise=2.0,batch=1]",
    ],
)
def test_contract(text: str) -> None:
    check_named_problem(text)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_condition_number_and_largest_eigenvalue_are_as_asked(m: int, condition: float) -> None:
    problem = build(f"quadratic[m={m},n=6,condition={condition}]", instances=2)
    for instance in range(2):
        matrices = hessians(problem, instance).numpy()
        eigenvalues = np.linalg.eigvalsh(matrices)
        np.testing.assert_allclose(matrices, matrices.transpose(0, 2, 1), atol=1e-12)
        np.testing.assert_allclose(eigenvalues[:, -1], 1.0, rtol=1e-9)
        np.testing.assert_allclose(eigenvalues[:, 0], 1.0 / condition, rtol=1e-7)


def test_a_single_coordinate_keeps_its_curvature_in_range() -> None:
    problem = build("quadratic[m=3,n=1,condition=10]", instances=4)
    curvatures = torch.cat([hessians(problem, instance).flatten() for instance in range(4)])
    assert ((curvatures >= 0.1) & (curvatures <= 1.0)).all()
    assert len(curvatures.unique()) == 12


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 5), (3, 5)])
def test_losses_and_jacobian_are_the_formula(m: int, n: int) -> None:
    problem = build(f"quadratic[m={m},n={n}]", instances=3)
    points = problem.initial_parameters([4, 5, 6])
    jacobian, losses = problem.jacobian(points, None)
    for p in range(3):
        matrices, point = hessians(problem, p).numpy(), points[p].numpy()
        for i in range(m):
            offset = point - problem.centres[p, i].numpy()
            assert losses[p, i].item() == pytest.approx(0.5 * offset @ matrices[i] @ offset)
            np.testing.assert_allclose(jacobian[p, i].numpy(), matrices[i] @ offset, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 1), (2, 10), (3, 4), (5, 10)])
def test_pareto_set_is_critical_and_starts_are_not(m: int, n: int) -> None:
    problem = build(f"quadratic[m={m},n={n}]")
    points = problem.pareto_set(20)
    assert len(points) == (1 if m == 1 else 20)
    for point in points:
        assert min_norm(problem.jacobian(point[None], None)[0][0].numpy()) < 1e-12
    far = problem.initial_parameters([0]) + 20.0
    assert min_norm(problem.jacobian(far, None)[0][0].numpy()) > 0.1


@pytest.mark.parametrize("m", [2, 3])
def test_pareto_points_minimise_the_weighted_sum(m: int) -> None:
    """Gradient descent with the step 1/L finds the same point from afar."""
    problem = build(f"quadratic[m={m},n=3,condition=4]")
    weights = torch.full((m,), 1.0 / m, dtype=DOUBLE)
    point = problem.initial_parameters([1])
    for _ in range(400):
        jacobian, _ = problem.jacobian(point, None)
        point = point - weights @ jacobian[0]
    if m == 2:
        torch.testing.assert_close(problem.pareto_set(3)[1], point[0])
    assert not dominated(problem.losses(point, None), problem.pareto_front(200)).any()
    assert not dominated(problem.pareto_front(200), problem.losses(point, None)).any()


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_front_reaches_every_minimum_and_is_not_dominated(m: int) -> None:
    problem = build(f"quadratic[m={m}]", instances=2)
    front = problem.pareto_front(30)
    assert problem.minima is not None
    torch.testing.assert_close(front.amin(dim=0), problem.minima[0], atol=1e-12, rtol=0)
    spread = torch.randn(500, 2, problem.dimension, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    tried = torch.stack([problem.losses(points, None)[0] for points in problem.pareto_set(30)[:1] + spread])
    assert not dominated(front, tried).any()


def test_reference_point_is_beyond_every_objective_at_the_others_minimisers() -> None:
    problem = build("quadratic[m=3]", instances=4)
    worst = torch.stack([problem.losses(problem.centres[:, j], None) for j in range(3)]).amax(dim=(0, 1))
    assert problem.reference_point is not None
    torch.testing.assert_close(problem.reference_point, 1.1 * worst)
    assert build("quadratic[m=1]").reference_point is None


def test_positive_only_without_noise() -> None:
    assert build("quadratic").positive
    noisy = build("quadratic[noise=5.0]")
    assert not noisy.positive
    assert (noisy.sample_losses(noisy.pareto_set(1), noisy.sample_batch(generator("n"))) < 0).any()


@pytest.mark.parametrize("condition", [10.0, 1e8])
def test_float32_is_never_rounded_below_zero(condition: float) -> None:
    problem = build(f"quadratic[condition={condition},n=20]", instances=50, dtype=torch.float32)
    for i in range(2):
        assert (problem.losses(problem.centres[:, i] * (1 + 1e-6), None) >= 0).all()


@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_noise_has_the_standard_deviation_asked_for_in_every_coordinate_of_the_gradient(noise: float) -> None:
    problem, exact = build(f"quadratic[n=3,noise={noise},batch=20000]"), build("quadratic[n=3]")
    point = problem.initial_parameters([0])
    batch = problem.sample_batch(generator("noise"))
    samples = problem.sample_losses(point, batch)
    assert samples.shape == (1, 20000, 2)
    expected, losses = exact.jacobian(point, None)
    # the samples' gradients are the exact one plus the noise drawn, and the losses move along with them
    ahead = problem.sample_losses(point + torch.tensor([[1e-4, 0.0, 0.0]], dtype=DOUBLE), batch)
    behind = problem.sample_losses(point - torch.tensor([[1e-4, 0.0, 0.0]], dtype=DOUBLE), batch)
    errors = (ahead - behind)[0] / 2e-4 - expected[0, :, 0]
    torch.testing.assert_close(errors.std(dim=0), torch.full((2,), noise, dtype=DOUBLE), rtol=0.03, atol=0)
    deviations = 4 * noise * point.norm().item() / 20000**0.5
    torch.testing.assert_close(samples.mean(dim=1), losses, rtol=0, atol=deviations)
    torch.testing.assert_close(problem.jacobian(point, batch)[0], expected, rtol=0, atol=5 * noise / 20000**0.5)
    assert np.corrcoef(errors.T.numpy())[0, 1] == pytest.approx(0, abs=0.03)


def test_noise_leaves_coefficients_set_and_front_alone() -> None:
    noisy, exact = build("quadratic[noise=1.0]"), build("quadratic")
    assert torch.equal(noisy.pareto_set(7), exact.pareto_set(7))
    assert torch.equal(noisy.pareto_front(7), exact.pareto_front(7))


def test_coefficients_are_named_by_seed_and_instance_alone() -> None:
    one, many, other = build("quadratic"), build("quadratic", instances=3), build("quadratic", seed=1)
    assert torch.equal(one.factors[0], many.factors[0])
    assert torch.equal(one.centres[0], many.centres[0])
    assert not torch.equal(many.centres[0], many.centres[1])
    assert not torch.equal(one.centres, other.centres)
    single = build("quadratic", dtype=torch.float32)
    assert torch.equal(single.centres, one.centres.float())
    torch.testing.assert_close(single.initial_parameters([3]), one.initial_parameters([3]).float())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("quadratic[m=0]", "quadratic: m is 0;.*integers >= 1"),
        ("quadratic[m=1.5]", "quadratic: m is 1.5"),
        ("quadratic[n=0]", "quadratic: n is 0"),
        ("quadratic[condition=0.5]", "quadratic: condition is 0.5;.*finite numbers >= 1"),
        ("quadratic[condition=nan]", "quadratic: condition is nan"),
        ("quadratic[condition=inf]", "quadratic: condition is inf"),
        ("quadratic[noise=-0.1]", "quadratic: noise is -0.1;.*finite numbers >= 0"),
        ("quadratic[noise=loud]", "quadratic.*noise .*'loud'"),
        ("quadratic[batch=0]", "quadratic: batch is 0"),
        ("quadratic[nois=1]", "did you mean 'noise'"),
    ],
)
def test_wrong_settings_are_named(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(text)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UserError, match="points is 0"):
        build("quadratic").pareto_set(0)
    with pytest.raises(ValueError, match="1 seeds for 2 instances"):
        build("quadratic", instances=2).initial_parameters([1])
