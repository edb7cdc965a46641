"""One run of one rule with measurements from outside: true losses, criticality, and the guard's decisions.

Shapes: P instances, m objectives, n parameters, T steps, k measurements.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.evaluation.criticality import BATCHES, criticality
from ml2o_dist.problems import Problem, ProblemContext, ProblemSpec, Rescaled
from ml2o_dist.rules.base import Oracle, State, StepInfo, UpdateRule
from ml2o_dist.rules.guarded import GuardedInfo, GuardedRule
from ml2o_dist.runtime.seeding import derive_seed, generator


@dataclass(frozen=True, eq=False)
class Step:
    """Step number t of a run: the point [P, n] and state before it, its info, and the point after it."""

    number: int
    point: Tensor
    state: State
    info: StepInfo
    following: Tensor


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """The record of a run of T steps.

    Attributes:
        at: the k numbers of steps after which the run was measured, including 0 and T.
        losses: [k, P, m] float64 at those points, on a large fixed batch (noise-free if the judge is).
        absolute, relative: [k, P], criticality on the same batch; NaN where the gradients are not finite.
        accepted: [T, P] bool, where the guard took the learned candidate; all True without a guard.
        checked: [T] bool, where the guard compared candidates; all False without a guard.
        excess: [T, P] float64, see `true_excess`; 0 without a guard, and if it was not asked for.
        forwards, backwards: evaluations charged to each instance.
        seconds, guard_seconds: wall time of the steps, and the guard's part of it.
    """

    at: tuple[int, ...]
    losses: Tensor
    absolute: Tensor
    relative: Tensor
    accepted: Tensor
    checked: Tensor
    excess: Tensor
    forwards: int
    backwards: int
    seconds: float
    guard_seconds: float

    @property
    def acceptance(self) -> float:
        """The accepted share of the compared candidates, over steps and instances; NaN if none was compared."""
        return float(self.accepted[self.checked].double().mean())


@dataclass(frozen=True, eq=False)
class Course:
    """A problem with its judge, its starting points [P, n] and its batches: the same for every rule that runs on it.

    The judge is the noise-free version of the problem if there is one (`quadratic`), else the problem itself.
    """

    problem: Problem
    judge: Problem
    start: Tensor
    stream: int

    @classmethod
    def build(
        cls,
        spec: ProblemSpec,
        seeds: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        data_root: str = "",
        loss_scale: float = 1.0,
    ) -> Course:
        """Build P = len(seeds) instances, a pure function of the arguments; raises UserError as `ProblemSpec.build`.

        Losses are in units of 1 / `loss_scale`, see `Rescaled`.
        """
        names: tuple[str | int, ...] = (str(spec), *seeds)
        context = ProblemContext(len(seeds), derive_seed("problem", *names), dtype=dtype, data_root=data_root)
        problem = judge = spec.build(context)
        if spec.name == "quadratic":
            exact = tuple((key, value) for key, value in spec.settings if key != "noise")
            judge = replace(spec, settings=exact).build(context)
        if loss_scale != 1.0:
            problem, judge = (Rescaled(each, loss_scale=loss_scale) for each in (problem, judge))
        return cls(problem, judge, problem.initial_parameters(seeds), derive_seed("batches", *names))

    def oracle(self) -> Oracle:
        """Return an oracle at the beginning of the course's batches."""
        return Oracle(self.problem, generator("course", self.stream))


def walk(rule: UpdateRule, oracle: Oracle, start: Tensor, steps: int) -> Iterator[Step]:
    """Yield `steps` steps of `rule` from `start` [P, n]."""
    problem, point = oracle.problem, start
    state = rule.initial_state(problem.instances, problem.objectives, problem.layout)
    for number in range(steps):
        following, after, info = rule.step(oracle, point, state)
        yield Step(number, point, state, info, following)
        point, state = following, after


def measured_run(
    rule: UpdateRule, course: Course, steps: int, *, every: int, batches: int = BATCHES, excess: bool = False
) -> MeasuredRun:
    """Run `rule` on `course`, measuring at both ends and after each `every` steps; `batches` as in `criticality`.

    With `excess` each accepted step of a guarded rule is compared with the fallback's step by `true_excess`.

    Raises:
        UserError: the rule and the problem do not fit together.
    """
    oracle, point = course.oracle(), course.start
    at, marks = [0], [criticality(course.judge, point, batches=batches)]
    accepted, checked, beyond = [], [], []
    seconds = guard_seconds = 0.0
    began = time.perf_counter()
    for step in walk(rule, oracle, course.start, steps):
        seconds += time.perf_counter() - began
        point, info = step.following, step.info
        passed, compared = torch.ones(len(point), dtype=torch.bool), False
        worse = torch.zeros(len(point), dtype=torch.float64)
        if isinstance(info, GuardedInfo):
            passed, compared = info.accepted.cpu(), info.checked
            guard_seconds += info.guard_seconds
            if excess and isinstance(rule, GuardedRule) and bool(passed.any()):
                worse = true_excess(course, rule, step).cpu()
        accepted.append(passed)
        checked.append(compared)
        beyond.append(worse)
        if (step.number + 1) % every == 0 or step.number + 1 == steps:
            at.append(step.number + 1)
            marks.append(criticality(course.judge, point, batches=batches))
        began = time.perf_counter()
    return MeasuredRun(
        at=tuple(at),
        losses=torch.stack([mark.losses for mark in marks]).cpu(),
        absolute=torch.stack([mark.absolute for mark in marks]).cpu(),
        relative=torch.stack([mark.relative for mark in marks]).cpu(),
        accepted=torch.stack(accepted),
        checked=torch.tensor(checked),
        excess=torch.stack(beyond),
        forwards=oracle.forwards,
        backwards=oracle.backwards,
        seconds=seconds,
        guard_seconds=guard_seconds,
    )


def true_excess(course: Course, rule: GuardedRule, step: Step) -> Tensor:
    """Return [P]: how far the step left the worst-hit objective above its loss at the fallback's candidate, at least 0.

    max_i (f_i(z_{t+1}) - f_i(x_D)) by the judge's losses, which must be exact (a noise-free judge). The fallback's
    candidate x_D is recomputed from the step's info: it depends on no other batch.
    """
    scratch = Oracle(course.problem, generator("scratch"))
    safe, _ = rule.fallback.propose(scratch, step.point, step.state.fallback, step.info)
    with torch.no_grad():
        reached, promised = (course.judge.losses(point, None).double() for point in (step.following, safe))
    return (reached - promised).amax(dim=1).clamp(min=0.0)
