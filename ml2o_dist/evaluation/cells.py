"""One cell of a benchmark: one optimizer on one problem from one or more seeds. `cell_tasks` runs many on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ml2o_dist.evaluation.criticality import Criticality, criticality
from ml2o_dist.evaluation.metrics import gradient_conflict
from ml2o_dist.evaluation.optimizer_specs import OptimizerSpec
from ml2o_dist.plugins import Carrying
from ml2o_dist.problems import Batch, Problem, ProblemContext, ProblemSpec
from ml2o_dist.rules.base import Oracle
from ml2o_dist.rules.guarded import GuardedInfo
from ml2o_dist.runtime.seeding import derive_seed, generator

DIVERGED = 1e6
"""A run diverged if its summed loss exceeds this multiple of the first one, even if it is finite."""

CONFLICT_EVERY = 10
"""Steps between two measurements of the gradients' conflict. One costs as much as a step of a small network."""

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all) after every cell, and sometimes in between."""


@dataclass(frozen=True)
class Cell(Carrying):
    """One optimizer on one problem, P = len(seeds) instances advanced together for `steps` steps.

    Cells of one problem, `stream` and `seeds` are paired: the same problem, starting points and batch order for
    every optimizer. `data_root` is as in `ProblemContext`.

    Attributes:
        problem_seed: seed of the problem's coefficients; None: it is derived from `stream`, problem and `seeds`.
        criticality_batches: batches averaged to measure the end point; 0: the end point is not measured.
    """

    optimizer: OptimizerSpec
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
    """What a guard did.

    Attributes:
        accepted: [steps, P] bool, where the guard took the learned candidate.
        share: the part of the steps' time that the fallback and the comparison took.
    """

    accepted: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements beside the optimization; their evaluations are not charged to the optimizer.

    Attributes:
        end: criticality and losses of the end points z_steps on a large fixed batch, in float64.
        conflicting, mean_cosine: [P], as in `metrics.Conflict`, of the steps' own gradients: means over every
            `CONFLICT_EVERY`th step. NaN for m = 1, and where a gradient was not finite.
    """

    end: Criticality
    conflicting: Tensor
    mean_cosine: Tensor


@dataclass(frozen=True, eq=False)
class CellResult:
    """What a cell did. Tensors lie on the CPU.

    Attributes:
        losses: [steps, P, m] float64, on each step's own batch, at z_0 .. z_{steps-1}.
        test_metrics: the problem's metrics at z_steps on unseen data, each [P, m]; {} if it has none.
        diverged: [P] bool: a loss or parameter that is not finite, or a summed loss above `DIVERGED` times the first.
        forwards, backwards: evaluations charged to each instance.
        evaluations: [steps] int64, forwards and backwards charged up to the end of each step.
        seconds: [steps] float64, wall time of each step of all P instances.
        guard: None if the rule has no guard.  measured: None if no measurement was asked for.
    """

    losses: Tensor
    test_metrics: dict[str, Tensor]
    diverged: Tensor
    forwards: int
    backwards: int
    evaluations: Tensor
    seconds: Tensor
    guard: GuardRecord | None = None
    measured: Measured | None = None

    @property
    def final(self) -> Tensor:
        """The mean of `losses` over the last tenth of the steps, [P, m]."""
        return self.final_after(len(self.losses))

    def final_after(self, steps: int) -> Tensor:
        """Return the mean of `losses` over the last tenth of the first `steps` steps, [P, m]."""
        return self.losses[steps - last_tenth(steps) : steps].mean(dim=0)

    @property
    def final_sum(self) -> Tensor:
        """The final losses summed over the objectives, [P]; inf where the sum is not finite."""
        return finite_sum(self.final)

    @property
    def ms_per_step(self) -> float:
        """Median wall time of a step of all P instances."""
        return float(self.seconds.median()) * 1e3


def finite_sum(losses: Tensor) -> Tensor:
    """Sum losses [..., m] over the objectives; inf where the sum is not finite."""
    total = losses.sum(dim=-1)
    return total.where(total.isfinite(), torch.inf)


@dataclass(frozen=True, eq=False)
class CellFailure:
    """A cell that could not be run; `error` is the exception of its last run."""

    error: Exception

    @property
    def reason(self) -> str:
        """The error in one line; for a Ray task's error its cause."""
        cause = getattr(self.error, "cause", None) or self.error
        text = " ".join(str(cause).split())
        return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


Outcome = CellResult | CellFailure


class PairedOracle(Oracle):
    """An oracle whose j-th batch of step k is the same for every rule, however many batches a step draws.

    A guarded run therefore sees the same batches as its fallback alone, and all methods see the same first batches.
    """

    def __init__(self, problem: Problem, *names: str | int) -> None:
        """`names` seed the batches; call `begin_step` before each step."""
        super().__init__(problem, generator("batches", *names))
        self._names = names
        self._streams = [self._generator]
        self._drawn = 0

    def begin_step(self) -> None:
        """Begin a step: the next `draw` gives its first batch."""
        self._drawn = 0

    def draw(self) -> Batch:
        """Draw the step's next batch: the j-th one comes from stream j."""
        if self._drawn == len(self._streams):
            self._streams.append(generator("batches", *self._names, "in one step", self._drawn))
        self._generator = self._streams[self._drawn]
        self._drawn += 1
        return super().draw()


def run_cell(cell: Cell) -> CellResult:
    """Run one cell. The result depends on the cell alone, except for the measured times.

    Raises:
        UserError: a problem or rule that cannot be built, or that do not fit together.
    """
    device = torch.device(cell.device)
    names: tuple[str | int, ...] = (cell.stream, str(cell.problem), *cell.seeds)
    problem_seed = derive_seed("problem", *names) if cell.problem_seed is None else cell.problem_seed
    context = ProblemContext(len(cell.seeds), problem_seed, device, cell.dtype, cell.data_root)
    problem = cell.problem.build(context)
    oracle = PairedOracle(problem, *names)
    rule = cell.optimizer.rule(device, cell.dtype)
    parameters = problem.initial_parameters(cell.seeds)
    state = rule.initial_state(problem.instances, problem.objectives, problem.layout)

    seen, times, spent, accepted, conflicts = [], [], [], [], []
    guard_seconds = 0.0
    for step in range(cell.steps):
        oracle.begin_step()
        start = time.perf_counter()
        before = parameters
        parameters, state, info = rule.step(oracle, before, state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        spent.append(oracle.forwards + oracle.backwards)
        seen.append(info.losses)
        if isinstance(info, GuardedInfo):
            accepted.append(info.accepted)
            guard_seconds += info.guard_seconds
        if cell.criticality_batches and step % CONFLICT_EVERY == 0:
            jacobian = info.jacobian
            if jacobian.shape[1] < problem.objectives:  # the rule differentiated the sum only
                jacobian, _ = problem.jacobian(before, info.batch)
            conflict = gradient_conflict(jacobian)
            conflicts.append(torch.stack([conflict.conflicting, conflict.mean_cosine]))
    losses = torch.stack(seen).double().cpu()
    guard = measured = None
    if accepted:
        guard = GuardRecord(torch.stack(accepted).cpu(), guard_seconds / sum(times))
    if cell.criticality_batches:
        conflicting, mean_cosine = torch.stack(conflicts).mean(dim=0).cpu()
        measured = Measured(_end(cell, context, parameters), conflicting, mean_cosine)
    return CellResult(
        losses=losses,
        test_metrics={name: value.double().cpu() for name, value in problem.test_metrics(parameters).items()},
        diverged=_diverged(losses) | ~parameters.isfinite().all(dim=1).cpu(),
        forwards=oracle.forwards,
        backwards=oracle.backwards,
        evaluations=torch.tensor(spent),
        seconds=torch.tensor(times, dtype=torch.float64),
        guard=guard,
        measured=measured,
    )


def last_tenth(steps: int) -> int:
    """Return the number of steps in the last tenth of a run, at least one."""
    return max(1, steps // 10)


def _end(cell: Cell, context: ProblemContext, parameters: Tensor) -> Criticality:
    """Measure the end points [P, n] on the problem rebuilt in float64: the optimizer's own problem is rounded."""
    problem = cell.problem.build(replace(context, dtype=torch.float64))
    measured = criticality(problem, parameters.double(), batches=cell.criticality_batches)
    fields = (measured.absolute, measured.relative, measured.gap, measured.weights, measured.losses)
    return Criticality(*(field.cpu() for field in fields))


def _diverged(losses: Tensor) -> Tensor:
    """[steps, P, m] -> [P]. A start at loss 0 has room up to DIVERGED * eps, about 0.1."""
    start = losses[0].abs().sum(dim=1).clamp(min=torch.finfo(torch.float32).eps)
    large = losses.sum(dim=2).abs() > DIVERGED * start
    return (large | ~losses.isfinite().all(dim=2)).any(dim=0)
