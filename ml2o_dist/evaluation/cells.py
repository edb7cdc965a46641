"""One cell of a benchmark: one optimizer on one problem for some paired seeds; `cell_tasks` runs many on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.evaluation.contestants import Contestant
from ml2o_dist.evaluation.criticality import Criticality, criticality
from ml2o_dist.evaluation.metrics import gradient_conflict
from ml2o_dist.problems import Batch, Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.gml2o import GuardedInfo
from ml2o_dist.seeding import derive_seed, generator

DIVERGED = 1e6
"""A summed loss so many times the one at the start counts as diverged, though it may still be finite."""

CONFLICT_EVERY = 10
"""Steps between two looks at the conflict between the gradients: it costs as much as a step of a small network."""

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all) after every cell, and now and then in between."""


@dataclass(frozen=True)
class Cell:
    """One optimizer on one problem, P = len(seeds) instances advanced together for `steps` steps.

    Cells of one problem, `stream` and `seeds` are paired: the same problem, starting points and batch order for
    every optimizer. `data_root` is as in `ProblemContext`.

    Attributes:
        problem_seed: what the problem's coefficients are drawn from; None: named by `stream`, problem and `seeds`.
        criticality_batches: batches that are averaged to measure the end point; 0: it is not measured.
    """

    contestant: Contestant
    problem: ProblemSpec
    seeds: tuple[int, ...]
    stream: str
    steps: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    data_root: str = ""
    problem_seed: int | None = None
    criticality_batches: int = 0


@dataclass(frozen=True, eq=False)
class GuardRecord:
    """What a guard did: the share of steps in which each instance took the learned candidate, [P]; the share of the
    steps' time that went into the fallback and the comparison."""

    acceptance: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured beside the optimization, and is charged to no one.

    Attributes:
        end: how critical the end points z_steps are, and their losses, on a large fixed batch; all in float64.
        conflicting, mean_cosine: [P], of the gradients that the steps saw, as in `metrics.Conflict`: means over every
            `CONFLICT_EVERY`th step. NaN for m = 1, and where a gradient was not finite.
    """

    end: Criticality
    conflicting: Tensor
    mean_cosine: Tensor


@dataclass(frozen=True, eq=False)
class CellResult:
    """What a cell did. Tensors lie on the CPU.

    Attributes:
        optimizer: the contestant's label.  problem: as written.
        losses: [steps, P, m] float64, on each step's own batch, at z_0 .. z_{steps-1}.
        final: [P, m], the mean of `losses` over the last tenth of the steps.
        test_metrics: what the problem measures at z_steps on unseen data, each [P, m]; {} where it has none.
        diverged: [P] bool: a loss or parameter that is not finite, or a summed loss above `DIVERGED` times the first.
        forwards, backwards: evaluations charged to each instance.
        ms_per_step: median wall time of a step of all P instances.
        guard: None where the rule has none.  measured: None where nothing was to be measured.
    """

    optimizer: str
    problem: str
    losses: Tensor
    final: Tensor
    test_metrics: dict[str, Tensor]
    diverged: Tensor
    forwards: int
    backwards: int
    ms_per_step: float
    guard: GuardRecord | None = None
    measured: Measured | None = None

    @property
    def final_sum(self) -> Tensor:
        """The final losses summed over the objectives, [P]; inf where that is no finite number."""
        total = self.final.sum(dim=1)
        return total.where(total.isfinite(), torch.inf)


@dataclass(frozen=True, eq=False)
class CellFailure:
    """A cell that could not be run; `error` is what it raised the last time."""

    error: Exception

    @property
    def reason(self) -> str:
        """In one line; of a task's error its cause."""
        cause = getattr(self.error, "cause", None) or self.error
        text = " ".join(str(cause).split())
        return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


Outcome = CellResult | CellFailure


class PairedOracle(Oracle):
    """An oracle whose j-th batch of step k is the same for every rule, however many batches a step of theirs draws.

    So a guarded run sees the batches that the fallback alone would see, and all methods the same first ones.
    """

    def __init__(self, problem: Problem, *names: str | int) -> None:
        """`names` name the batches; `begin_step` goes before each step."""
        super().__init__(problem, generator("batches", *names))
        self._names = names
        self._streams = [self._generator]
        self._drawn = 0

    def begin_step(self) -> None:
        """Say that a step begins."""
        self._drawn = 0

    def draw(self) -> Batch:
        """Draw the step's next batch from the stream of its place in the step."""
        if self._drawn == len(self._streams):
            self._streams.append(generator("batches", *self._names, "in one step", self._drawn))
        self._generator = self._streams[self._drawn]
        self._drawn += 1
        return super().draw()


def run_cell(cell: Cell) -> CellResult:
    """Run one cell: a pure function of it, but for the time that a step takes.

    Raises:
        UserError: a problem or rule that cannot be built, or that do not fit together.
    """
    device = torch.device(cell.device)
    names: tuple[str | int, ...] = (cell.stream, str(cell.problem), *cell.seeds)
    problem_seed = derive_seed("problem", *names) if cell.problem_seed is None else cell.problem_seed
    context = ProblemContext(len(cell.seeds), problem_seed, device, cell.dtype, cell.data_root)
    problem = cell.problem.build(context)
    oracle = PairedOracle(problem, *names)
    rule = cell.contestant.rule(device, cell.dtype)
    parameters = problem.initial_parameters(cell.seeds)
    state = rule.initial_state(problem.instances, problem.objectives, problem.dimension)

    seen, times, accepted, conflicts = [], [], [], []
    guard_seconds = 0.0
    for step in range(cell.steps):
        oracle.begin_step()
        start = time.perf_counter()
        parameters, state, info = rule.step(oracle, parameters, state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        seen.append(info.losses)
        if isinstance(info, GuardedInfo):
            accepted.append(info.accepted)
            guard_seconds += info.guard_seconds
        if cell.criticality_batches and step % CONFLICT_EVERY == 0:
            conflict = gradient_conflict(info.jacobian)
            conflicts.append(torch.stack([conflict.conflicting, conflict.mean_cosine]))
    losses = torch.stack(seen).double().cpu()
    guard = measured = None
    if accepted:
        guard = GuardRecord(torch.stack(accepted).double().mean(dim=0).cpu(), guard_seconds / sum(times))
    if cell.criticality_batches:
        conflicting, mean_cosine = torch.stack(conflicts).mean(dim=0).cpu()
        measured = Measured(_end(cell, context, parameters), conflicting, mean_cosine)
    return CellResult(
        optimizer=cell.contestant.label,
        problem=str(cell.problem),
        losses=losses,
        final=losses[-last_tenth(cell.steps) :].mean(dim=0),
        test_metrics={name: value.double().cpu() for name, value in problem.test_metrics(parameters).items()},
        diverged=_diverged(losses) | ~parameters.isfinite().all(dim=1).cpu(),
        forwards=oracle.forwards,
        backwards=oracle.backwards,
        ms_per_step=float(torch.tensor(times, dtype=torch.float64).median()) * 1e3,
        guard=guard,
        measured=measured,
    )


def last_tenth(steps: int) -> int:
    """Return how many steps the last tenth of a run has, at least one."""
    return max(1, steps // 10)


def run_cells_in_process(cells: Sequence[Cell], on_done: Progress | None = None) -> list[CellResult]:
    """Run `cells` one after the other in this process."""
    results = []
    for cell in cells:
        results.append(run_cell(cell))
        if on_done is not None:
            on_done(len(results), len(cells))
    return results


def _end(cell: Cell, context: ProblemContext, parameters: Tensor) -> Criticality:
    """Measure the end points [P, n] in float64 on the problem built anew in it: the optimizer's own is rounded."""
    problem = cell.problem.build(replace(context, dtype=torch.float64))
    measured = criticality(problem, parameters.double(), batches=cell.criticality_batches)
    fields = (measured.absolute, measured.relative, measured.gap, measured.weights, measured.losses)
    return Criticality(*(field.cpu() for field in fields))


def _diverged(losses: Tensor) -> Tensor:
    """[steps, P, m] -> [P]. A start at loss 0 has room up to DIVERGED * eps, about 0.1."""
    start = losses[0].abs().sum(dim=1).clamp(min=torch.finfo(torch.float32).eps)
    large = losses.sum(dim=2).abs() > DIVERGED * start
    return (large | ~losses.isfinite().all(dim=2)).any(dim=0)
