"""Hand-designed rules against torch.optim, torchjd and closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import MGDA, Mean, PCGrad

from ml2o_dist.errors import UserError
from ml2o_dist.problems import Problem
from ml2o_dist.rules.aggregated import AggregatedRule, aggregate, parse_optimizer_name
from ml2o_dist.rules.base import Oracle
from ml2o_dist.seeding import derive_seed, generator


class Linear(Problem):
    """f_i(z) = <batch_i, z> with a fresh batch [P, m, n] each draw: the Jacobian is the batch, whatever z is."""

    def __init__(self, instances: int, objectives: int, dimension: int, dtype: torch.dtype = torch.float64) -> None:
        self.instances, self.objectives, self.dimension = instances, objectives, dimension
        self.device, self.dtype = torch.device("cpu"), dtype

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(self.dimension, generator=generator(s)).to(self.dtype) for s in seeds])

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        shape = (self.instances, self.objectives, self.dimension)
        return torch.randn(shape, generator=generator, dtype=self.dtype)

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return torch.einsum("pmn,pn->pm", batch, parameters)[:, None]


class Broken(Linear):
    """`Linear`, but one entry of instance 1's Jacobian is `value`."""

    value = float("nan")

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        batch = super().sample_batch(generator)
        batch[1, 0, 0] = self.value
        return batch


SHAPES = [(1, 1, 4), (1, 2, 3), (3, 3, 5), (2, 5, 1)]
TORCHJD = {"mean": Mean, "mgda": MGDA, "pcgrad": PCGrad}


def run(rule: AggregatedRule, problem: Problem, steps: int) -> list[Tensor]:
    oracle = Oracle(problem, generator("test"))
    parameters = problem.initial_parameters(range(problem.instances))
    state = rule.initial_state(problem.instances, problem.objectives, problem.dimension)
    points = [parameters]
    for _ in range(steps):
        parameters, state, _ = rule.step(oracle, parameters, state)
        points.append(parameters)
    return points


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("aggregator", ["mean", "mgda"])
def test_steps_equal_torch_optim(shape: tuple[int, int, int], optimizer: str, aggregator: str) -> None:
    problem = Linear(*shape)
    ours = run(AggregatedRule(aggregator, optimizer, lr=0.03), problem, steps=20)

    parameter = torch.nn.Parameter(problem.initial_parameters(range(shape[0])))
    theirs = {
        "sgd": torch.optim.SGD([parameter], lr=0.03),
        "momentum": torch.optim.SGD([parameter], lr=0.03, momentum=0.9),
        "adam": torch.optim.Adam([parameter], lr=0.03),
    }[optimizer]
    stream = generator("test")
    for k in range(20):
        torch.testing.assert_close(ours[k], parameter.detach(), rtol=1e-12, atol=1e-12)
        batch = problem.sample_batch(stream)
        parameter.grad = torch.stack([TORCHJD[aggregator]()(matrix) for matrix in batch])
        theirs.step()
    torch.testing.assert_close(ours[20], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(TORCHJD))
def test_aggregate_is_torchjd_per_instance(shape: tuple[int, int, int], name: str) -> None:
    jacobian = Linear(*shape).sample_batch(generator("J"))
    directions = aggregate(name, jacobian)
    assert directions.shape == (shape[0], shape[2])
    for direction, matrix in zip(directions, jacobian, strict=True):
        torch.manual_seed(derive_seed("aggregator", 0))  # the stream that names PCGrad's order
        torch.testing.assert_close(direction, TORCHJD[name]()(matrix))


def test_pcgrad_of_two_objectives_is_its_closed_form() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # <g1, g2> = -1: they conflict
    expected = (first + second / 2) + (second + first)
    torch.testing.assert_close(aggregate("pcgrad", torch.stack([first, second])[None])[0], expected)


def test_pcgrad_repeats_varies_with_the_step_and_spares_the_global_stream() -> None:
    jacobian = torch.randn(2, 4, 6, generator=generator("conflict"))
    jacobian[:, 1:] -= jacobian.mean(dim=1, keepdim=True) * 3  # conflicting rows, so that the order matters
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    results = [aggregate("pcgrad", jacobian, order=k) for k in range(8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(aggregate("pcgrad", jacobian, order=3), results[3])
    assert len({tuple(result.flatten().tolist()) for result in results}) > 1


@pytest.mark.parametrize("name", list(TORCHJD))
def test_an_instance_moves_alike_in_any_company(name: str) -> None:
    jacobian = torch.randn(3, 4, 6, generator=generator("company"))
    together = aggregate(name, jacobian, order=2)
    alone = torch.cat([aggregate(name, jacobian[i : i + 1], order=2) for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("aggregator", list(TORCHJD))
def test_state_and_parameters_are_values(aggregator: str, optimizer: str) -> None:
    rule = AggregatedRule(aggregator, optimizer)
    problem = Linear(2, 3, 4)
    oracle = Oracle(problem, generator("values"))
    start = problem.initial_parameters([0, 1])
    parameters, state, _ = rule.step(oracle, start, rule.initial_state(2, 3, 4))
    kept = (parameters.clone(), state.steps, state.first.clone(), state.second.clone())
    batch = problem.sample_batch(generator("again"))
    oracle.draw = lambda: batch  # type: ignore[method-assign]
    once, _, _ = rule.step(oracle, parameters, state)
    twice, _, _ = rule.step(oracle, parameters, state)
    assert torch.equal(once, twice)
    assert torch.equal(parameters, kept[0])
    assert state.steps == kept[1] == 1
    assert torch.equal(state.first, kept[2])
    assert torch.equal(state.second, kept[3])
    assert not torch.equal(start, parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("aggregator", list(TORCHJD))
def test_a_non_finite_jacobian_ends_its_own_instance_only(aggregator: str, value: float) -> None:
    broken = Broken(3, 2, 4)
    broken.value = value
    rule = AggregatedRule(aggregator, "adam")
    end, reference = (run(rule, problem, steps=3)[-1] for problem in (broken, Linear(3, 2, 4)))
    assert end[1].isnan().all()
    assert torch.equal(end[[0, 2]], reference[[0, 2]])


def test_the_step_is_projected_charged_and_reported() -> None:
    problem = Linear(2, 3, 4)
    problem.bounds = (torch.full((4,), -0.01, dtype=torch.float64), torch.full((4,), 0.01, dtype=torch.float64))
    oracle = Oracle(problem, generator("test"))
    rule = AggregatedRule("mean", "sgd", lr=10.0)
    start = torch.zeros(2, 4, dtype=torch.float64)
    end, _, info = rule.step(oracle, start, rule.initial_state(2, 3, 4))
    batch = problem.sample_batch(generator("test"))
    assert torch.equal(end, (-10 * batch.mean(dim=1)).clamp(-0.01, 0.01))
    assert (oracle.batches, oracle.forwards, oracle.backwards) == (1, 1, 3)
    assert torch.equal(info.jacobian, batch)
    assert torch.equal(info.losses, torch.zeros(2, 3, dtype=torch.float64))


def test_precision_follows_the_problem() -> None:
    for dtype in (torch.float32, torch.float64):
        assert run(AggregatedRule("mgda", "adam"), Linear(1, 2, 3, dtype), steps=2)[-1].dtype == dtype


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mgda", ("mgda", "adam", None)),
        ("mean+sgd", ("mean", "sgd", None)),
        (" pcgrad+momentum@0.1 ", ("pcgrad", "momentum", 0.1)),
        ("mgda@1e-3", ("mgda", "adam", 0.001)),
    ],
)
def test_names_are_read(text: str, expected: tuple[str, str, float | None]) -> None:
    assert parse_optimizer_name(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mgad+adam", "unknown aggregator 'mgad'; did you mean 'mgda'"),
        ("mean+adm", "'adm'; did you mean 'adam'"),
        ("mean+", "unknown optimizer"),
        ("mean+adam+sgd", "unknown optimizer"),
        ("", "unknown aggregator ''"),
        ("mean@", "learning rate ''"),
        ("mean@fast", "learning rate 'fast'"),
        ("mean@-1", "learning rate '-1'"),
        ("mean@0", "learning rate '0'"),
        ("mean@inf", "learning rate 'inf'"),
    ],
)
def test_wrong_names_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_optimizer_name(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rule_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="did you mean 'pcgrad'"):
        AggregatedRule("pcgra")
    with pytest.raises(UserError, match="did you mean 'momentum'"):
        AggregatedRule("mean", "momentun")
    with pytest.raises(UserError, match="positive"):
        AggregatedRule("mean", lr=float("nan"))
