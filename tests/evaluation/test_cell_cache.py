"""Finished cells on the disk: named by what decides them, whole or not found, and never run twice."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.config import GuardSettings, RuleSettings
from ml2o_dist.evaluation import cell_cache
from ml2o_dist.evaluation.cell_cache import CellCache, cell_key, run_cached
from ml2o_dist.evaluation.cells import Cell, CellFailure, CellResult, run_cell
from ml2o_dist.evaluation.optimizer_specs import Adversary, Guarded, HandDesigned, Learned, Stochastic
from ml2o_dist.problems import ProblemSpec
from ml2o_dist.rules.coordinatewise.rule import ML2ONetwork
from tests.wording import says

RULE = RuleSettings(hidden=3)
WEIGHTS = {name: tensor + 0.1 for name, tensor in ML2ONetwork(RULE).state_dict().items()}
LEARNED = Learned("learned", RULE, WEIGHTS)
CELL = Cell(HandDesigned.parse("mean+sgd@0.1"), ProblemSpec.parse("quadratic[n=3]"), (1,), "report", 5)
FULL = replace(
    CELL,
    optimizer=Guarded(LEARNED, GuardSettings()),
    problem=ProblemSpec.parse("multidigits[net=mlp,hidden=4,batch=8]"),
    criticality_batches=2,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return all(equal(getattr(a, each.name), getattr(b, each.name)) for each in fields(a))
    return bool(a == b)


@pytest.mark.parametrize("cell", [CELL, FULL, replace(FULL, optimizer=Adversary("nan"))])
def test_a_finished_cell_is_found_as_it_was(cell: Cell, tmp_path: Path) -> None:
    cache, result = CellCache(tmp_path), run_cell(cell)
    key = cell_key(cell, {})
    assert cache.find(key) is None
    cache.keep(key, result)
    found = CellCache(tmp_path).find(key)
    assert found is not None
    if cell.optimizer != Adversary("nan"):
        assert equal(found, result)
    assert found.losses.shape == result.losses.shape
    assert cache.find(cell_key(replace(cell, steps=6), {})) is None


def test_the_key_is_of_what_decides_the_cell_and_of_nothing_else() -> None:
    other = dict(WEIGHTS)
    name = next(iter(other))
    other[name] = other[name] + 1e-6
    optimizers = [
        HandDesigned.parse("mean+sgd@0.1"),
        HandDesigned.parse("mean+sgd@0.2"),
        HandDesigned.parse("mgda+sgd@0.1"),
        HandDesigned.parse("mean+adam@0.1"),
        LEARNED,
        Learned("learned", RULE, other),
        Learned("learned", RULE, None),
        Learned("learned", RULE.model_copy(update={"lr": 0.02}), WEIGHTS),
        Stochastic("dssmg", 0.55),
        Stochastic("smg", 0.55),
        Stochastic("dssmg", 0.6),
        Adversary("random"),
        Adversary("ascent"),
        Guarded(Adversary("ascent"), GuardSettings()),
        Guarded(Adversary("ascent"), GuardSettings(budget=1.0)),
        Guarded(LEARNED, GuardSettings()),
    ]
    cells = [replace(CELL, optimizer=each) for each in optimizers]
    cells += [
        replace(CELL, **change)
        for change in (
            {"problem": ProblemSpec.parse("quadratic[n=4]")},
            {"seeds": (2,)},
            {"seeds": (1, 2)},
            {"stream": "tuning"},
            {"steps": 6},
            {"dtype": torch.float64},
            {"device": "cuda"},
            {"problem_seed": 0},
            {"criticality_batches": 3},
        )
    ]
    keys = [cell_key(cell, {}) for cell in cells] + [cell_key(CELL, {"digits": "a"}), cell_key(CELL, {"digits": "b"})]
    assert len(set(keys)) == len(keys)
    assert cell_key(replace(CELL, optimizer=replace(LEARNED, label="x"), data_root="/elsewhere"), {}) == keys[4]
    assert cell_key(replace(CELL, device="cuda:1"), {}) == cell_key(replace(CELL, device="cuda:0"), {})


def test_the_code_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_key(CELL, {})
    monkeypatch.setattr(cell_cache, "code_sha256", lambda: "other")
    assert cell_key(CELL, {}) != before


def test_what_is_not_whole_is_not_found(tmp_path: Path) -> None:
    cache, key = CellCache(tmp_path), cell_key(CELL, {})
    cache.keep(key, run_cell(CELL))
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert cache.find(key) is None, f"byte {place} of {len(content)}"
    for length in (0, 1, 8, 100, len(content) - 1):
        file.write_bytes(content[:length])
        assert cache.find(key) is None
    file.write_bytes(content)
    assert cache.find(key) is not None
    elsewhere = tmp_path / "ff" / f"{'f' * 64}.safetensors"
    elsewhere.parent.mkdir(exist_ok=True)
    elsewhere.write_bytes(content)
    assert cache.find("f" * 64) is None, "another cell's file"


def test_a_disk_that_takes_nothing_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = CellCache(tmp_path / "file" / "cells")
    for _ in range(3):
        cache.keep("0" * 64, run_cell(CELL))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert says(caplog.text, "cells", "cannot be kept")


class Runner:
    """Runs what is missing, and counts it; cells whose number is in `failing` fail."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.ran: list[Cell] = []
        self.found: list[int] = []
        self.failing = failing

    def __call__(self, missing: Any, keep: Any, found: int) -> None:
        self.found.append(found)
        for index, cell in enumerate(missing):
            self.ran.append(cell)
            keep(index, CellFailure(OSError()) if len(self.ran) in self.failing else run_cell(cell))


def outcomes_of(cells: list[Cell], cache: CellCache, run: Runner) -> list[Any]:
    outcomes: dict[int, Any] = {}
    run_cached(cells, [cell_key(cell, {}) for cell in cells], cache, run, outcomes.__setitem__)
    assert sorted(outcomes) == list(range(len(cells)))
    return [outcomes[index] for index in range(len(cells))]


def test_no_finished_cell_is_run_again_and_equal_ones_are_run_once(tmp_path: Path) -> None:
    cells = [replace(CELL, steps=steps) for steps in (3, 4, 3, 5)]
    cache, first = CellCache(tmp_path), Runner(failing=(2,))
    outcomes = outcomes_of(cells, cache, first)
    assert [len(first.ran), first.found] == [3, [0]]
    assert isinstance(outcomes[1], CellFailure)
    assert torch.equal(outcomes[0].losses, outcomes[2].losses)
    again = Runner()
    second = outcomes_of(cells, cache, again)
    assert [cell.steps for cell in again.ran] == [4], "a failure is not kept"
    assert again.found == [3]
    assert all(isinstance(outcome, CellResult) for outcome in second)
    assert torch.equal(second[3].losses, outcomes[3].losses)
    third = Runner()
    outcomes_of(cells, cache, third)
    assert third.found == [], "nothing is missing: nobody is asked"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("losses", lambda t: t[0]),
        ("losses", lambda t: t.long()),
        ("diverged", lambda t: t.double()),
        ("evaluations", lambda t: t.double()),
        ("seconds", lambda t: t[:2]),
        ("end.weights", lambda t: t.flatten()),
        ("record", lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        ("record", lambda t: torch.tensor(list(b"{"), dtype=torch.uint8)),
        ("record", lambda t: t.double()),
    ],
)
def test_a_cell_of_other_shapes_is_not_found(name: str, change: Any, tmp_path: Path) -> None:
    """Its digest agrees, as a careful forger would have it."""
    cell = replace(CELL, criticality_batches=1)
    CellCache(tmp_path).keep("ab", run_cell(cell))
    assert CellCache(tmp_path).find("ab") is not None
    (file,) = tmp_path.rglob("*.safetensors")
    tensors = load(file.read_bytes())
    del tensors["sha256"]
    tensors[name] = change(tensors[name]).contiguous()
    tensors["sha256"] = torch.tensor(list(weights_sha256(tensors).encode()), dtype=torch.uint8)
    file.write_bytes(save(tensors))
    assert CellCache(tmp_path).find("ab") is None


def test_a_fifo_in_the_cache_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    os.mkfifo(tmp_path / "ab" / "ab.safetensors")
    assert CellCache(tmp_path).find("ab") is None
