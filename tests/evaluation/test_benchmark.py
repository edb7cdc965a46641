"""Benchmarks in process against closed forms, loops of their own, and each other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.config_file import load_evaluation
from ml2o_dist.evaluation.benchmark import check_fit, front_indicators, plan, summarise, thinned, tune_entrants
from ml2o_dist.evaluation.cells import Cell, CellFailure, Outcome, run_cell
from ml2o_dist.evaluation.evaluated import CURVE_POINTS, EvaluatedCell, Evaluation
from ml2o_dist.evaluation.optimizer_names import parse_optimizers
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.guarded import GuardedRule
from ml2o_dist.rules.stochastic import DSSMG
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.seeding import derive_seed, generator
from tests.wording import says

NOISY = "quadratic[n=4,noise=0.5,batch=8]"
DIGITS = "multidigits[net=mlp,hidden=4,batch=8]"


def settings(optimizers: Sequence[str], problems: Sequence[str], **changes: Any) -> EvaluateSettings:
    chosen = {"steps": 20, "seeds": 2, "criticality_batches": 4, "device": "cpu"} | changes
    words = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    return load_evaluation(None, [f"optimizers={list(optimizers)}", f"problems={list(problems)}", *words])


def in_process(given: Sequence[Cell]) -> list[Outcome]:
    return [run_cell(cell) for cell in given]


def evaluate(chosen: EvaluateSettings, run: Any = in_process) -> Evaluation:
    entrants = parse_optimizers(chosen, lambda reference: pytest.fail(reference))
    tuned = tune_entrants(chosen, entrants, run)
    planned = plan(chosen, entrants, tuned)
    outcomes: Sequence[Outcome] = run([each.cell for each in planned])
    return summarise(chosen, planned, outcomes, tuned, {})


def cells(evaluation: Evaluation, optimizer: str, problem: str) -> list[EvaluatedCell]:
    return [cell for cell in evaluation.cells if (cell.optimizer, cell.problem) == (optimizer, problem)]


def test_plain_gradient_steps_on_a_quadratic_in_numpy() -> None:
    """Losses, end point, min-norm of two gradients (the distance from 0 to a segment) and what is charged."""
    name, rate, steps = "quadratic[m=2,n=5]", 0.3, 40
    evaluation = evaluate(settings([f"mean+sgd@{rate}"], [name], steps=steps, seed=3))
    problem: Any = ProblemSpec.parse(name).build(ProblemContext(dtype=torch.float64))
    hessians = np.array([factor.T @ factor for factor in problem.factors[0].numpy()])
    centres = problem.centres[0].numpy()
    assert [cell.seed for cell in evaluation.cells] == [3, 4]
    for cell in evaluation.cells:
        z = problem.initial_parameters([cell.seed])[0].numpy()
        losses = []
        for _ in range(steps):
            gaps = z - centres
            losses.append([0.5 * gap @ hessian @ gap for gap, hessian in zip(gaps, hessians, strict=True)])
            z = z - rate * np.mean([hessian @ gap for gap, hessian in zip(gaps, hessians, strict=True)], axis=0)
        np.testing.assert_allclose(cell.losses, np.mean(losses[-4:], axis=0), rtol=1e-4)
        first, second = (hessian @ (z - centre) for hessian, centre in zip(hessians, centres, strict=True))
        share = np.clip(second @ (second - first) / ((second - first) @ (second - first)), 0, 1)
        nearest = np.linalg.norm(share * first + (1 - share) * second)
        np.testing.assert_allclose(cell.criticality, nearest, rtol=1e-4)
        mean_norm = (np.linalg.norm(first) + np.linalg.norm(second)) / 2
        np.testing.assert_allclose(cell.criticality_relative, nearest / mean_norm, rtol=1e-4)
        end = [0.5 * (z - c) @ h @ (z - c) for c, h in zip(centres, hessians, strict=True)]
        np.testing.assert_allclose(cell.end_losses, end, rtol=1e-4)
        assert 0 <= cell.criticality_gap < 1e-12
        assert (cell.forwards, cell.backwards, cell.evaluations) == (steps, steps, 2 * steps)
        assert (cell.acceptance, cell.guard_share, cell.test_accuracy) == (None, None, None)
        assert (cell.learning_rate, cell.steps, cell.diverged) == (rate, steps, False)


def test_a_learned_rule_equals_its_own_loop() -> None:
    evaluation = evaluate(settings(["initial"], [DIGITS], rule={"hidden": 3, "lr": 0.02}))
    problem = ProblemSpec.parse(DIGITS).build(ProblemContext())
    for cell in evaluation.cells:
        oracle = Oracle(problem, generator("batches", "report", str(ProblemSpec.parse(DIGITS)), cell.seed))
        made = ML2ORule.from_weights(evaluation.settings.rule, None)
        z, state = problem.initial_parameters([cell.seed]), made.initial_state(1, 2, problem.layout)
        losses = []
        for _ in range(20):
            z, state, info = made.step(oracle, z, state)
            losses.append(info.losses[0].double())
        assert cell.losses == tuple(torch.stack(losses[-2:]).mean(dim=0).tolist())
        assert cell.test_accuracy == tuple(problem.test_metrics(z)["test_accuracy"][0].double().tolist())


@pytest.mark.parametrize("problem", ["quadratic[m=3,n=4]", NOISY, "zdt1[n=4]", DIGITS])
def test_an_adversary_under_the_guard_is_the_fallback_bit_for_bit(problem: str) -> None:
    names = ["dssmg", "gml2o:ascent", "gml2o:nan", "ascent", "nan"]
    evaluation = evaluate(settings(names, [problem], guard={"budget": 0.0}))
    alone = cells(evaluation, "dssmg", problem)
    for name in ("gml2o:ascent", "gml2o:nan"):
        guarded = cells(evaluation, name, problem)
        assert [cell.losses for cell in guarded] == [cell.losses for cell in alone]
        assert [cell.end_losses for cell in guarded] == [cell.end_losses for cell in alone]
        assert [cell.acceptance for cell in guarded] == [0.0, 0.0]
        assert all(0 < (cell.guard_share or 0) < 1 for cell in guarded)
        # two forwards a step for the comparison; the rest is what the fallback needs, its line search included
        assert [g.evaluations - a.evaluations for g, a in zip(guarded, alone, strict=True)] == [40, 40]
    assert all(cell.diverged for cell in cells(evaluation, "nan", problem))
    climbing = cells(evaluation, "ascent", problem)
    assert all(sum(up.losses) > sum(down.losses) for up, down in zip(climbing, alone, strict=True))


@pytest.mark.parametrize("problem", ["quadratic[m=3,n=4]", NOISY])
def test_a_guarded_step_is_charged_a_jacobian_a_gradient_and_two_forwards(problem: str) -> None:
    longer, shorter = (evaluate(settings(["gml2o:random"], [problem], steps=steps)).cells for steps in (31, 30))
    objectives = 3 if "m=3" in problem else 2
    for more, less in zip(longer, shorter, strict=True):
        assert (more.forwards - less.forwards, more.backwards - less.backwards) == (4, objectives + 1)


def test_the_settings_of_the_guard_are_heeded() -> None:
    evaluation = evaluate(settings(["gml2o:frozen", "frozen"], ["quadratic[n=4]"], guard={"eps": 1e9}))
    guarded, frozen = (cells(evaluation, name, "quadratic[n=4]") for name in ("gml2o:frozen", "frozen"))
    assert [cell.acceptance for cell in guarded] == [1.0, 1.0]
    assert [cell.losses for cell in guarded] == [cell.losses for cell in frozen]


def test_acceptance_is_the_share_of_steps_that_took_the_learned_candidate() -> None:
    chosen = settings(["gml2o:drift"], [NOISY], guard={"eps": 10.0, "margin": 1.0}, steps=30)
    evaluation = evaluate(chosen)
    problem = ProblemSpec.parse(NOISY).build(ProblemContext())
    for index, cell in enumerate(evaluation.cells):
        planned = plan(chosen, parse_optimizers(chosen, lambda reference: pytest.fail(reference)), {})[index]
        made = planned.cell.optimizer.rule(torch.device("cpu"), torch.float32)
        assert isinstance(made, GuardedRule)
        assert isinstance(made.fallback, DSSMG)
        names = ("batches", "report", str(planned.cell.problem), cell.seed)
        streams = [generator(*names), generator(*names, "in one step", 1), generator(*names, "in one step", 2)]
        z, state, taken = (
            problem.initial_parameters([cell.seed]),
            made.initial_state(1, 2, ParameterLayout.vector(4)),
            [],
        )
        for _ in range(30):
            batches = iter([problem.sample_batch(stream) for stream in streams])
            oracle = Oracle(problem, generator("unused"))
            oracle.draw = lambda batches=batches: next(batches)  # type: ignore[method-assign]
            z, state, info = made.step(oracle, z, state)
            taken.append(bool(info.accepted[0]))
        assert 0 < sum(taken) < 30
        assert cell.acceptance == pytest.approx(sum(taken) / 30)


def test_a_cell_depends_on_its_own_names_alone() -> None:
    many = evaluate(settings(["initial", "mgda+adam@0.01"], [NOISY, "fonseca"], seeds=3))
    one = evaluate(settings(["mgda+adam@0.01"], [NOISY], seeds=1, seed=2))
    (alone,) = one.cells
    same = next(cell for cell in cells(many, "mgda+adam@0.01", NOISY) if cell.seed == 2)
    assert replace(alone, ms_per_step=0) == replace(same, ms_per_step=0)


def test_the_learning_rate_is_that_of_brute_force_on_seeds_of_its_own() -> None:
    ran: list[Cell] = []

    def watching(given: Sequence[Cell]) -> list[Outcome]:
        ran.extend(given)
        return in_process(given)

    rates = [0.01, 0.3, 5.0]
    chosen = settings(["mean+sgd", "gml2o:mean+sgd", "mean+sgd@0.1"], [NOISY], learning_rates=rates, tuning_seeds=2)
    evaluation = evaluate(chosen, watching)
    tuning = [cell for cell in ran if cell.stream == "tuning"]
    assert len(tuning) == 2 * 3 * 2
    seeds = {derive_seed(0, "tuning", str(ProblemSpec.parse(NOISY)), i) for i in range(2)}
    assert {seed for cell in tuning for seed in cell.seeds} == seeds
    assert {seed for cell in ran if cell.stream == "report" for seed in cell.seeds} == {0, 1}
    brute = {}
    for rate in rates:
        trials = [cell for cell in tuning if cell.optimizer.label == f"mean+sgd@{rate:g}"]
        results = [run_cell(cell) for cell in trials]
        diverged = any(bool(result.diverged) for result in results)
        brute[rate] = math.inf if diverged else sum(float(result.final_sum) for result in results) / 2
    row = next(row for row in evaluation.rows if row.optimizer == "mean+sgd")
    assert dict(row.tuning) == pytest.approx(brute)
    best = min(brute, key=brute.__getitem__)
    assert best == row.learning_rate == 0.3
    assert {cell.learning_rate for cell in cells(evaluation, "mean+sgd", NOISY)} == {best}
    assert {cell.learning_rate for cell in cells(evaluation, "mean+sgd@0.1", NOISY)} == {0.1}
    given = next(row for row in evaluation.rows if row.optimizer == "mean+sgd@0.1")
    assert given.tuning == {}


def test_end_points_before_a_known_front() -> None:
    evaluation = evaluate(settings(["dssmg", "nan"], ["fonseca", DIGITS], seeds=4, steps=60))
    row = evaluation.rows[0]
    points = np.array([cell.end_losses for cell in cells(evaluation, "dssmg", "fonseca")])
    x = np.linspace(-1 / math.sqrt(2), 1 / math.sqrt(2), 1000)
    front = np.array([1 - np.exp(-2 * (x - 1 / math.sqrt(2)) ** 2), 1 - np.exp(-2 * (x + 1 / math.sqrt(2)) ** 2)]).T
    area, right = 0.0, 1.1
    for a, b in sorted(map(tuple, points), key=lambda p: p[1]):  # strips from the lowest second objective up
        if a < right and b < 1.1:
            area += (right - a) * (1.1 - b)
            right = a
    assert row.front is not None
    assert row.front.hypervolume == pytest.approx(area)
    assert row.front.outside == sum(bool((point >= 1.1).any()) for point in points)
    shortfall = np.maximum(points[None] - front[:, None], 0)
    assert row.front.igd_plus == pytest.approx(np.linalg.norm(shortfall, axis=2).min(axis=1).mean(), rel=1e-6)
    excess = (points[None] - front[:, None]).max(axis=2).min(axis=1).max()
    assert row.front.additive_epsilon == pytest.approx(excess, rel=1e-6)
    lost = evaluation.rows[1]
    assert lost.front is not None
    assert (lost.front.hypervolume, lost.front.outside, lost.diverged) == (0.0, 4, 4)
    assert [row.front for row in evaluation.rows if row.problem == DIGITS] == [None, None]


def test_a_known_front_reaches_itself() -> None:
    problem = ProblemSpec.parse("zdt1").build(ProblemContext(dtype=torch.float64))
    found = front_indicators(problem, problem.pareto_front(1000))
    assert found is not None
    assert found.hypervolume == found.hypervolume_of_front == pytest.approx(121 - 1 / 3, rel=1e-3)
    assert (found.igd_plus, found.additive_epsilon, found.outside) == (0.0, 0.0, 0)


def test_json_is_strict_and_has_the_keys_of_the_design_also_when_all_diverge() -> None:
    evaluation = evaluate(settings(["nan", "dssmg"], ["quadratic[m=1,n=2]", DIGITS], seeds=1))
    answer = evaluation.to_json()
    assert json.loads(json.dumps(answer, allow_nan=False)) == json.loads(json.dumps(answer))
    assert set(answer) == {"cells", "summary"}
    keys = {"optimizer", "problem", "seed", "steps", "losses", "test_accuracy", "criticality", "acceptance",
            "evaluations", "ms_per_step", "diverged"}  # fmt: skip
    assert all(keys <= cell.keys() for cell in answer["cells"])
    lost = answer["cells"][0]
    assert (lost["losses"], lost["criticality"], lost["diverged"]) == ([None], None, True)
    assert answer["summary"]["rows"][0]["loss"] is None
    assert answer["cells"][1]["conflicting"] is None, "one objective has no pair"
    assert len(answer["cells"][3]["test_accuracy"]) == 2


def test_a_row_is_the_mean_of_its_cells() -> None:
    evaluation = evaluate(settings(["gml2o:initial"], [DIGITS], seeds=3))
    (row,) = evaluation.rows
    sums = [sum(cell.losses) for cell in evaluation.cells]
    assert row.loss == pytest.approx(np.mean(sums))
    assert row.loss_standard_error == pytest.approx(np.std(sums, ddof=1) / math.sqrt(3))
    measures = [cell.criticality for cell in evaluation.cells]
    assert row.criticality == pytest.approx(np.mean(measures))
    assert row.criticality_standard_error == pytest.approx(np.std(measures, ddof=1) / math.sqrt(3))
    for name in ("losses", "test_accuracy"):
        assert getattr(row, name) == pytest.approx(np.mean([getattr(cell, name) for cell in evaluation.cells], axis=0))
    for name in ("acceptance", "evaluations", "ms_per_step", "guard_share", "conflicting", "mean_cosine"):
        assert getattr(row, name) == pytest.approx(np.mean([getattr(cell, name) for cell in evaluation.cells]))
    assert (row.seeds, row.failed, row.diverged, row.curve.steps) == (3, 0, 0, tuple(range(1, 21)))
    assert row.seed_losses == pytest.approx(sums)
    assert np.mean(row.curve.loss[-2:]) == pytest.approx(row.loss)
    assert row.curve.acceptance is not None
    assert np.mean(row.curve.acceptance) == pytest.approx(row.acceptance)


def test_what_failed_is_listed() -> None:
    chosen = settings(["mean+sgd", "dssmg"], ["fonseca"], seeds=3, learning_rates=[0.1, 0.2])

    def failing(given: Sequence[Cell]) -> list[Outcome]:
        results = in_process(given)
        if given[0].stream == "tuning":
            results[1] = CellFailure(RuntimeError("out of\nmemory"))
        else:
            results[4] = CellFailure(OSError())
        return results

    evaluation = evaluate(chosen, failing)
    tuned = next(row for row in evaluation.rows if row.optimizer == "mean+sgd")
    assert (tuned.learning_rate, tuned.note) == (0.1, "tuning failed at learning rate 0.2")
    first, second = evaluation.failed
    assert (first.optimizer, first.seed, first.learning_rate) == ("mean+sgd", None, 0.2)
    assert first.error == "RuntimeError: out of memory"
    assert (second.optimizer, second.problem, second.seed, second.error) == ("dssmg", "fonseca", 1, "OSError")
    assert [cell.seed for cell in cells(evaluation, "dssmg", "fonseca")] == [0, 2]
    row = next(row for row in evaluation.rows if row.optimizer == "dssmg")
    assert (row.seeds, row.failed) == (2, 1)
    assert math.isnan(row.seed_losses[1])
    assert row.loss == pytest.approx((row.seed_losses[0] + row.seed_losses[2]) / 2)


def test_conflict_is_that_of_the_gradients_the_steps_saw() -> None:
    evaluation = evaluate(settings(["mean+sgd@0.1"], [NOISY], seeds=1, steps=25))
    problem = ProblemSpec.parse(NOISY).build(ProblemContext())
    oracle = Oracle(problem, generator("batches", "report", str(ProblemSpec.parse(NOISY)), 0))
    z, cosines = problem.initial_parameters([0]), []
    for step in range(25):
        jacobian, _ = oracle.jacobian(z, oracle.draw())
        if step in (0, 10, 20):
            cosines.append(float(torch.nn.functional.cosine_similarity(jacobian[0, 0], jacobian[0, 1], dim=0)))
        z = z - 0.1 * jacobian.mean(dim=1)
    assert evaluation.cells[0].mean_cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert evaluation.cells[0].conflicting == pytest.approx(np.mean([cosine < 0 for cosine in cosines]))


@pytest.mark.parametrize(
    ("optimizer", "problem", "part"),
    [
        ("trimmedmean", "quadratic", "trimmedmean on quadratic ... 'trimmedmean' ... at least 3 objectives"),
        ("uw@0.1", NOISY, "losses ... positive"),
        ("initial", DIGITS, "rule.num_objectives=3"),
        ("gml2o:nan", "quadratic", "unknown aggregator 'dsmg'"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_runs(optimizer: str, problem: str, part: str) -> None:
    rule = {"objectives": "per_objective", "count": 3}
    chosen = settings([optimizer], [problem], rule=rule, guard={"fallback": "dsmg"})
    with pytest.raises(UserError) as caught:
        check_fit(chosen, parse_optimizers(chosen, lambda reference: pytest.fail(reference)))
    assert says(str(caught.value), part)


def test_the_check_returns_the_hashes_of_the_data() -> None:
    chosen = settings(["initial", "mgda"], [DIGITS, "fonseca"])
    hashes = check_fit(chosen, parse_optimizers(chosen, lambda reference: pytest.fail(reference)))
    assert list(hashes) == [ProblemSpec.parse(DIGITS), ProblemSpec.parse("fonseca")]
    digits = hashes[ProblemSpec.parse(DIGITS)]
    assert set(digits) == {"multidigits[size=0]", "multidigits[size=0] test"}
    assert all(len(digest) == 64 for digest in digits.values())
    assert hashes[ProblemSpec.parse("fonseca")] == {}


def test_a_problem_may_have_steps_of_its_own() -> None:
    evaluation = evaluate(settings(["mean+sgd@0.1"], ["fonseca", "fonseca@30"], seeds=1))
    short, long = evaluation.rows
    assert (short.problem, short.steps, len(short.curve.loss)) == ("fonseca", 20, 20)
    assert (long.problem, long.steps, len(long.curve.loss)) == ("fonseca@30", 30, 30)
    assert long.curve.loss[:20] == short.curve.loss
    with pytest.raises(UserError, match=r"@.*steps"):
        settings(["initial"], ["fonseca@0"])


def test_losses_at_equal_evaluations_and_time_stand_beside_those_at_equal_steps() -> None:
    """The reference takes 30 steps of 2 evaluations; `dssmg` and `frozen` are charged more for each."""
    name = "quadratic[n=4]"
    chosen = settings(["dssmg", "frozen"], [name], baselines=["mean+sgd@0.1"], reference="mean+sgd@0.1", steps=30)
    spent: list[int] = []

    def watching(given: Sequence[Cell]) -> list[Outcome]:
        outcomes = in_process(given)
        for cell, outcome in zip(given, outcomes, strict=True):
            if cell.optimizer.label == "dssmg":
                steps = int((outcome.evaluations <= 60).sum())
                spent.append(steps)
                tail = outcome.losses[steps - max(1, steps // 10) : steps].mean(dim=0).sum()
                ends.append(float(tail))
        return outcomes

    ends: list[float] = []
    evaluation = evaluate(chosen, watching)
    reference, dssmg, frozen = evaluation.rows
    assert [row.role for row in evaluation.rows] == ["baseline", "other", "other"]
    assert reference.loss_at_evaluations == reference.loss == reference.loss_at_time
    assert reference.evaluations == 60
    assert 0 < min(spent) < 30
    assert dssmg.loss_at_evaluations == pytest.approx(np.mean(ends))
    assert dssmg.loss_at_evaluations > dssmg.loss
    assert frozen.loss_at_evaluations == frozen.loss == frozen.loss_at_time  # it moves nowhere


@pytest.mark.parametrize(("steps", "points"), [(1, 1), (7, 7), (CURVE_POINTS, CURVE_POINTS), (1999, 200), (7001, 195)])
def test_a_long_curve_is_averaged_in_bins(steps: int, points: int) -> None:
    curves = [torch.arange(steps, dtype=torch.float64) + shift for shift in (0.0, 2.0)]
    accepted = [torch.arange(steps) % 2 == 0, torch.ones(steps, dtype=torch.bool)]
    curve = thinned(curves, accepted)
    assert len(curve.steps) == len(curve.loss) == len(curve.error) == points
    assert curve.steps[-1] == steps
    width = curve.steps[0]
    assert curve.loss[0] == pytest.approx((width - 1) / 2 + 1)
    assert curve.error == pytest.approx([1.0] * points)
    assert curve.acceptance is not None
    assert sum(share * (end - begin) for share, end, begin in
               zip(curve.acceptance, curve.steps, (0, *curve.steps), strict=False)) == pytest.approx(
        float(torch.stack(accepted).double().mean(dim=0).sum()))  # fmt: skip
    assert thinned(curves, []).acceptance is None


def test_an_evaluation_survives_json() -> None:
    chosen = settings(
        ["gml2o:initial", "nan"], ["fonseca", DIGITS], baselines=["mean+adam"], learning_rates=[0.01, 0.1]
    )
    evaluation = evaluate(chosen)
    text = json.dumps(evaluation.to_json(curves=True), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert json.dumps(again.to_json(curves=True), allow_nan=False) == text
    assert again.settings == chosen
    assert [row.curve.steps for row in again.rows] == [row.curve.steps for row in evaluation.rows]
    assert len(again.fronts["fonseca"]) == 100
    bare = Evaluation.from_json(evaluation.to_json())
    assert bare.rows[0].curve.loss == ()
    assert bare.standings[1].ratio == evaluation.standings[1].ratio


@pytest.mark.parametrize("tree", [{}, {"cells": [], "summary": {}}, {"cells": 3, "summary": {"rows": 1}}])
def test_something_else_is_no_evaluation(tree: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Evaluation.from_json(tree)
