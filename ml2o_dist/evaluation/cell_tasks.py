"""Cells as Ray tasks, one torch thread each. A task that dies or raises is retried once, then its cell has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from ml2o_dist.evaluation.cells import Cell, CellFailure, CellResult, Outcome, Progress, run_cell
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.ray_tasks import run_tasks

RUNS_PER_CELL = 2
"""Maximum number of runs of a cell. A failed cell is retried once, because the machine may be to blame."""

log = logging.getLogger(__name__)


def run_outcomes_on_ray(
    cells: Sequence[Cell],
    on_outcome: Callable[[int, Outcome], None],
    *,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    on_done: Progress | None = None,
) -> None:
    """Run each cell as a Ray task; `on_outcome` gets (index of the cell, its outcome) as soon as it is known.

    Ray must be initialised. A cell that raised or whose worker died is retried once, then it has failed. `on_done`
    is called at least every half second. An exception in `on_done` or `on_outcome` cancels the remaining tasks.

    Raises:
        UserError: no node of the cluster is large enough for one task.
        RayEnded: the Ray that this process has started died.
    """
    import ray

    _check_room(ray.nodes(), num_cpus, num_gpus)
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0)(_run_on_one_thread)

    def submit(index: int) -> object:
        cell = cells[index]
        return task.options(name=f"cell {cell.optimizer.label} {cell.problem}").remote(cell)

    done = [0]

    def finished(index: int, outcome: Outcome) -> None:
        done[0] += 1
        on_outcome(index, outcome)

    def failed(index: int, error: Exception, runs: int) -> bool:
        failure = CellFailure(error)
        if runs < RUNS_PER_CELL:
            log.warning("%s failed: %s; it runs once more", _name(cells[index]), failure.reason)
            return True
        finished(index, failure)
        return False

    run_tasks(
        len(cells),
        submit,
        finished,
        failed,
        lambda: None if on_done is None else on_done(done[0], len(cells)),
    )


def _name(cell: Cell) -> str:
    seeds = ", ".join(map(str, cell.seeds))
    return f"{cell.optimizer.label} on {cell.problem}, {cell.stream} seed {seeds},"


def _run_on_one_thread(cell: Cell) -> CellResult:
    torch.set_num_threads(1)
    return run_cell(cell)


def _check_room(nodes: Sequence[Mapping[str, object]], num_cpus: float, num_gpus: float) -> None:
    """Raise UserError unless a living node is large enough for one task: otherwise Ray would wait for ever."""
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
        f"no node of the Ray cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs for a cell "
        f"(the largest has {largest[0]:g} and {largest[1]:g})"
    )
