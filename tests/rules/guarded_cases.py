"""What the property test of the guarantee makes up: problems, rules that change their mind, settings of the guard."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.adversaries import ADVERSARIES
from ml2o_dist.rules.base import Oracle, StepInfo, UpdateRule
from ml2o_dist.rules.stochastic import DSSMG, DSSMGState
from tests.rules.bowls import Bowls

BOX = (-1.5, 2.0)
WALL = 100.0
"""Quadratics are what a case says beyond this distance in any coordinate: no finite number, as an overflow is."""
ANALYTIC = ("fonseca", "fonseca[n=5]", "zdt1[n=4]", "zdt2[n=4]", "zdt3[n=4]", "dtlz2[m=3]", "dtlz2[m=5]", "cagrad_toy")
MOVES = (*ADVERSARIES, "one", "further", "spend")
"""Beside the named adversaries: down one objective's gradient only; as the fallback, but 0.1 to 10 times as far; and
beyond the fallback's point as far as the guard allows."""


class Move(NamedTuple):
    """A move and the logarithm of its scale."""

    name: str
    exponent: float


class Stretch(NamedTuple):
    """For so many steps the sum of these moves is taken."""

    moves: tuple[Move, ...]
    length: int


@dataclass(frozen=True)
class Case:
    """What is drawn; `problem` is the name of an analytic one, "" stands for quadratics (`Bowls`)."""

    problem: str
    seed: int
    instances: int
    m: int
    n: int
    exponent: float
    boxed: bool
    beyond: float
    single: bool
    eps: float
    p: float
    searched: bool
    stretches: tuple[Stretch, ...]
    turn: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.single else torch.float64

    def build(self) -> tuple[Problem, Tensor]:
        """Return the problem and its start: quadratics with curvatures 1e-3 .. 1e3, any scale of the losses."""
        if self.problem:
            context = ProblemContext(self.instances, self.seed, dtype=self.dtype)
            made = ProblemSpec.parse(self.problem).build(context)
            return made, made.initial_parameters([self.seed + i for i in range(self.instances)])
        stream = torch.Generator().manual_seed(self.seed)
        shape = (self.instances, self.m, self.n)
        bowls = Bowls(range(self.instances), self.m, self.n, scale=10.0**self.exponent, dtype=self.dtype)
        bowls.curvatures = (10.0 ** (6 * torch.rand(shape, generator=stream, dtype=torch.float64) - 3)).to(self.dtype)
        bowls.centres = torch.randn(shape, generator=stream, dtype=torch.float64).to(self.dtype)
        bowls.sample_batch = lambda _: None  # type: ignore[method-assign]
        bowls.sample_losses = lambda z, _: torch.where(  # type: ignore[method-assign]
            (z.abs() <= WALL).all(dim=1)[:, None, None],
            bowls.scale * (0.5 * bowls.curvatures * (z[:, None] - bowls.centres) ** 2).sum(dim=2)[:, None],
            self.beyond,
        )
        start = 3 * torch.randn(shape[0], self.n, generator=stream, dtype=torch.float64)
        if self.boxed:
            bowls.bounds = tuple(torch.full((self.n,), end, dtype=self.dtype) for end in BOX)  # type: ignore[assignment]
            start = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(shape[0], self.n, generator=stream, dtype=torch.float64)
        return bowls, start.to(self.dtype)

    def fallback(self) -> DSSMG:
        """Return DSSMG: alpha_0 is searched, or given and about 1 / L on the quadratics."""
        return DSSMG(self.p, alpha_0=None if self.searched else 10.0 ** (-3 - self.exponent))


class Seen(NamedTuple):
    """What the named adversaries go by."""

    gradient: Tensor
    step: int

    def noise(self) -> Tensor:
        return torch.randn(self.gradient.shape, generator=torch.Generator().manual_seed(self.step)).to(self.gradient)


class Hostile(UpdateRule):
    """The moves of a case, stretch after stretch and again from the first; it knows what the fallback will do."""

    def __init__(self, case: Case) -> None:
        self.case, self.fallback = case, case.fallback()
        self.order = [stretch for stretch in case.stretches for _ in range(stretch.length)]

    def initial_state(self, instances: int, objectives: int, layout: ParameterLayout) -> tuple[int, DSSMGState]:
        return 0, self.fallback.initial_state(instances, objectives, layout)

    def propose(self, oracle: Oracle, parameters: Tensor, state: Any, seen: StepInfo) -> tuple[Tensor, Any]:
        step, its = state
        apart = Oracle(oracle.problem, torch.Generator())
        safe, following = self.fallback.propose(apart, parameters, its, seen)
        point = parameters
        for move in self.order[step % len(self.order)].moves:
            point = point + self.update(move, oracle.problem, parameters, step, seen, safe, following)
        return oracle.problem.project(point), (step + 1, following)

    def update(
        self, move: Move, problem: Problem, z: Tensor, step: int, seen: StepInfo, safe: Tensor, its: DSSMGState
    ) -> Tensor:
        one = seen.jacobian[:, (self.case.seed + step) % problem.objectives]
        if move.name == "one":
            return -(10.0 ** (move.exponent / 4)) * its.alpha_0[:, None].to(one) * one
        if move.name == "further":
            return 10.0 ** (move.exponent / 8) * (safe - z)
        if move.name == "spend":
            return safe - z + self.spending(problem, safe, one, self.case.eps * (1 + move.exponent / 16))
        return 10.0**move.exponent * ADVERSARIES[move.name].update(
            Seen(seen.jacobian.mean(dim=1), step + self.case.turn)
        )

    def spending(self, problem: Problem, safe: Tensor, gradient: Tensor, budget: float) -> Tensor:
        """Return the longest move up `gradient` [P, n] that costs no objective more than `budget`, bisected."""
        direction = torch.nan_to_num(gradient / gradient.norm(dim=1, keepdim=True))
        low, high = torch.zeros(len(safe), 1, dtype=safe.dtype), torch.full((len(safe), 1), 4.0, dtype=safe.dtype)
        promised = problem.losses(safe, None)
        for _ in range(20):
            middle = (low * high).sqrt().clamp(min=1e-9)
            worse = problem.losses(problem.project(safe + middle * direction), None) - promised
            allowed = (worse.amax(dim=1) <= budget)[:, None]
            low, high = torch.where(allowed, middle, low), torch.where(allowed, high, middle)
        return low * direction


EXPONENTS = st.one_of(st.floats(-8, 8), st.floats(-1.5, 1.5))
STRETCHES = st.builds(
    Stretch,
    st.lists(st.builds(Move, st.sampled_from(MOVES), EXPONENTS), min_size=1, max_size=2).map(tuple),
    st.integers(1, 12),
)
QUADRATICS = st.builds(
    Case,
    problem=st.just(""),
    seed=st.integers(0, 2**20),
    instances=st.integers(1, 3),
    m=st.sampled_from((1, 2, 3, 5)),
    n=st.integers(1, 6),
    exponent=st.floats(-3, 3),
    boxed=st.booleans(),
    beyond=st.sampled_from((math.inf, math.nan, -math.inf)),
    single=st.booleans(),
    eps=st.sampled_from((0.0, 1e-3, 0.1)),
    p=st.floats(0.501, 1.0),
    searched=st.booleans(),
    stretches=st.lists(STRETCHES, min_size=1, max_size=4).map(tuple),
    turn=st.sampled_from((0, 90)),
)
CASES = {"quadratics": QUADRATICS, "analytic": st.builds(replace, QUADRATICS, problem=st.sampled_from(ANALYTIC))}
