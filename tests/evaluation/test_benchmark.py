"""The comparison against closed forms, brute force and plain loops."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ml2o_dist.config import MetaTrainSettings, RuleSettings
from ml2o_dist.config_file import parse_settings
from ml2o_dist.errors import UserError
from ml2o_dist.evaluation.benchmark import Comparison, compare
from ml2o_dist.evaluation.cell_tasks import run_cells_on_ray
from ml2o_dist.evaluation.cells import Cell, CellResult, run_cell, run_cells_in_process
from ml2o_dist.evaluation.contestants import HandDesigned, Learned
from ml2o_dist.evaluation.report import comparison_markdown
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec, base
from ml2o_dist.rules.ml2o import ML2ONetwork
from ml2o_dist.seeding import derive_seed, generator
from tests.evaluation.comparisons import COMPARISON


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
    monkeypatch.setitem(base._FACTORIES, "bowl", Bowl)
    monkeypatch.setitem(base._FACTORIES, "echo", Echo)


LEARNED = Learned("learned", RuleSettings(lr=0.3), ML2ONetwork(RuleSettings(lr=0.3)).state_dict())
INITIAL = Learned("initial", RuleSettings(), None)
CELL = Cell(HandDesigned.parse("mean+sgd@0.1"), ProblemSpec("bowl"), (1, 2), "report", 20)


def settings(**comparison: object) -> MetaTrainSettings:
    small = {"steps": 20, "seeds": 3, "tuning_seeds": 2, "baselines": ["mean+sgd", "mean+adam"]}
    chosen = small | {"learning_rates": [0.01, 0.1, 1.0]} | comparison
    family = {"train": [{"problem": "bowl"}], "validation": ["bowl"], "test": ["bowl", "bowl[m=3,n=1]"]}
    return parse_settings({"seed": 7, "device": "cpu", "family": family, "comparison": chosen})


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
    assert (result.forwards, result.backwards) == (30, 30 * m)
    assert result.diverged.tolist() == [False] * len(seeds)
    assert result.ms_per_step > 0


def test_a_cell_is_a_function_of_its_description() -> None:
    for contestant in (HandDesigned.parse("pcgrad@0.01"), LEARNED):
        cell = replace(CELL, contestant=contestant, problem=ProblemSpec.parse("bowl[m=3,noise=1]"))
        first, second = run_cell(cell), run_cell(pickle.loads(pickle.dumps(cell)))
        assert torch.equal(first.losses, second.losses)
        assert torch.equal(first.test_metrics["test_loss"], second.test_metrics["test_loss"])
        other = run_cell(replace(cell, stream="tuning"))
        assert not torch.equal(first.losses, other.losses)


def test_all_optimizers_see_the_same_batches_and_starting_points() -> None:
    contestants = [HandDesigned.parse("mean+sgd@0.1"), HandDesigned.parse("mgda+adam@0.03"), LEARNED, INITIAL]
    echo = [run_cell(replace(CELL, contestant=c, problem=ProblemSpec("echo"))).losses for c in contestants]
    bowl = [run_cell(replace(CELL, contestant=c)).losses for c in contestants]
    for other in echo[1:]:
        assert torch.equal(other, echo[0])
    for other in bowl[1:]:
        assert torch.equal(other[0], bowl[0][0])
        assert not torch.equal(other[-1], bowl[0][-1])


def test_initial_is_adam_on_the_sum() -> None:
    adam = run_cell(replace(CELL, contestant=HandDesigned.parse("mean+adam@0.01")))
    initial = run_cell(replace(CELL, contestant=INITIAL))
    torch.testing.assert_close(initial.losses, adam.losses, rtol=1e-5, atol=1e-5)


def test_a_diverged_cell_is_a_result() -> None:
    result = run_cell(replace(CELL, contestant=HandDesigned.parse("mean+sgd@1e6"), steps=20))
    assert result.diverged.tolist() == [True, True]
    assert result.final_sum.tolist() == [math.inf, math.inf]
    large = run_cell(replace(CELL, contestant=HandDesigned.parse("mean+sgd@100"), steps=5))
    assert large.losses.isfinite().all()
    assert large.diverged.tolist() == [True, True]


def test_tuning_equals_brute_force() -> None:
    chosen = settings(learning_rates=[0.03, 0.1, 1.0, 1.9])
    comparison = compare(chosen, [LEARNED, INITIAL], run_cells_in_process)
    for table, (m, n) in zip(comparison.problems, [(2, 3), (3, 1)], strict=True):
        spec = ProblemSpec.parse(table.problem)
        seeds = [derive_seed(7, "tuning", str(spec), i) for i in range(2)]
        start = spec.build(ProblemContext(2)).initial_parameters(seeds)
        brute = {
            lr: float(sgd_losses(start, m, lr, 20)[-2:].mean(dim=0).sum(dim=1).mean())
            for lr in chosen.comparison.learning_rates
        }
        row = next(row for row in table.rows if row.optimizer == "mean+sgd")
        assert start.shape == (2, n)
        assert dict(row.tuning) == pytest.approx(brute, rel=1e-4)
        assert row.label == f"mean+sgd@{min(brute, key=brute.__getitem__):g}" == "mean+sgd@1"
        assert row.note == ""


def test_every_baseline_has_the_same_budget_and_seeds_of_its_own() -> None:
    calls: list[list[Cell]] = []

    def watching(cells: Sequence[Cell]) -> list[CellResult]:
        calls.append(list(cells))
        return run_cells_in_process(cells)

    compare(settings(steps=10, baselines=["mean+sgd", "mgda", "pcgrad+adam@0.01"]), [LEARNED, INITIAL], watching)
    tuning, report = calls
    tuned = [(c.contestant.label.partition("@")[0], str(c.problem)) for c in tuning]
    assert {tuned.count(one) for one in tuned} == {3}
    assert len(set(tuned)) == 2 * 2
    assert len(report) == 2 * (3 + 2)
    assert {len(c.seeds) for c in tuning} == {2}
    for problem in {str(c.problem) for c in report}:
        pairs = {(c.seeds, c.stream, c.steps) for c in report if str(c.problem) == problem}
        assert len(pairs) == 1
    used = [{seed for c in cells for seed in c.seeds} for cells in calls]
    assert not used[0] & used[1]
    assert len(used[1]) == 2 * 3


@pytest.mark.parametrize(
    ("rates", "label", "note"),
    [
        ([0.01, 0.1], "mean+sgd@0.1", "best learning rate 0.1 is at the edge of the grid"),
        ([1.0, 3.0], "mean+sgd@1", "best learning rate 1 is at the edge of the grid"),
        ([0.1], "mean+sgd@0.1", ""),
        ([1e7, 1e6], "mean+sgd@1e+06", "diverged at every learning rate of the grid"),
    ],
)
def test_the_edge_of_the_grid_is_noted(rates: list[float], label: str, note: str) -> None:
    comparison = compare(settings(baselines=["mean+sgd"], learning_rates=rates), [], run_cells_in_process)
    (row,) = comparison.problems[0].rows
    assert (row.label, row.note) == (label, note)


def test_verdicts_are_the_paired_differences_of_the_rows() -> None:
    comparison = compare(settings(), [LEARNED, INITIAL], run_cells_in_process)
    assert len(comparison.problems) == 2
    for table in comparison.problems:
        rows = {row.label: row for row in table.rows}
        assert [row.loss for row in table.rows] == sorted(row.loss for row in table.rows)
        best = min((row for row in table.rows if row.baseline), key=lambda row: row.loss)
        assert table.best_baseline == best.label
        for versus, reference in [(table.versus_baseline, best), (table.versus_initial, rows["initial"])]:
            assert versus is not None
            gaps = torch.tensor(rows["learned"].seed_losses) - torch.tensor(reference.seed_losses)
            assert versus.reference == reference.label
            assert versus.difference.mean == pytest.approx(float(gaps.mean()), rel=1e-5)
            assert versus.difference.standard_error == pytest.approx(float(gaps.std()) / math.sqrt(3), rel=1e-5)
            assert versus.ratio == pytest.approx(rows["learned"].loss / reference.loss)
            assert versus.within_one_se == (versus.difference.mean <= versus.difference.standard_error)
        assert table.versus_initial is not None
        assert table.versus_initial.difference.mean < 0  # lr 0.3 gets further than 0.01 in 20 steps


def test_a_row_is_the_mean_over_its_cell() -> None:
    results: dict[str, CellResult] = {}

    def keeping(cells: Sequence[Cell]) -> list[CellResult]:
        ran = run_cells_in_process(cells)
        results.update({f"{c.stream} {c.problem} {r.optimizer}": r for c, r in zip(cells, ran, strict=True)})
        return ran

    comparison = compare(settings(), [LEARNED], keeping)
    for table in comparison.problems:
        for row in table.rows:
            result = results[f"report {table.problem} {row.label}"]
            assert row.loss == pytest.approx(float(result.final.sum(dim=1).mean()))
            assert row.objectives == pytest.approx(tuple(result.final.mean(dim=0).tolist()))
            assert row.curve == pytest.approx(result.losses.sum(dim=2).mean(dim=1).tolist())
            assert row.test["test_loss"] == pytest.approx(tuple(result.test_metrics["test_loss"].mean(dim=0).tolist()))
            assert (row.forwards, row.diverged, len(row.curve)) == (20, 0, 20)


def test_json_is_plain_and_finite_also_when_all_diverge() -> None:
    fine = compare(settings(), [LEARNED, INITIAL], run_cells_in_process).to_json()
    read = json.loads(json.dumps(fine, allow_nan=False))
    assert read == fine
    assert [table["problem"] for table in read["problems"]] == ["bowl", "bowl[m=3,n=1]"]
    assert read["problems"][0]["versus_baseline"]["within_one_se"] in (True, False)
    broken = compare(settings(baselines=["mean+sgd@1e9"]), [LEARNED], run_cells_in_process)
    table = broken.to_json()["problems"][0]
    json.dumps(broken.to_json(), allow_nan=False)
    diverged = next(row for row in table["rows"] if row["baseline"])
    assert diverged["loss"] is None
    assert diverged["diverged"] == 3
    assert table["versus_baseline"]["within_one_se"] is True
    assert table["versus_initial"] is None


def test_wrong_words_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'mgda'"):
        compare(settings(baselines=["mgad"]), [], run_cells_in_process)
    with pytest.raises(UserError, match="needs a learning rate"):
        HandDesigned.parse("mgda+adam")
    with pytest.raises(ValueError, match="labels"):
        compare(settings(), [LEARNED, LEARNED], run_cells_in_process)


def test_progress_counts_the_cells() -> None:
    seen: list[tuple[int, int]] = []
    run_cells_in_process([CELL, CELL], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


QUADRATIC = replace(CELL, problem=ProblemSpec.parse("quadratic[m=2,n=5]"))


@pytest.mark.usefixtures("cluster")
def test_ray_tasks_give_the_same_results_in_the_same_order() -> None:
    cells = [replace(QUADRATIC, contestant=c, steps=s) for c, s in [(LEARNED, 40), (CELL.contestant, 5), (INITIAL, 10)]]
    seen: list[tuple[int, int]] = []
    far = run_cells_on_ray(cells, on_done=lambda done, total: seen.append((done, total)))
    near = run_cells_in_process(cells)
    assert [pair for pair in dict.fromkeys(seen) if pair[0]] == [(1, 3), (2, 3), (3, 3)]
    assert [result.optimizer for result in far] == ["learned", "mean+sgd@0.1", "initial"]
    for there, here in zip(far, near, strict=True):
        torch.testing.assert_close(there.losses, here.losses)


@pytest.mark.usefixtures("cluster")
def test_ray_says_what_is_wrong_instead_of_hanging() -> None:
    with pytest.raises(UserError, match=r"no node .* has 999 CPUs"):
        run_cells_on_ray([QUADRATIC], num_cpus=999)
    fixed = RuleSettings(objectives="per_objective", count=3)
    wrong = replace(QUADRATIC, contestant=Learned("learned", fixed, None))
    with pytest.raises(UserError, match=r"count=3 objectives, the problem has 2") as caught:
        run_cells_on_ray([wrong, QUADRATIC])
    assert "\n" not in str(caught.value)


def test_a_comparison_survives_json_but_for_what_is_not_finite():
    again = Comparison.from_json(json.loads(json.dumps(COMPARISON.to_json())))
    assert again.to_json() == COMPARISON.to_json()
    assert comparison_markdown(again) == comparison_markdown(COMPARISON)
    sound = replace(COMPARISON, problems=(replace(COMPARISON.problems[0], rows=COMPARISON.problems[0].rows[:3]),))
    assert Comparison.from_json(json.loads(json.dumps(sound.to_json()))) == sound


@pytest.mark.parametrize("tree", [{}, {"steps": 3}, [], "x", {**COMPARISON.to_json(), "problems": [{"problem": "x"}]}])
def test_something_else_is_no_comparison(tree):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Comparison.from_json(tree)
