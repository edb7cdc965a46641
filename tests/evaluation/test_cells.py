"""Cells against closed forms and plain loops, in process and as Ray tasks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ml2o_dist.config import RuleSettings
from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import Cell, CellFailure, Outcome, run_cell
from ml2o_dist.evaluation.optimizer_specs import HandDesigned, Learned
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.problems.spec import FACTORIES
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import generator


class Bowl(Problem):
    """f_i(z) = |z - c_i|^2 / 2 + noise e_i with e_i ~ N(0, 1) drawn per batch and c_i = i (1, ..., 1) / m.

    The noise echoes the batch in the losses and leaves the gradient alone: plain gradient steps on the mean are
    z_k = c + (1 - lr)^k (z_0 - c), c the mean of the c_i.
    """

    def __init__(self, context: ProblemContext, *, m: int = 2, n: int = 3, noise: float = 0.0) -> None:
        self.instances, self.objectives, self.dimension, self.noise = context.instances, m, n, noise
        self.device, self.dtype = context.device, context.dtype
        self.centres = (torch.arange(m, dtype=self.dtype) / m)[:, None].expand(m, n)

    def initial_parameters(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(self.dimension, generator=generator(s)).to(self.dtype) for s in seeds]) + 5

    def sample_batch(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.instances, self.objectives, generator=generator)

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        gaps = (parameters[:, None] - self.centres).square().sum(dim=2) / 2
        return (gaps + self.noise * batch)[:, None]

    def test_metrics(self, parameters: Tensor) -> dict[str, Tensor]:
        return {"test_loss": self.losses(parameters, torch.zeros(self.instances, self.objectives)).detach()}


class Echo(Bowl):
    """The losses are the batch, wherever the parameters are: what one optimizer sees, all must see."""

    def sample_losses(self, parameters: Tensor, batch: Tensor) -> Tensor:
        return (batch + 0 * parameters.sum(dim=1, keepdim=True))[:, None]


@pytest.fixture(autouse=True)
def _problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FACTORIES._values, "bowl", Bowl)
    monkeypatch.setitem(FACTORIES._values, "echo", Echo)


LEARNED = Learned("learned", RuleSettings(lr=0.3), ML2ONetwork(RuleSettings(lr=0.3)).state_dict())
INITIAL = Learned("initial", RuleSettings(), None)
CELL = Cell(HandDesigned.parse("mean+sgd@0.1"), ProblemSpec("bowl"), (1, 2), "report", 20)


def sgd_losses(start: Tensor, objectives: int, lr: float, steps: int) -> Tensor:
    """Closed-form losses [steps, P, m] of gradient steps on the mean of a noise-free `Bowl` from `start` [P, n]."""
    centres = (torch.arange(objectives, dtype=torch.float64) / objectives)[:, None].expand(-1, start.shape[1])
    middle = centres.mean(dim=0)
    points = torch.stack([middle + (1 - lr) ** k * (start.double() - middle) for k in range(steps)])
    return (points[:, :, None] - centres).square().sum(dim=3) / 2


@pytest.mark.parametrize("seeds", [(4,), (1, 2, 3)])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 4), (3, 1), (5, 2)])
def test_a_cell_equals_the_closed_form(m: int, n: int, seeds: tuple[int, ...]) -> None:
    problem = ProblemSpec.of("bowl", {"m": m, "n": n})
    result = run_cell(replace(CELL, problem=problem, seeds=seeds, steps=30, dtype=torch.float64))
    start = problem.build(ProblemContext(len(seeds), dtype=torch.float64)).initial_parameters(seeds)
    expected = sgd_losses(start, m, 0.1, 31)
    torch.testing.assert_close(result.losses, expected[:30])
    torch.testing.assert_close(result.final, expected[27:30].mean(dim=0))
    torch.testing.assert_close(result.final_sum, expected[27:30].mean(dim=0).sum(dim=1))
    torch.testing.assert_close(result.test_metrics["test_loss"], expected[30])
    assert (result.forwards, result.backwards) == (30, 30)  # the sum's gradient
    assert result.evaluations.tolist() == [2 * (k + 1) for k in range(30)]
    assert result.seconds.shape == (30,)
    torch.testing.assert_close(result.final_after(15), expected[14:15].mean(dim=0))
    assert result.diverged.tolist() == [False] * len(seeds)
    assert result.ms_per_step > 0


def test_a_cell_is_a_function_of_its_description() -> None:
    for optimizer in (HandDesigned.parse("pcgrad@0.01"), LEARNED):
        cell = replace(CELL, optimizer=optimizer, problem=ProblemSpec.parse("bowl[m=3,noise=1]"))
        first, second = run_cell(cell), run_cell(pickle.loads(pickle.dumps(cell)))
        assert torch.equal(first.losses, second.losses)
        assert torch.equal(first.test_metrics["test_loss"], second.test_metrics["test_loss"])
        other = run_cell(replace(cell, stream="tuning"))
        assert not torch.equal(first.losses, other.losses)


def test_all_optimizers_see_the_same_batches_and_starting_points() -> None:
    optimizers = [HandDesigned.parse("mean+sgd@0.1"), HandDesigned.parse("mgda+adam@0.03"), LEARNED, INITIAL]
    echo = [run_cell(replace(CELL, optimizer=c, problem=ProblemSpec("echo"))).losses for c in optimizers]
    bowl = [run_cell(replace(CELL, optimizer=c)).losses for c in optimizers]
    for other in echo[1:]:
        assert torch.equal(other, echo[0])
    for other in bowl[1:]:
        assert torch.equal(other[0], bowl[0][0])
        assert not torch.equal(other[-1], bowl[0][-1])


def test_initial_is_adam_on_the_sum() -> None:
    adam = run_cell(replace(CELL, optimizer=HandDesigned.parse("mean+adam@0.01")))
    initial = run_cell(replace(CELL, optimizer=INITIAL))
    torch.testing.assert_close(initial.losses, adam.losses, rtol=1e-5, atol=1e-5)


def test_a_diverged_cell_is_a_result() -> None:
    result = run_cell(replace(CELL, optimizer=HandDesigned.parse("mean+sgd@1e6"), steps=20))
    assert result.diverged.tolist() == [True, True]
    assert result.final_sum.tolist() == [math.inf, math.inf]
    large = run_cell(replace(CELL, optimizer=HandDesigned.parse("mean+sgd@100"), steps=5))
    assert large.losses.isfinite().all()
    assert large.diverged.tolist() == [True, True]


QUADRATIC = replace(CELL, problem=ProblemSpec.parse("quadratic[m=2,n=5]"))


def on_ray(cells: Sequence[Cell], **options: object) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    run_outcomes_on_ray(cells, found.__setitem__, **options)
    return [found[index] for index in range(len(cells))]


@pytest.mark.usefixtures("cluster")
def test_ray_tasks_give_the_same_results_in_the_same_order() -> None:
    cells = [replace(QUADRATIC, optimizer=c, steps=s) for c, s in [(LEARNED, 40), (CELL.optimizer, 5), (INITIAL, 10)]]
    seen: list[tuple[int, int]] = []
    far = on_ray(cells, on_done=lambda done, total: seen.append((done, total)))
    assert [pair for pair in dict.fromkeys(seen) if pair[0]] == [(1, 3), (2, 3), (3, 3)]
    for there, cell in zip(far, cells, strict=True):
        torch.testing.assert_close(there.losses, run_cell(cell).losses)


@pytest.mark.usefixtures("cluster")
def test_ray_says_what_is_wrong_instead_of_hanging() -> None:
    with pytest.raises(UserError, match=r"no node .* has 999 CPUs"):
        on_ray([QUADRATIC], num_cpus=999)
    fixed = RuleSettings(objectives="per_objective", count=3)
    failure, result = on_ray([replace(QUADRATIC, optimizer=Learned("learned", fixed, None)), QUADRATIC])
    assert isinstance(failure, CellFailure)
    assert "num_objectives=3, the problem has 2" in failure.reason
    assert "\n" not in failure.reason
    assert torch.equal(result.losses, run_cell(QUADRATIC).losses)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(UserError, match="needs a learning rate"):
        HandDesigned.parse("mgda+adam")
    with pytest.raises(UserError, match="did you mean 'mgda'"):
        HandDesigned.parse("mgad@0.1")
