"""The contract of `Problem`, checked in one call by every implementation.

    check_named_problem("quadratic[m=3]")   # builds it for P in {1, 4}, float32 and float64, and checks each
    check_problem(problem)                  # one problem that is already built

Jacobians are compared with finite differences only in float64, where the differences are worth something: in every
coordinate where there are few, else along random directions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ml2o_dist.problems import Batch, Problem, ProblemContext, ProblemSpec
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator

EVERY_COORDINATE = 40  # finite differences: up to here in each coordinate, beyond along DIRECTIONS random ones
DIRECTIONS = 4
DIFFERENCE_STEP = 1e-5  # float64: balances truncation (step^2) and rounding (1e-16 / step)


def check_named_problem(text: str, *, data_root: str = "", instances: tuple[int, ...] = (1, 4)) -> None:
    """Check the problem that `text` names for every P in `instances`, in float32 and float64.

    Besides `check_problem`: equal contexts build equal problems, and the text survives parsing.
    """
    spec = ProblemSpec.parse(text)
    assert ProblemSpec.parse(str(spec)) == spec
    for dtype in (torch.float32, torch.float64):
        for count in instances:
            context = ProblemContext(instances=count, seed=7, dtype=dtype, data_root=data_root)
            problem, twin = spec.build(context), spec.build(context)
            assert problem.instances == count
            assert problem.dtype == dtype
            check_problem(problem)
            seeds = _seeds(problem)
            _assert_equal(problem.initial_parameters(seeds), twin.initial_parameters(seeds), "starts of a twin")
            start, batch = problem.initial_parameters(seeds), _draw(problem)
            _assert_equal(batch, _draw(twin), "batch of a twin")
            _assert_equal(problem.losses(start, batch), twin.losses(start, batch), "losses of a twin")


def check_problem(problem: Problem) -> None:
    """Assert everything that `Problem` promises of a built problem."""
    with _global_randomness_untouched():
        _check_starts(problem)
        _check_batches(problem)
        _check_losses(problem)
        _check_instances_apart(problem)
        _check_jacobian(problem)
        _check_box(problem)
        _check_knowledge(problem)
        _check_test_metrics(problem)


def _seeds(problem: Problem, offset: int = 0) -> list[int]:
    return [offset + 11 * i for i in range(problem.instances)]


def _draw(problem: Problem, stream: int = 0) -> Batch:
    return problem.sample_batch(generator("contract", stream))


def _shifted(problem: Problem, stream: int) -> Tensor:
    """Return a point [P, n] that is no starting point; well inside the box, where there is one, for the differences."""
    start = problem.initial_parameters(_seeds(problem))
    noise = torch.randn(start.shape, generator=generator("shift", stream), dtype=torch.float64)
    point = problem.project(start + 0.1 * noise.to(start))
    if problem.bounds is None:
        return point
    return 0.99 * point + 0.005 * (problem.bounds[0] + problem.bounds[1])


def _check_starts(problem: Problem) -> None:
    seeds = _seeds(problem)
    start = problem.initial_parameters(seeds)
    assert start.shape == (problem.instances, problem.dimension)
    assert start.dtype == problem.dtype
    assert start.device.type == problem.device.type
    assert start.isfinite().all()
    assert not start.requires_grad
    _assert_equal(start, problem.initial_parameters(seeds), "starts from the same seeds")
    others = problem.initial_parameters(_seeds(problem, offset=1000))
    for i in range(problem.instances):
        assert not torch.equal(start[i], others[i]), "different seeds give the same start"
        mixed = [seed if j == i else 5000 + j for j, seed in enumerate(seeds)]
        _assert_equal(problem.initial_parameters(mixed)[i], start[i], f"start {i} when other seeds change")
        first = [seeds[i], *(5000 + j for j in range(1, problem.instances))]
        _assert_equal(problem.initial_parameters(first)[0], start[i], f"start of seed {seeds[i]} in another row")


def _check_batches(problem: Problem) -> None:
    stream = generator("contract", 1)
    batch, following = problem.sample_batch(stream), problem.sample_batch(stream)
    _assert_equal(batch, _draw(problem, 1), "batches from equal generators")
    samples = problem.sample_losses(problem.initial_parameters(_seeds(problem)), batch).shape[1]
    if batch is None:
        assert following is None
        assert samples == 1, f"a noise-free problem has B = 1, not {samples}"
    else:
        assert not _equal(batch, following), "two batches of one generator are equal"


def _check_losses(problem: Problem) -> None:
    parameters, batch = _shifted(problem, 0).requires_grad_(True), _draw(problem)
    with _inputs_untouched(parameters, batch):
        samples = problem.sample_losses(parameters, batch)
        losses = problem.losses(parameters, batch)
    assert samples.ndim == 3
    assert samples.shape[1] >= 1
    assert (samples.shape[0], samples.shape[2]) == (problem.instances, problem.objectives)
    assert losses.shape == (problem.instances, problem.objectives)
    assert samples.dtype == losses.dtype == problem.dtype
    assert samples.isfinite().all()
    assert samples.requires_grad
    assert losses.requires_grad
    torch.testing.assert_close(losses, samples.mean(dim=1))
    _assert_equal(samples, problem.sample_losses(parameters, batch), "sample losses of a second call")
    if problem.positive:
        assert (samples >= 0).all(), "positive is claimed, and a loss is negative"


def _check_jacobian(problem: Problem) -> None:
    parameters, batch = _shifted(problem, 1), _draw(problem)
    with _inputs_untouched(parameters, batch):
        jacobian, losses = problem.jacobian(parameters, batch)
    assert jacobian.shape == (problem.instances, problem.objectives, problem.dimension)
    assert losses.shape == (problem.instances, problem.objectives)
    assert jacobian.dtype == losses.dtype == problem.dtype
    assert not jacobian.requires_grad
    assert not losses.requires_grad
    assert jacobian.isfinite().all()
    torch.testing.assert_close(losses, problem.losses(parameters, batch).detach())
    with torch.no_grad():
        _assert_equal(problem.jacobian(parameters, batch)[0], jacobian, "Jacobian under no_grad")

    attached = parameters.clone().requires_grad_(True)
    values = problem.losses(attached, batch)
    rows = [torch.autograd.grad(values[:, i].sum(), attached, retain_graph=True)[0] for i in range(problem.objectives)]
    torch.testing.assert_close(jacobian, torch.stack(rows, dim=1))
    if problem.dtype == torch.float64:
        _check_finite_differences(lambda z: problem.losses(z, batch).detach(), parameters, jacobian)


def _check_finite_differences(losses: Callable[[Tensor], Tensor], parameters: Tensor, jacobian: Tensor) -> None:
    n = parameters.shape[1]
    if n <= EVERY_COORDINATE:
        directions = torch.eye(n, dtype=torch.float64)
    else:
        directions = torch.randn(DIRECTIONS, n, generator=generator("directions", n), dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
    size = float(jacobian.norm(dim=2).max())
    for direction in directions.to(parameters):
        ahead = losses(parameters + DIFFERENCE_STEP * direction)
        behind = losses(parameters - DIFFERENCE_STEP * direction)
        difference = (ahead - behind) / (2 * DIFFERENCE_STEP)
        torch.testing.assert_close(jacobian @ direction, difference, rtol=1e-4, atol=1e-6 * max(size, 1e-3))


def _check_instances_apart(problem: Problem) -> None:
    here, elsewhere, batch = _shifted(problem, 2), _shifted(problem, 3), _draw(problem)
    tolerance = 1e-5 if problem.dtype == torch.float32 else 1e-12
    expected = problem.losses(here, batch)
    for i in range(problem.instances):
        mixed = elsewhere.clone()
        mixed[i] = here[i]
        moved = problem.losses(mixed, batch)
        gap = (moved[i] - expected[i]).abs()
        assert (gap <= tolerance * (1 + expected[i].abs())).all(), f"instance {i} depends on another's parameters"
        attached = here.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(problem.losses(attached, batch)[i].sum(), attached)
        others = [j for j in range(problem.instances) if j != i]
        assert (gradient[others] == 0).all(), f"instance {i} depends on another's parameters"


def _check_box(problem: Problem) -> None:
    start = problem.initial_parameters(_seeds(problem))
    _assert_equal(problem.project(start), start, "projection of a start: starts are feasible")
    noise = torch.randn(start.shape, generator=generator("far"), dtype=torch.float64).to(start)
    far = start + 100 * noise
    with _inputs_untouched(far, None):
        near = problem.project(far)
    assert near.shape == far.shape
    assert near.dtype == far.dtype
    _assert_equal(problem.project(near), near, "projection of a projected point")
    if problem.bounds is None:
        _assert_equal(near, far, "projection without bounds")
        return
    lower, upper = problem.bounds
    assert lower.shape == upper.shape == (problem.dimension,)
    assert lower.dtype == upper.dtype == problem.dtype
    assert (lower < upper).all()
    assert ((near >= lower) & (near <= upper)).all()
    for corner in (lower, upper):
        jacobian, losses = problem.jacobian(corner.expand_as(start).clone(), _draw(problem))
        assert losses.isfinite().all(), "a loss is not finite in a corner of the box"
        assert jacobian.isfinite().all(), "the Jacobian is not finite in a corner of the box"
        if problem.positive:
            assert (losses >= 0).all(), "positive is claimed, and a loss is negative in a corner of the box"


def _check_knowledge(problem: Problem) -> None:
    """Check minima, reference point, front and set, where they are given."""
    losses = problem.losses(_shifted(problem, 4), _draw(problem))
    noise_free = _draw(problem) is None
    if problem.minima is not None:
        assert problem.minima.shape == (problem.instances, problem.objectives)
        assert problem.minima.dtype == problem.dtype
        assert not noise_free or (losses >= problem.minima).all(), "a loss is below the claimed minimum"
    if problem.reference_point is not None:
        assert problem.reference_point.shape == (problem.objectives,)
        assert problem.reference_point.dtype == problem.dtype
    front = _unless_unknown(problem.pareto_front)
    points = _unless_unknown(problem.pareto_set)
    if front is not None:
        assert front.ndim == 2
        assert front.shape[1] == problem.objectives
        assert front.dtype == problem.dtype
        assert front.isfinite().all()
        assert not dominated(front, front).any(), "the front has a point that another of its points dominates"
        if problem.reference_point is not None:
            assert (front < problem.reference_point).all(), "the reference point does not bound the front"
    if points is not None:
        assert points.ndim == 2
        assert points.shape[1] == problem.dimension
        assert points.dtype == problem.dtype
        torch.testing.assert_close(problem.project(points), points)
    if front is not None and points is not None and noise_free:
        rows = [problem.losses(point.expand(problem.instances, -1), None)[0] for point in points]
        torch.testing.assert_close(torch.stack(rows), front, rtol=1e-4, atol=1e-5)


def _check_test_metrics(problem: Problem) -> None:
    parameters = problem.initial_parameters(_seeds(problem))
    with _inputs_untouched(parameters, None):
        metrics = problem.test_metrics(parameters)
    for name, value in metrics.items():
        assert value.shape == (problem.instances, problem.objectives), name
        assert value.isfinite().all(), name
        assert not value.requires_grad, name


def dominated(points: Tensor, by: Tensor) -> Tensor:
    """Tell for each of `points` [k, m] whether one of `by` [l, m] is better by more than rounding and nowhere worse."""
    margin = 1e-5 if points.dtype == torch.float32 else 1e-9
    difference = points[:, None, :] - by[None, :, :]
    return ((difference >= 0).all(dim=2) & (difference > margin).any(dim=2)).any(dim=1)


def _unless_unknown(known: Callable[[int], Tensor], points: int = 12) -> Tensor | None:
    try:
        return known(points)
    except UserError:
        return None


@contextmanager
def _inputs_untouched(parameters: Tensor, batch: Batch) -> Iterator[None]:
    values, drawn = parameters.detach().clone(), copy.deepcopy(batch)
    yield
    _assert_equal(parameters.detach(), values, "parameters after the call")
    _assert_equal(batch, drawn, "batch after the call")


@contextmanager
def _global_randomness_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used"


def _equal(left: Any, right: Any) -> bool:
    try:
        _assert_equal(left, right, "")
    except AssertionError:
        return False
    return True


def _assert_equal(left: Any, right: Any, what: str) -> None:
    """Assert that two trees of tensors (tuples, lists, dicts, dataclasses) are equal bit for bit."""
    assert type(left) is type(right), f"{what}: {type(left).__name__} and {type(right).__name__}"
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, f"{what}: {left.dtype} and {right.dtype}"
        assert torch.equal(left, right), f"{what}: tensors differ"
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            _assert_equal(getattr(left, field.name), getattr(right, field.name), f"{what}.{field.name}")
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), f"{what}: other keys"
        for key in left:
            _assert_equal(left[key], right[key], f"{what}[{key!r}]")
    elif isinstance(left, tuple | list):
        assert len(left) == len(right), f"{what}: other lengths"
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            _assert_equal(one, other, f"{what}[{i}]")
    else:
        assert left == right, f"{what}: {left!r} and {right!r}"
