"""What turns a preference into weights: against torch written out, finite differences and moocore."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ml2o_dist.evaluation import metrics
from ml2o_dist.paretoset.epo import epo_weights
from ml2o_dist.paretoset.scalarization import SCALARIZATIONS, Scalarization, hypervolume
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


def draw(rays: int, tasks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw preferences and losses [rays, tasks], float64, the losses within the reference of 2."""
    stream = generator("case", rays, tasks, seed)
    raw = torch.rand(rays, tasks, generator=stream, dtype=torch.float64) + 0.1
    return raw / raw.sum(dim=1, keepdim=True), 0.2 + 1.6 * torch.rand(
        rays, tasks, generator=stream, dtype=torch.float64
    )


def differences(value: Callable[[Tensor], float], losses: Tensor) -> Tensor:
    """Return the central differences of `value` in every entry of `losses`."""
    gradient = torch.zeros_like(losses)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in losses.shape)).tolist():
        step = torch.zeros_like(losses)
        step[tuple(place)] = 1e-6
        gradient[tuple(place)] = (value(losses + step) - value(losses - step)) / 2e-6
    return gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def moocore(losses: Tensor) -> float:
    return metrics.hypervolume(losses, torch.full((losses.shape[1],), 2.0, dtype=torch.float64)).value


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_ls_weights_are_t_times_the_preference(tasks: int) -> None:
    r, losses = draw(1, tasks)
    scalarization = Scalarization("ls")
    assert scalarization.constant
    torch.testing.assert_close(scalarization.weights(r, losses), tasks * r)
    even = torch.full((1, tasks), 1 / tasks, dtype=torch.float64)
    torch.testing.assert_close(scalarization.weights(even, losses), torch.ones(1, tasks, dtype=torch.float64))


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_tchebycheff_weighs_the_worst_alone(tasks: int) -> None:
    r, losses = draw(1, tasks)
    weights = Scalarization("tchebycheff").weights(r, losses)
    worst = int((r * losses)[0].argmax())
    expected = torch.zeros(1, tasks, dtype=torch.float64)
    expected[0, worst] = tasks * r[0, worst]
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights, differences(lambda each: tasks * float((r * each).max()), losses))


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_cosmos_weights_are_the_gradient_of_its_loss(tasks: int) -> None:
    r, losses = draw(1, tasks)

    def loss(each: Tensor) -> float:
        return tasks * float((r * each).sum()) - 2 * cosine(1 / r[0], each[0])

    weights = Scalarization("cosmos").weights(r, losses)
    torch.testing.assert_close(weights, differences(loss, losses), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("tasks", "reference"), [(2, 2.0), (3, 2.0), (5, 2.0), (2, 5.0)])
@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_weights_are_the_gradient_of_moocores(tasks: int, reference: float, seed: int) -> None:
    r, losses = draw(4, tasks, seed)
    corner = torch.full((tasks,), reference, dtype=torch.float64)

    def loss(each: Tensor) -> float:
        aligned = sum(cosine(1 / one, point) for one, point in zip(r, each, strict=True))
        return -metrics.hypervolume(each, corner).value - aligned

    scalarization = Scalarization("hypervolume", reference=reference)
    assert scalarization.rays == 4
    torch.testing.assert_close(scalarization.weights(r, losses), differences(loss, losses), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("points", [1, 2, 4, 6])
def test_the_volume_is_moocores(tasks: int, points: int) -> None:
    for seed in range(5):
        losses = draw(points, tasks, seed)[1] * 1.2  # some are beyond the reference
        volume = hypervolume(losses, 2.0)
        assert float(volume) == pytest.approx(moocore(losses), rel=1e-12, abs=1e-14)
    doubled = losses.repeat(2, 1)
    assert float(hypervolume(doubled, 2.0)) == pytest.approx(moocore(losses), rel=1e-12, abs=1e-12)


def test_a_point_beyond_the_reference_has_no_part_in_the_volume() -> None:
    inside, beyond = [0.5, 0.5], [2.5, 0.1]
    points = torch.tensor([inside, beyond], dtype=torch.float64, requires_grad=True)
    volume = hypervolume(points, 2.0)
    assert float(volume.detach()) == pytest.approx(1.5 * 1.5)
    (gradient,) = torch.autograd.grad(volume, points)
    torch.testing.assert_close(gradient, torch.tensor([[-1.5, -1.5], [0.0, 0.0]], dtype=torch.float64))
    assert float(hypervolume(torch.tensor([beyond, [3.0, 3.0]]), 2.0)) == 0
    # the cosine still draws it back: its weights are finite and not zero
    weights = Scalarization("hypervolume").weights(torch.tensor([[0.5, 0.5]]), torch.tensor([beyond]))
    assert weights.isfinite().all()
    assert weights.any()


def test_epo_weights_are_t_alpha_and_failures_are_counted() -> None:
    r, losses = torch.tensor([[0.3, 0.7]], dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    jacobian = torch.tensor([[1.0, 0.2, 0.0], [-0.3, 1.0, 0.5]], dtype=torch.float64)
    scalarization = Scalarization("epo")
    alpha = epo_weights(r[0], losses[0], jacobian)
    assert alpha is not None
    torch.testing.assert_close(scalarization.weights(r, losses, jacobian), 2 * alpha[None])
    assert scalarization.failures == 0
    for broken in (torch.zeros_like(jacobian), jacobian * float("nan")):
        torch.testing.assert_close(scalarization.weights(r, losses, broken), 2 * r)
    assert scalarization.failures == 2
    with pytest.raises(UserError, match="epo needs the gradients"):
        scalarization.weights(r, losses)


@pytest.mark.parametrize("name", SCALARIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_detached_finite_and_in_the_losses_precision(name: str, dtype: torch.dtype) -> None:
    scalarization = Scalarization(name)
    corner = torch.eye(2, dtype=torch.float64)[[0]].repeat(scalarization.rays, 1)
    losses = (0.5 + torch.rand(scalarization.rays, 2, generator=generator("l"))).to(dtype).requires_grad_(True)
    with torch.no_grad():
        weights = scalarization.weights(corner, losses, torch.eye(2, 3, dtype=dtype))
    assert weights.shape == (scalarization.rays, 2)
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert not weights.requires_grad


def test_only_ls_is_constant_and_only_the_hypervolume_takes_several_rays() -> None:
    assert [name for name in SCALARIZATIONS if Scalarization(name).constant] == ["ls"]
    assert [name for name in SCALARIZATIONS if Scalarization(name).rays > 1] == ["hypervolume"]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown loss 'tchebychef'.*'tchebycheff'"):
        Scalarization("tchebychef")
