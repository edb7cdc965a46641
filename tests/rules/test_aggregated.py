"""Hand-designed rules: every aggregator and scalarizer of torchjd, run as their authors run them in plain PyTorch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from ml2o_dist.problems import Problem
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.aggregated import AggregatedRule, parse_optimizer_name
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed, generator
from tests.crossed import crossed
from tests.rules.torchjd_objects import (
    FEWEST,
    NAMES,
    POSITIVE,
    REMEMBERING,
    RESCALED,
    SCALARIZERS,
    marked,
    torchjd_object,
)
from tests.rules.toys import Broken, Linear, Positive, run
from tests.wording import says

EVERY = [marked(name) for name in NAMES]
OPTIMIZERS = ["sgd", "momentum", "adam"]
SHAPES = [(2, 3, 5), (2, 2, 3), (1, 1, 4), (2, 5, 1), (1, 2, 1)]


def plain_pytorch(name: str, optimizer: str, problem: Problem, instance: int, steps: int) -> list[Tensor]:
    """Train one instance in the loop that torchjd documents; return z_0 .. z_steps."""
    module = torchjd_object(name, problem.objectives).to(problem.dtype)
    z = torch.nn.Parameter(problem.initial_parameters(range(problem.instances))[instance])
    trained = [z, *(module.parameters() if name in ("uw", "imtll") else [])]
    stepper = {
        "sgd": lambda: torch.optim.SGD(trained, lr=0.03),
        "momentum": lambda: torch.optim.SGD(trained, lr=0.03, momentum=0.9),
        "adam": lambda: torch.optim.Adam(trained, lr=0.03),
    }[optimizer]()
    stream = generator("test")
    points = [z.detach().clone()]
    for k in range(steps):
        batch = problem.sample_batch(stream)
        stepper.zero_grad()
        losses = problem.losses(z.expand(problem.instances, -1), batch)[instance]
        torch.manual_seed(derive_seed("aggregator", k))
        if name in SCALARIZERS:
            module(losses).backward()
        else:
            jacobian = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses])
            unit = 2.0 ** (math.floor(math.log2(jacobian.abs().max())) + 1) if name in RESCALED else 1.0
            z.grad = module(jacobian / unit) * unit
        stepper.step()
        if name == "famo":
            module.update(problem.losses(z.expand(problem.instances, -1), batch)[instance].detach())
        if name == "dwa" and (k + 1) % 20 == 0:
            module.step()
        points.append(z.detach().clone())
    return points


def runs(name: str, optimizer: str, shape: tuple[int, int, int]) -> bool:
    """Whether it has enough objectives; on a line the two middle points of krum tie, and rounding decides."""
    return shape[1] >= FEWEST.get(name, 1) and (name, shape[2]) != ("krum", 1)


@crossed("name, optimizer, shape", EVERY, OPTIMIZERS, SHAPES, where=runs)
def test_a_run_is_torchjd_in_plain_pytorch(name: str, optimizer: str, shape: tuple[int, int, int]) -> None:
    problem = Positive(*shape)
    steps = {"dwa": 45, "nashmtl": 3, "fairgrad": 3, "cagrad": 6}.get(name, 8)
    if name == "gradvac" and shape[2] == 1:
        steps = 3  # cosines are 1 but for rounding there: its sqrt(1 - cos^2) turns 1e-16 into 1e-12, then 1e-9
    ours = run(AggregatedRule(name, optimizer, lr=0.03), problem, steps)
    for p in range(shape[0]):
        theirs = plain_pytorch(name, optimizer, problem, p, steps)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[p], other, rtol=1e-10, atol=1e-12)
    if shape[2] > 1:  # on a line conflicting gradients leave nowhere to go
        assert not torch.equal(ours[0], ours[-1])


@crossed("name, optimizer, shape", EVERY, OPTIMIZERS, [(2, 3, 4), (2, 5, 1), (1, 2, 1)])
def test_runs_repeat_in_any_company_and_spare_the_global_stream(
    name: str, optimizer: str, shape: tuple[int, int, int]
) -> None:
    if shape[1] < FEWEST.get(name, 1):
        with pytest.raises(UserError, match=r"at least 3 objectives.* 2"):
            run(AggregatedRule(name, optimizer), Positive(*shape), steps=1)
        return
    problem = Positive(*shape, dtype=torch.float32)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = run(AggregatedRule(name, optimizer), problem, steps=3)[-1]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(run(AggregatedRule(name, optimizer), problem, steps=3)[-1], first)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    if shape[0] > 1:
        broken = Broken(*shape, dtype=torch.float32)
        company = run(AggregatedRule(name, optimizer), broken, steps=3)[-1]
        assert torch.equal(company[0], first[0])
        assert company[1].isnan().all()


@crossed("name, value", EVERY, [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_jacobian_ends_its_own_instance_only(name: str, value: float) -> None:
    broken = Broken(3, 3, 4)
    broken.value = value
    rule = AggregatedRule(name, "adam")
    end, reference = (run(rule, problem, steps=3)[-1] for problem in (broken, Positive(3, 3, 4)))
    assert end[1].isnan().all()
    assert torch.equal(end[[0, 2]], reference[[0, 2]])


@crossed("name, optimizer", EVERY, OPTIMIZERS)
def test_state_and_parameters_are_values(name: str, optimizer: str) -> None:
    rule = AggregatedRule(name, optimizer)
    problem = Positive(2, 3, 4)
    oracle = Oracle(problem, generator("values"))
    start = problem.initial_parameters([0, 1])
    parameters, state, _ = rule.step(oracle, start, rule.initial_state(2, 3, ParameterLayout.vector(4)))
    kept = copy.deepcopy((parameters, state))
    batch = problem.sample_batch(generator("again"))
    oracle.draw = lambda: batch  # type: ignore[method-assign]
    once, after, _ = rule.step(oracle, parameters, state)
    twice, again, _ = rule.step(oracle, parameters, state)
    restored, _, _ = rule.step(oracle, *kept)
    assert torch.equal(once, twice)
    assert torch.equal(once, restored)
    assert torch.equal(parameters, kept[0])
    assert state.steps == kept[1].steps == 1
    assert torch.equal(state.first, kept[1].first)
    assert torch.equal(state.second, kept[1].second)
    assert not torch.equal(start, parameters)
    # Whether the rule remembers shows in what the next step does with what the last one left.
    later, _, _ = rule.step(oracle, once, after)
    assert torch.equal(later, rule.step(oracle, once, again)[0])
    forgetful = AggregatedRule(name, "sgd").step(oracle, once, rule.initial_state(2, 3, ParameterLayout.vector(4)))[0]
    if optimizer == "sgd" and name in set(REMEMBERING) - {"dwa", "pcd"}:  # dwa: 40 steps later; pcd: only a scale
        assert not torch.equal(later, forgetful)


def test_random_draws_vary_with_the_step() -> None:
    for name in ("pcgrad", "gradvac", "graddrop", "randomweights"):
        rule = AggregatedRule(name, "sgd")
        problem = Linear(1, 4, 3)
        oracle = Oracle(problem, generator("test"))
        batch = problem.sample_batch(generator("conflict"))
        batch[:, 1:] -= batch.mean(dim=1, keepdim=True) * 3  # conflicting rows, so that the order matters
        oracle.draw = lambda batch=batch: batch  # type: ignore[method-assign, misc]
        state = rule.initial_state(1, 4, ParameterLayout.vector(3))
        moves = set()
        for k in range(8):
            moved, _, _ = rule.step(oracle, torch.zeros(1, 3, dtype=torch.float64), replaced(state, steps=k))
            moves.add(tuple(moved.flatten().tolist()))
        assert len(moves) > 1, name


def replaced(state: object, **changes: int) -> object:
    changed = copy.deepcopy(state)
    for key, value in changes.items():
        object.__setattr__(changed, key, value)
    return changed


@pytest.mark.parametrize("name", POSITIVE)
def test_losses_that_may_be_negative_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'.*losses.*positive.*Linear"):
        run(AggregatedRule(name), Linear(1, 2, 3), steps=1)


def test_the_step_is_projected_charged_and_reported() -> None:
    problem = Linear(2, 3, 4)
    problem.bounds = (torch.full((4,), -0.01, dtype=torch.float64), torch.full((4,), 0.01, dtype=torch.float64))
    oracle = Oracle(problem, generator("test"))
    rule = AggregatedRule("mean", "sgd", lr=10.0)
    start = torch.zeros(2, 4, dtype=torch.float64)
    end, _, info = rule.step(oracle, start, rule.initial_state(2, 3, ParameterLayout.vector(4)))
    batch = problem.sample_batch(generator("test"))
    torch.testing.assert_close(end, (-10 * batch.mean(dim=1)).clamp(-0.01, 0.01))
    assert (oracle.batches, oracle.forwards, oracle.backwards) == (1, 1, 1)
    torch.testing.assert_close(info.jacobian, batch.mean(dim=1, keepdim=True))
    assert torch.equal(info.losses, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_one_backward_pass_takes_the_step_of_the_whole_jacobian(name: str, optimizer: str) -> None:
    problem = Positive(2, 3, 4)
    rule = AggregatedRule(name, optimizer, lr=0.1)
    oracles = [Oracle(problem, generator("test")) for _ in range(2)]
    points = [torch.ones(2, 4, dtype=torch.float64)] * 2
    states = [rule.initial_state(2, 3, ParameterLayout.vector(4))] * 2
    for _ in range(4):
        points[0], states[0], _ = rule.step(oracles[0], points[0], states[0])
        points[1], states[1], _ = UpdateRule.step(rule, oracles[1], points[1], states[1])
        torch.testing.assert_close(points[0], points[1])
    assert (oracles[0].backwards, oracles[1].backwards) == (4, 12)


def test_famo_is_charged_the_losses_after_the_step() -> None:
    oracle = Oracle(Positive(1, 3, 4), generator("test"))
    rule = AggregatedRule("famo")
    rule.step(oracle, torch.zeros(1, 4, dtype=torch.float64), rule.initial_state(1, 3, ParameterLayout.vector(4)))
    assert (oracle.batches, oracle.forwards, oracle.backwards) == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mgda", ("mgda", "adam", None)),
        ("mean+sgd", ("mean", "sgd", None)),
        (" pcgrad+momentum@0.1 ", ("pcgrad", "momentum", 0.1)),
        ("mgda@1e-3", ("mgda", "adam", 0.001)),
        ("alignedmtl+adam@0.01", ("alignedmtl", "adam", 0.01)),
    ],
)
def test_names_are_read(text: str, expected: tuple[str, str, float | None]) -> None:
    assert parse_optimizer_name(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mgad+adam", "aggregator 'mgad' ... 'mgda'"),
        ("aligned_mtl", "aggregator 'aligned_mtl' ... 'alignedmtl'"),
        ("Nash-MTL+adam", "aggregator 'Nash-MTL' ... 'nashmtl'"),
        ("mean+adm", "'adm' ... 'adam'"),
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
    assert says(str(caught.value), said)
    assert "\n" not in str(caught.value)


def test_the_rule_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="did you mean 'pcgrad'"):
        AggregatedRule("pcgra")
    with pytest.raises(UserError, match="did you mean 'momentum'"):
        AggregatedRule("mean", "momentun")
    with pytest.raises(UserError, match="positive"):
        AggregatedRule("mean", lr=float("nan"))
