"""Training over preferences as a Problem: the contract, and Jacobians against autograd and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml2o_dist.paretoset.conditioned import (
    Conditioned,
    ConditionedInput,
    Fused,
    Hypernetwork,
    Plain,
    WeightLine,
    flat_parameters,
    named_views,
)
from ml2o_dist.paretoset.fusion import Fusion
from ml2o_dist.paretoset.networks import MultiHead
from ml2o_dist.paretoset.preference_problem import PreferenceBatch, PreferenceProblem
from ml2o_dist.paretoset.scalarization import SCALARIZATIONS, Scalarization
from ml2o_dist.paretoset.tasks import Logits, TaskSet
from ml2o_dist.problems.base import autograd_jacobian
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator
from tests.paretoset.small import separate_noise, shared_noise, small_multi_head, start_and_experts
from tests.problems.contract import check_problem

CPU = torch.device("cpu")


def model_of(kind: str, tasks: int = 2) -> Conditioned:
    network = small_multi_head(tasks, width=2)
    if kind == "fused":
        return Fused(Fusion(network, *start_and_experts(network, tasks), heads=network.head_names))
    if kind == "line":
        return WeightLine(network, [small_multi_head(tasks, width=2, seed=t) for t in range(tasks)])
    if kind == "hypernetwork":
        return Hypernetwork(network, tasks, seed=0)
    return ConditionedInput(network, tasks, seed=0) if kind == "input" else Plain(network)


def problem_of(
    kind: str = "fused", loss: str = "ls", data: TaskSet | None = None, preference: Tensor | None = None, batch: int = 6
) -> PreferenceProblem:
    data = data or separate_noise(2)
    model, scalarization = model_of(kind, data.count), Scalarization(loss)
    return PreferenceProblem(model, data, scalarization, batch=batch, device=CPU, preference=preference)


class Double(Conditioned):
    """A model in double precision, which takes the images as they are."""

    def __init__(self, model: Conditioned) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        return self.model(preference, [each.double() for each in images])


class Seeded(PreferenceProblem):
    """Starts that depend on the seed, as the contract has it, here of the network's own; and any precision."""

    def __init__(self, model: Conditioned, *args: Any, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(Double(model) if dtype == torch.float64 else model, *args, **settings)
        self.dtype = dtype

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        noise = [torch.randn(self.dimension, generator=generator("start", seed)) for seed in seeds]
        return super().initial_parameters(seeds) + 0.1 * torch.stack(noise).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["fused", "line", "input", "plain"])
@pytest.mark.parametrize("data", [separate_noise(2), shared_noise(3)], ids=["separate", "shared"])
def test_with_constant_weights_it_keeps_the_contract(kind: str, data: TaskSet, dtype: torch.dtype) -> None:
    model = model_of(kind, data.count)
    check_problem(Seeded(model, data, Scalarization("ls"), batch=5, device=CPU, dtype=dtype))


@pytest.mark.parametrize("kind", ["fused", "line", "hypernetwork", "input", "plain"])
def test_the_jacobian_is_autograds_where_samples_have_losses(kind: str) -> None:
    problem = problem_of(kind)
    start, batch = problem.initial_parameters([0]), problem.sample_batch(generator("batch"))
    jacobian, losses = problem.jacobian(start, batch)
    expected, values = autograd_jacobian(problem.losses, start, batch)
    torch.testing.assert_close(jacobian, expected)
    torch.testing.assert_close(losses, values.detach())


def plain_losses(problem: PreferenceProblem, parameters: Tensor, batch: PreferenceBatch) -> Tensor:
    """Return the cross-entropies [p, T] by calling the model for each preference."""
    rows = []
    for r in batch.preferences:
        nn.utils.vector_to_parameters(parameters[0], problem.model.parameters())
        answers = problem.model(r.to(problem.dtype), [each.images for each in batch.images])
        row = torch.zeros(problem.objectives, dtype=problem.dtype)
        for logits, each in zip(answers, batch.images, strict=True):
            for column, t in enumerate(each.tasks):
                row[t] = nn.functional.cross_entropy(logits[t], each.labels[:, column])
        rows.append(row)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("loss", SCALARIZATIONS)
@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_jacobian_is_the_weights_times_finite_differences(loss: str, kind: str, tasks: int) -> None:
    data = shared_noise(tasks)
    model, scalarization = model_of(kind, tasks), Scalarization(loss)
    problem = Seeded(model, data, scalarization, batch=5, device=CPU, dtype=torch.float64)
    start, batch = problem.initial_parameters([3]), problem.sample_batch(generator("batch"))
    rays = 4 if loss == "hypervolume" else 1
    assert batch.preferences.shape == (rays, tasks)
    jacobian, losses = problem.jacobian(start, batch)
    assert jacobian.shape == (1, tasks, problem.dimension)
    with torch.no_grad():
        assert torch.equal(problem.jacobian(start, batch)[0], jacobian)
    values = plain_losses(problem, start, batch)
    rows = torch.zeros(rays, tasks, problem.dimension, dtype=torch.float64)
    for j in range(problem.dimension):
        step = torch.zeros_like(start)
        step[0, j] = 1e-5
        ahead, behind = plain_losses(problem, start + step, batch), plain_losses(problem, start - step, batch)
        rows[:, :, j] = (ahead - behind) / 2e-5
    weights = Scalarization(loss).weights(batch.preferences, values, rows[0] if loss == "epo" else None)
    torch.testing.assert_close(jacobian[0], torch.einsum("pt,ptn->tn", weights, rows), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[0], (weights * values).sum(dim=0), rtol=1e-6, atol=1e-9)
    assert not jacobian.requires_grad
    assert not losses.requires_grad


@pytest.mark.parametrize("loss", [name for name in SCALARIZATIONS if name != "ls"])
def test_what_has_other_weights_everywhere_gives_no_losses_to_compare(loss: str) -> None:
    problem = problem_of("plain", loss)
    with pytest.raises(UserError, match=f"loss '{loss}'.*weights.*point") as caught:
        problem.losses(problem.initial_parameters([0]), problem.sample_batch(generator("batch")))
    assert "\n" not in str(caught.value)


def test_batches_are_a_function_of_the_generator_and_draw_preferences() -> None:
    problem = problem_of()
    one, same, other = (problem.sample_batch(generator("batch", i)) for i in (0, 0, 1))
    assert torch.equal(one.preferences, same.preferences)
    assert torch.equal(one.images[1].images, same.images[1].images)
    assert not torch.equal(one.preferences, other.preferences)
    assert one.preferences.dtype == torch.float64
    assert float(one.preferences.sum()) == pytest.approx(1)
    fixed = problem_of(preference=torch.tensor([0.25, 0.75]))
    assert fixed.sample_batch(generator("batch")).preferences.tolist() == [[0.25, 0.75]]
    several = problem_of("plain", "hypervolume", preference=torch.tensor([0.25, 0.75]))
    assert several.sample_batch(generator("batch")).preferences.tolist() == [[0.25, 0.75]] * 4


def test_epos_failures_are_counted() -> None:
    problem = problem_of("plain", "epo")
    start = problem.initial_parameters([0])
    problem.jacobian(start, problem.sample_batch(generator("batch")))
    assert problem.scalarization.failures == 0
    problem.jacobian(start * float("nan"), problem.sample_batch(generator("batch")))
    assert problem.scalarization.failures == 1


class Unused(Conditioned):
    """Nothing that it answers depends on what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, preference: Tensor, images: Sequence[Tensor]) -> list[Logits]:
        return [[torch.zeros(len(each), 3)] * 2 for each in images]


@pytest.mark.parametrize("loss", SCALARIZATIONS)
def test_a_model_that_nothing_depends_on_is_told(loss: str) -> None:
    problem = PreferenceProblem(Unused(), shared_noise(2), Scalarization(loss), batch=4, device=CPU)
    with pytest.raises(UserError, match=r"task 1.*no gradient"):
        problem.jacobian(problem.initial_parameters([0]), problem.sample_batch(generator("batch")))


def test_figures_are_those_of_the_network_for_the_preference() -> None:
    problem = problem_of("fused")
    moved = problem.initial_parameters([0]) + 0.5 * torch.randn(1, problem.dimension, generator=generator("moved"))
    r = torch.tensor([0.3, 0.7], dtype=torch.float64)
    losses, accuracies = problem.measure(moved, r, "test")
    model = problem.model
    assert isinstance(model, Fused)
    for name, view in named_views(model, moved[0]).items():
        model.get_parameter(name).data.copy_(view)
    plain = model.fusion.export(r)
    assert isinstance(plain, MultiHead)
    expected = problem.tasks.measure(plain, "test", CPU)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(accuracies, expected[1])


def test_measuring_is_done_in_evaluation_mode_and_changes_nothing() -> None:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    problem = PreferenceProblem(
        Plain(MultiHead(trunk, 5, (3, 3))), separate_noise(2), Scalarization("ls"), batch=6, device=CPU
    )
    start, r = problem.initial_parameters([0]), torch.tensor([0.5, 0.5])
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    one, other = (problem.measure(start, r, "validation")[0] for _ in range(2))
    assert torch.equal(one, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.model.state_dict().items())
    assert problem.model.training


def test_starts_are_what_the_model_was_built_with() -> None:
    problem = problem_of("line")
    assert torch.equal(problem.initial_parameters([5])[0], flat_parameters(problem.model))
    assert (problem.instances, problem.objectives) == (1, 2)
