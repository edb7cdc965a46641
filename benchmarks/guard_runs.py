"""The runs of `benchmarks/guard.py`: what each is named by, and what is measured of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.evaluation.measured_runs import Course, measured_run, walk
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.adversaries import ADVERSARIES, AdversaryRule
from ml2o_dist.rules.base import UpdateRule
from ml2o_dist.rules.coordinatewise.rule import ML2ORule
from ml2o_dist.rules.guarded import GuardedInfo, fallback_rule, guarded

UNTRAINED = RuleSettings(features="alignment", output="controlled", hidden=8, lr=0.005)
"""The network of the embedded default (`make train`)."""

Guard = tuple[tuple[str, Any], ...] | None
"""The settings of a guard that differ from the defaults; None: no guard."""


@dataclass(frozen=True)
class Unit:
    """One run; everything that its result depends on, but the image data.

    `guard`: the settings that differ from the defaults, or None for a run without a guard. `every`: steps between two
    measurements.  `batches`: how many the criticality averages.
    """

    part: str
    problem: str
    rule: str
    guard: Guard
    steps: int
    seeds: int
    every: int
    batches: int = 64

    @property
    def label(self) -> str:
        """The rule, what guards it, and the problem."""
        guard = "" if self.guard is None else " guarded " + ",".join(f"{key}={value}" for key, value in self.guard)
        return f"{self.rule}{guard} on {self.problem}"

    def setting(self, key: str) -> Any:
        """The value of a guard's setting."""
        return getattr(guard_settings(self.guard), key)


class Results(dict[Unit, dict[str, Any]]):
    """The results by unit."""

    def only(self, **wanted: Any) -> tuple[Unit, dict[str, Any]]:
        """The one unit with these attributes, and its result."""
        (found,) = [(u, r) for u, r in self.items() if all(getattr(u, key) == value for key, value in wanted.items())]
        return found


def guard_settings(guard: Guard) -> GuardSettings:
    """Return the settings of a unit's guard; without a budget unless it names one."""
    return GuardSettings(**{"budget": 0.0, **dict(guard or ())})


def build_rule(name: str, guard: Guard, dtype: torch.dtype) -> UpdateRule:
    """Return an adversary, the untrained network (`initial`) or a fallback by name, under the guard if there is one."""
    if name in ADVERSARIES:
        rule: UpdateRule = AdversaryRule(name)
    elif name == "initial":
        rule = ML2ORule.from_weights(UNTRAINED, None, dtype=dtype)
    else:
        rule = fallback_rule(GuardSettings(fallback=name))
    return guarded(rule, None if guard is None else guard_settings(guard))


def compute(unit: Unit, data_root: str) -> dict[str, Any]:
    """Run `unit`: figures per seed, at the end and over the steps, as plain lists."""
    dtype = torch.float64 if unit.problem.startswith("quadratic") else torch.float32
    course = Course.build(ProblemSpec.parse(unit.problem), tuple(range(unit.seeds)), dtype, data_root)
    if unit.part == "time":
        return step_times(course, unit)
    rule = build_rule(unit.rule, unit.guard, dtype)
    run = measured_run(
        rule,
        course,
        unit.steps,
        every=unit.every,
        batches=unit.batches,
        excess=unit.part == "drift" and bool(unit.guard),
    )
    return {
        "at": list(run.at),
        "losses": run.losses.sum(dim=2).tolist(),  # [k, P]
        "objectives": run.losses[-1].tolist(),  # [P, m]
        "criticality": run.absolute.tolist(),
        "relative": run.relative.tolist(),
        "acceptance": run.acceptance,
        "taken": float(run.accepted.double().mean()),
        "excess": run.excess.sum(dim=0).tolist(),
        "evaluations": [run.forwards, run.backwards],
        "ms_per_step": 1e3 * run.seconds / unit.steps,
        "guard_share": run.guard_seconds / run.seconds,
    }


def step_times(course: Course, unit: Unit) -> dict[str, Any]:
    """Return CPU ms of unguarded and guarded steps taken in turn; the first of each, with its search, is left out."""
    walks, times = [], []
    for guard in (None, unit.guard):
        rule = build_rule(unit.rule, guard, torch.float32)
        walks.append(walk(rule, course.oracle(), course.start, unit.steps + 1))
        times.append([])
    shares = []
    for number in range(unit.steps + 1):
        for which, steps in enumerate(walks):
            began, wall = time.process_time(), time.perf_counter()
            step = next(steps)
            spent, passed = time.process_time() - began, time.perf_counter() - wall
            if number:
                times[which].append(1e3 * spent)
                if isinstance(step.info, GuardedInfo):
                    shares.append(step.info.guard_seconds / passed)
    plain, safe = (statistics.median(each) for each in times)
    return {"unguarded_ms": plain, "guarded_ms": safe, "ratio": safe / plain, "guard_share": statistics.median(shares)}
