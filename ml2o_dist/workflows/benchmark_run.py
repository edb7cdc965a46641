"""Run a benchmark for `ml2o evaluate` or the end of a meta-training: each cell comes from the cache or runs on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from ml2o_dist.config import EvaluateSettings
from ml2o_dist.evaluation.benchmark import check_fit, plan, summarise, tasks, tune_entrants
from ml2o_dist.evaluation.cell_cache import CellCache, cell_key, run_cached
from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import Cell, Outcome
from ml2o_dist.evaluation.evaluated import Evaluation
from ml2o_dist.evaluation.optimizer_names import Entrant
from ml2o_dist.runtime.cluster import RayEnded
from ml2o_dist.runtime.errors import Aborted
from ml2o_dist.runtime.progress import StepDisplay
from ml2o_dist.runtime.stopping import Stopped, StopRequest

KEPT = "are finished and kept: the same command goes on from there"


class BenchmarkStopped(Stopped):
    """A stop was requested; the finished cells are kept, and the same benchmark can resume with them."""

    def __init__(self, done: int, cells: int) -> None:
        super().__init__(f"{done} of {cells} cells {KEPT}")


def run_benchmark(
    settings: EvaluateSettings,
    entrants: Sequence[Entrant],
    console: Console,
    stop: StopRequest,
    connect: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Tune, run and summarise. Cells that the cache folder holds are not run again.

    Args:
        settings: resolved.
        connect: called once before Ray is used; not called if every cell is in the cache.

    Raises:
        UserError: an optimizer and a problem do not fit together, or no node is large enough for a cell.
        BenchmarkStopped: a stop was requested.
        Aborted: the Ray that this process has started died.
    """
    began = time.monotonic()
    data = check_fit(settings, entrants)
    cache = CellCache()
    connected = False
    finished = 0
    tuned_cells = sum(each.tuned for each in entrants) * len(settings.learning_rates) * settings.tuning_seeds
    total = (tuned_cells + len(entrants) * settings.seeds) * len(tasks(settings))

    def run(title: str, cells: Sequence[Cell]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}

        def run_missing(missing: Sequence[Cell], keep: Callable[[int, Outcome], None], found: int) -> None:
            nonlocal connected
            if not connected:
                connect()
                connected = True
            resources = settings.resources
            with StepDisplay(console, title, len(cells), found) as display:

                def on_done(done: int, _: int) -> None:
                    if stop():
                        raise BenchmarkStopped(finished + found + done, total)
                    display.update(found + done)

                try:
                    run_outcomes_on_ray(
                        missing, keep, num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, on_done=on_done
                    )
                except RayEnded as error:
                    raise Aborted(f"{error}; {finished + len(outcomes)} of {total} cells {KEPT}") from error

        nonlocal finished
        keys = [cell_key(cell, data[cell.problem]) for cell in cells]
        run_cached(cells, keys, cache, run_missing, outcomes.__setitem__)
        finished += len(cells)
        return [outcomes[index] for index in range(len(cells))]

    tuned = tune_entrants(settings, entrants, lambda cells: run("tune", cells))
    planned = plan(settings, entrants, tuned)
    outcomes = run("evaluate", [each.cell for each in planned])
    return summarise(settings, planned, outcomes, tuned, data, time.monotonic() - began)
