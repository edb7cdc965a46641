"""Cells as Ray tasks: what raises or dies runs once more, then it has failed, and the others are not disturbed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ml2o_dist.evaluation.cell_tasks import run_outcomes_on_ray
from ml2o_dist.evaluation.cells import Cell, CellFailure, CellResult, Outcome, run_cell
from ml2o_dist.evaluation.optimizer_specs import HandDesigned
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.adversaries import AdversaryRule
from ml2o_dist.runtime.errors import UserError

CELL = Cell(HandDesigned.parse("mean+sgd@0.1"), ProblemSpec.parse("quadratic[n=3]"), (1,), "report", 5)


def failing(folder: Path, times: int, how: str) -> Cell:
    """A cell that fails the first `times` times it is run. Its class is local: workers get it by value."""

    @dataclass(frozen=True)
    class Failing:
        label: str = "failing"

        def rule(self, device, dtype):
            run = len(list(folder.iterdir()))
            (folder / str(run)).touch()
            if run < times and how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if run < times:
                raise UserError("no such thing") if how == "refuses" else RuntimeError("a solver\ngave up")
            return AdversaryRule("frozen")

    return replace(CELL, optimizer=Failing())


def outcomes(cells, **options):
    found: dict[int, Outcome] = {}
    run_outcomes_on_ray(cells, found.__setitem__, **options)
    return [found[index] for index in range(len(cells))]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", ["raises", *(pytest.param(how, marks=pytest.mark.long) for how in ("dies", "refuses"))])
def test_a_cell_that_fails_once_is_run_once_more(tmp_path, how):
    first, second = outcomes([failing(tmp_path, 1, how), CELL])
    assert len(list(tmp_path.iterdir())) == 2
    assert isinstance(first, CellResult)
    assert torch.equal(second.losses, run_cell(CELL).losses)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        pytest.param("raises", "RuntimeError: a solver gave up", marks=pytest.mark.long),
        ("dies", "WorkerCrashedError"),
        pytest.param("refuses", "no such thing", marks=pytest.mark.long),
    ],
)
def test_a_cell_that_fails_twice_has_failed_alone(tmp_path, how, reason):
    first, second = outcomes([failing(tmp_path, 9, how), CELL])
    assert len(list(tmp_path.iterdir())) == 2
    assert isinstance(first, CellFailure)
    assert reason in first.reason
    assert "\n" not in first.reason
    assert torch.equal(second.losses, run_cell(CELL).losses)


@pytest.mark.usefixtures("cluster")
def test_a_task_has_one_torch_thread():
    seen: list[int] = []

    @dataclass(frozen=True)
    class Counting:
        label: str = "counting"

        def rule(self, device, dtype):
            return AdversaryRule("frozen" if torch.get_num_threads() == 1 else "nan")

    cell = replace(CELL, optimizer=Counting())
    (result,) = outcomes([cell], on_done=lambda done, total: seen.append(done))
    assert not result.diverged.any()
    assert seen[-1] == 1
