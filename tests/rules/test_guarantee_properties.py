"""The guarantee of exact mode on problems, rules and settings that hypothesis makes up; broken guards are found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from ml2o_dist.config import GuardSettings
from ml2o_dist.problems import Problem
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.guarded import Debt, GuardedRule, Verdict
from ml2o_dist.rules.stochastic import DSSMG, DSSMGState
from tests.rules import stochastic_reference as reference
from tests.rules.bowls import Bowls
from tests.rules.guarded_cases import BOX, CASES, Case, Hostile, Move, Stretch

STEPS = 25


def plain(problem: Problem, p: int) -> reference.Bowl | None:
    """Return instance p in plain Python; None where the problem is analytic."""
    if not isinstance(problem, Bowls):
        return None
    box = None if problem.bounds is None else BOX
    return reference.Bowl(problem.curvatures[p].tolist(), problem.centres[p].tolist(), problem.scale, box)


def losses_of(problem: Problem, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [P, m] in float64 and their rounding: of quadratics in plain Python, else the problem's own."""
    if not isinstance(problem, Bowls):
        losses = problem.losses(points, None).double()
        return losses, torch.zeros_like(losses)
    silent = [[0.0] * problem.dimension] * problem.objectives
    rows = [plain(problem, p).losses(points[p].tolist(), silent) for p in range(len(points))]  # type: ignore[union-attr]
    losses = torch.tensor(rows, dtype=torch.float64)
    eps = torch.finfo(problem.dtype).eps
    return losses, (problem.dimension + 8) * eps * losses


def examine(case: Case, guard: type[GuardedRule] = GuardedRule, **changes: Any) -> list[bool]:
    """Assert everything that exact mode promises at every step of a run of `case`; return what was decided."""
    problem, point = case.build()
    chosen = GuardSettings(budget=0.0, eps=case.eps, p=case.p)
    fallback, hostile = case.fallback(), Hostile(case)
    rule = guard(hostile, fallback, chosen.model_copy(update=changes))
    oracle, apart = Oracle(problem, torch.Generator()), Oracle(problem, torch.Generator())
    state = rule.initial_state(problem.instances, problem.objectives, problem.layout)
    own = references(case, problem, point)
    bound, decided = Bound(problem, fallback), []
    for t in range(STEPS):
        before, was = point, state
        point, state, info = rule.step(oracle, point, state)
        candidate, _ = hostile.propose(apart, before, was.learned, info)
        safe, following = fallback.propose(apart, before, was.fallback, info)
        assert torch.equal(following.weights, state.fallback.weights)
        for p, generator in enumerate(own):
            expected, weights = generator.send(None if t == 0 else before[p].tolist())
            torch.testing.assert_close(safe[p], safe.new_tensor(expected), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(following.weights[p], safe.new_tensor(weights), rtol=0, atol=1e-6)

        allowed = case.eps / (t + 1) ** (2 * case.p)
        (reached, blur), (promised, other) = losses_of(problem, point), losses_of(problem, safe)
        assert (reached <= promised + allowed + blur + other).all(), f"step {t}: {reached} > {promised} + {allowed}"
        assert point.isfinite().all()
        assert problem.losses(point, None).isfinite().all()
        assert torch.equal(point, problem.project(point))
        assert torch.equal(point, torch.where(info.accepted[:, None], candidate, safe))
        (tried, unsure) = losses_of(problem, candidate)
        finite = candidate.isfinite().all(dim=1) & problem.losses(candidate, None).isfinite().all(dim=1)
        assert not info.accepted[~finite].any()
        passes = (tried + unsure + other < promised + allowed).all(dim=1) & finite
        assert info.accepted[passes].all()  # no promise, but a guard that refuses everything would keep them all
        decided += info.accepted.tolist()
        bound.add(before, was.fallback, state.fallback, allowed)
    if isinstance(problem, Bowls) and not case.boxed and not case.single:
        bound.check()
    return decided


def references(case: Case, problem: Problem, start: Tensor) -> list[Any]:
    """Return plain Python's DSSMG for each instance, where there is one: quadratics in double precision."""
    if case.single or not isinstance(problem, Bowls):
        return []
    silent = [[0.0] * problem.dimension] * problem.objectives
    given = None if case.searched else case.fallback().alpha_0
    return [
        reference.dssmg(plain(problem, p), row.tolist(), case.p, 1.0, lambda: silent, given)  # type: ignore[arg-type]
        for p, row in enumerate(start)
    ]


class Bound:
    """sum alpha_t |G_t|^2 <= V_0 - inf + 1/2 sum alpha_t^2 (L |G_t|^2 + |J G_t|^2 / C) + sum eps_t, G_t = J^T lambda_t.

    For the vertices and the middle of the simplex in place of the fixed lambda; all from the quadratics' closed form.
    """

    def __init__(self, problem: Problem, fallback: DSSMG) -> None:
        self.problem, self.fallback = problem, fallback
        self.descent = self.errors = torch.zeros(problem.instances, dtype=torch.float64)
        self.start: Tensor | None = None
        self.scale = torch.zeros(())

    def add(self, point: Tensor, before: DSSMGState, after: DSSMGState, eps: float) -> None:
        if not isinstance(self.problem, Bowls):
            return
        alpha = after.alpha_0 * self.fallback.decay(before)
        jacobian = self.problem.expected_jacobian(point).double()
        combined = torch.einsum("pm,pmn->pn", before.weights.double(), jacobian)
        square = combined.square().sum(dim=1)
        slopes = torch.einsum("pmn,pn->pm", jacobian, combined).square().sum(dim=1)
        smooth = self.problem.scale * self.problem.curvatures.double().amax(dim=(1, 2))
        self.scale = after.alpha_0 / after.gamma_0
        if self.start is None:
            self.start = losses_of(self.problem, point)[0]
        self.descent = self.descent + alpha * square
        self.errors = self.errors + 0.5 * alpha**2 * (smooth * square + slopes / self.scale) + eps

    def check(self) -> None:
        m = self.problem.objectives
        middle = torch.full((m,), 1 / m, dtype=torch.float64)
        assert self.start is not None
        for fixed in [*torch.eye(m, dtype=torch.float64), middle]:
            potential = self.start @ fixed + 0.5 * self.scale * (middle - fixed).square().sum()
            assert (self.descent <= (potential + self.errors) * (1 + 1e-9)).all()


def search(kind: str, examples: int, guard: type[GuardedRule] = GuardedRule, **changes: Any) -> list[bool]:
    """Examine so many cases, up to the first that fails; return what was decided in all of them.

    Hypothesis draws from the constants of whatever modules are loaded, so the cases depend on what ran before.
    """
    decided: list[bool] = []

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate,) if guard is not GuardedRule or changes else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=CASES[kind])
    def property_(case: Case) -> None:
        decided.extend(examine(case, guard, **changes))

    property_()
    return decided


LONG = (pytest.mark.long, pytest.mark.timeout(900))


@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        ("quadratics", 12),
        ("analytic", 8),
        pytest.param("quadratics", 600, marks=LONG),
        pytest.param("analytic", 400, marks=LONG),
    ],
)
def test_every_step_of_every_case_keeps_the_guarantee(kind: str, examples: int) -> None:
    decided = search(kind, examples)
    assert 0.03 < sum(decided) / len(decided) < 0.95


class ConstantEps(GuardedRule):
    """eps_t = eps_0: its sum is infinite."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        return super()._compare(oracle, candidate, safe, 0, debt)


class SlowEps(ConstantEps):
    """eps_t = eps_0 (t + 1)^-p: alpha_t / alpha_0, not squared."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        return GuardedRule._compare(self, oracle, candidate, safe, math.isqrt(step), debt)


class AgainstTheStart(GuardedRule):
    """Compares with z_t in place of x_D."""

    def step(self, oracle: Oracle, parameters: Tensor, state: Any) -> Any:
        self.start = parameters
        return super().step(oracle, parameters, state)

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        return super()._compare(oracle, candidate, self.start, step, debt)


class FirstObjectiveOnly(GuardedRule):
    """Looks at the first objective."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        verdict = super()._compare(oracle, candidate, safe, step, debt)
        return replace(verdict, passed=verdict.learned_losses[:, 0] <= verdict.fallback_losses[:, 0])


class AllOrNone(GuardedRule):
    """One instance's candidate lets in those of all."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        verdict = super()._compare(oracle, candidate, safe, step, debt)
        return replace(verdict, passed=verdict.passed.any().expand(len(verdict.passed)))


class NotANumberPasses(GuardedRule):
    """Refuses what is worse instead of accepting what is not."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        verdict = super()._compare(oracle, candidate, safe, step, debt)
        return replace(verdict, passed=verdict.passed | verdict.learned_losses.isnan().any(dim=1))


class RefusesAll(GuardedRule):
    """Is DSSMG."""

    def _compare(self, oracle: Oracle, candidate: Tensor, safe: Tensor, step: int, debt: Debt) -> Verdict:
        verdict = super()._compare(oracle, candidate, safe, step, debt)
        return replace(verdict, passed=torch.zeros_like(verdict.passed))


class LosesTheFallbacksState(GuardedRule):
    """lambda and alpha_0 move at rejected steps only."""

    def step(self, oracle: Oracle, parameters: Tensor, state: Any) -> Any:
        point, after, info = super().step(oracle, parameters, state)
        return point, replace(after, fallback=state.fallback) if info.accepted.all() else after, info


SMALL = Case(
    problem="", seed=0, instances=1, m=1, n=1, exponent=0.0, boxed=False, beyond=math.inf, single=False, eps=0.0,
    p=1.0, searched=False, stretches=(Stretch((Move("random", 0.0),), 1),), turn=0,
)  # fmt: skip
BROKEN = [
    (GuardedRule, {"criterion": "sum"}, {"m": 2}),
    (GuardedRule, {"every": 2}, {}),
    (GuardedRule, {"p": 0.51}, {"seed": 1, "boxed": True, "eps": 1e-3}),
    (ConstantEps, {}, {"seed": 1, "eps": 0.1}),
    (SlowEps, {}, {"seed": 1, "eps": 1e-3}),
    (AgainstTheStart, {}, {}),
    (FirstObjectiveOnly, {}, {"m": 2}),
    (AllOrNone, {}, {"instances": 2}),
    (NotANumberPasses, {}, {"beyond": math.nan, "stretches": (Stretch((Move("huge", 0.0),), 1),)}),
    (RefusesAll, {}, {}),
    (LosesTheFallbacksState, {}, {}),
]
"""A guard, its settings, and what makes of SMALL a case in which it fails."""


@pytest.mark.parametrize(("guard", "changes", "shown"), BROKEN)
def test_a_broken_guard_is_found(guard: type[GuardedRule], changes: dict[str, Any], shown: dict[str, Any]) -> None:
    case = replace(SMALL, **shown)
    examine(case)
    with pytest.raises(AssertionError):
        examine(case, guard, **changes)


@pytest.mark.long
@pytest.mark.parametrize(("guard", "changes"), [each[:2] for each in BROKEN])
def test_cases_that_are_made_up_find_it_too(guard: type[GuardedRule], changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        search("quadratics", 300, guard, **changes)
