"""One cell of a benchmark: one optimizer on one problem for some paired seeds; and how many of them are run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ml2o_dist.config import RuleSettings
from ml2o_dist.errors import UserError
from ml2o_dist.problems import ProblemContext, ProblemSpec
from ml2o_dist.rules.aggregated import AggregatedRule, parse_optimizer_name
from ml2o_dist.rules.base import Oracle, UpdateRule
from ml2o_dist.rules.gml2o import guarded
from ml2o_dist.rules.ml2o import ML2ORule
from ml2o_dist.seeding import derive_seed, generator

DIVERGED = 1e6
"""A summed loss so many times the one at the start counts as diverged, though it may still be finite."""

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all) after every cell, and now and then in between."""

POLL_S = 0.5
"""How long to wait for a cell before `on_done` is called again."""


class Contestant(Protocol):
    """What can be run in a cell: it has a label, can be pickled, and builds its rule where it is run."""

    @property
    def label(self) -> str:
        """Its name in the results."""

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule for problems of this device and precision."""


@dataclass(frozen=True)
class HandDesigned:
    """A torchjd aggregator with a classical optimizer at one learning rate."""

    aggregator: str
    optimizer: str
    lr: float

    @classmethod
    def parse(cls, text: str, lr: float | None = None) -> HandDesigned:
        """Read `AGGREGATOR[+OPTIMIZER][@LR]`; `lr` serves where the text names none.

        Raises:
            UserError: an unknown name, or a learning rate that is missing or no positive number.
        """
        aggregator, optimizer, written = parse_optimizer_name(text)
        rate = lr if written is None else written
        if rate is None:
            raise UserError(f"optimizer {text!r} needs a learning rate: write {text}@0.01")
        return cls(aggregator, optimizer, rate)

    @property
    def label(self) -> str:
        """`AGGREGATOR+OPTIMIZER@LR`."""
        return f"{self.aggregator}+{self.optimizer}@{self.lr:g}"

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule; it follows the device and precision of the Jacobians it meets."""
        return AggregatedRule(self.aggregator, self.optimizer, self.lr)


@dataclass(frozen=True, eq=False)
class Learned:
    """An ML2O network: its settings and weights (None: as it is before training). Equal only to itself."""

    label: str
    settings: RuleSettings
    weights: Mapping[str, Tensor] | None

    def rule(self, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """Build the rule from the weights."""
        return guarded(ML2ORule.from_weights(self.settings, self.weights, device, dtype), self.settings.guard)


@dataclass(frozen=True)
class Cell:
    """One optimizer on one problem, P = len(seeds) instances advanced together for `steps` steps.

    Cells of one problem, `stream` and `seeds` are paired: the same problem, starting points and batch order for
    every optimizer. `data_root` is as in `ProblemContext`.
    """

    contestant: Contestant
    problem: ProblemSpec
    seeds: tuple[int, ...]
    stream: str
    steps: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    data_root: str = ""


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

    @property
    def final_sum(self) -> Tensor:
        """The final losses summed over the objectives, [P]; inf where that is no finite number."""
        total = self.final.sum(dim=1)
        return total.where(total.isfinite(), torch.inf)


def run_cell(cell: Cell) -> CellResult:
    """Run one cell: a pure function of it, but for the time that a step takes.

    Raises:
        UserError: a problem or rule that cannot be built, or that do not fit together.
    """
    device = torch.device(cell.device)
    names: tuple[str | int, ...] = (cell.stream, str(cell.problem), *cell.seeds)
    context = ProblemContext(len(cell.seeds), derive_seed("problem", *names), device, cell.dtype, cell.data_root)
    problem = cell.problem.build(context)
    oracle = Oracle(problem, generator("batches", *names))
    rule = cell.contestant.rule(device, cell.dtype)
    parameters = problem.initial_parameters(cell.seeds)
    state = rule.initial_state(problem.instances, problem.objectives, problem.dimension)

    seen, times = [], []
    for _ in range(cell.steps):
        start = time.perf_counter()
        parameters, state, info = rule.step(oracle, parameters, state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        seen.append(info.losses)
    losses = torch.stack(seen).double().cpu()
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


def run_cells_on_ray(
    cells: Sequence[Cell], *, num_cpus: float = 1.0, num_gpus: float = 0.0, on_done: Progress | None = None
) -> list[CellResult]:
    """Run each cell as a Ray task with one torch thread; results are in the order of `cells`.

    Ray must be initialised. A task whose worker died is run once more; a task that raises is not, for it would again.
    `on_done` is called at least every half second; whatever it raises ends the work and cancels what is left.

    Raises:
        UserError: no node of the cluster is large enough for one task; or what a cell raised.
    """
    import ray

    _check_room(ray.nodes(), num_cpus, num_gpus)
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_run_on_one_thread)
    refs = [task.options(name=f"cell {cell.contestant.label} {cell.problem}").remote(cell) for cell in cells]
    waiting = list(refs)
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=POLL_S)
            ray.get(ready)
            if on_done is not None:
                on_done(len(refs) - len(waiting), len(refs))
        results: list[CellResult] = ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for ref in waiting:
            ray.cancel(ref)
    return results


def _run_on_one_thread(cell: Cell) -> CellResult:
    torch.set_num_threads(1)
    return run_cell(cell)


def _check_room(nodes: Sequence[Mapping[str, object]], num_cpus: float, num_gpus: float) -> None:
    """Raise UserError unless some living node is large enough for one task: Ray would wait for ever."""
    largest = [0.0, 0.0]
    for node in nodes:
        held = node["Resources"]
        if not node["Alive"] or not isinstance(held, Mapping):
            continue
        cpus, gpus = float(held.get("CPU", 0)), float(held.get("GPU", 0))
        if cpus >= num_cpus and gpus >= num_gpus:
            return
        largest = max(largest, [cpus, gpus])
    raise UserError(
        f"no node of the Ray cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs for a comparison task "
        f"(the largest has {largest[0]:g} and {largest[1]:g})"
    )


def _diverged(losses: Tensor) -> Tensor:
    """[steps, P, m] -> [P]. A start at loss 0 has room up to DIVERGED * eps, about 0.1."""
    start = losses[0].abs().sum(dim=1).clamp(min=torch.finfo(torch.float32).eps)
    large = losses.sum(dim=2).abs() > DIVERGED * start
    return (large | ~losses.isfinite().all(dim=2)).any(dim=0)
