"""Finished cells on the disk, so that a benchmark that was killed can resume.

The key of a cell covers everything that decides its result, except for the measured times.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import save as save_tensors
from torch import Tensor

from ml2o_dist.artifact import weights_sha256
from ml2o_dist.evaluation.cells import Cell, CellResult, GuardRecord, Measured, Outcome
from ml2o_dist.evaluation.criticality import Criticality
from ml2o_dist.plugins import loaded
from ml2o_dist.runtime.errors import UserError
from ml2o_dist.runtime.files import cache_folder, replacing
from ml2o_dist.runtime.reading import MIB, parse_json, validated
from ml2o_dist.runtime.reading_tensors import read_tensors

FORMAT = 1
"""Version of the file format. It is part of the key: files of another version are not found."""

_PACKAGE = Path(__file__).parents[1]
_CODE = (
    "rules",
    "problems",
    "evaluation/cells.py",
    "evaluation/optimizer_specs.py",
    "evaluation/criticality.py",
    "evaluation/metrics.py",
    "config.py",
    "runtime/seeding.py",
)
"""The code that a cell runs. After a change in it no earlier cell is found."""

LIBRARIES = ("numpy", "scikit-learn", "scipy", "torch", "torchjd", "clarabel", "cvxpy", "ecos", "qpsolvers", "quadprog")
"""Libraries that a cell computes with; the last five are solvers that some aggregators call."""

_END = ("absolute", "relative", "gap", "weights", "losses")

CELL_LIMIT = 4 * 1024 * MIB
"""Largest file of a cell, in bytes. 100 instances of 10 objectives over 100 000 steps take 800 million bytes."""


class _Record(BaseModel):
    key: str
    forwards: int
    backwards: int
    guard_share: float | None = None


_RECORD = TypeAdapter(_Record)

log = logging.getLogger(__name__)


def cell_key(cell: Cell, data_sha256: Mapping[str, str]) -> str:
    """Return the sha256 of everything that decides what `cell` does; `data_sha256` is of its problem's data.

    The key covers the optimizer's identity, not its name. It also covers the versions of the libraries, the code that
    a cell runs and the loaded plug-ins.
    """
    content = {
        "format": FORMAT,
        "code": code_sha256(),
        "versions": library_versions(),
        "plugins": sorted(plugin.sha256 for plugin in loaded()),
        "optimizer": cell.optimizer.identity,
        "problem": str(cell.problem),
        "data": dict(data_sha256),
        "seeds": cell.seeds,
        "stream": cell.stream,
        "steps": cell.steps,
        "device": torch.device(cell.device).type,
        "dtype": str(cell.dtype),
        "problem_seed": cell.problem_seed,
        "criticality_batches": cell.criticality_batches,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the version of every library that a cell's figures depend on, including those that plug-ins name."""
    named = {name for plugin in loaded() for name in plugin.libraries}
    return {name: _version(name) for name in sorted({*LIBRARIES, *named})}


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


@cache
def code_sha256() -> str:
    """Return the sha256 of the code that a cell runs."""
    digest = hashlib.sha256()
    for name in _CODE:
        place = _PACKAGE / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(_PACKAGE)}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


class CellCache:
    """Finished cells by their key, one file for each cell."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: None for `cells` in the cache folder."""
        self.folder = folder or cache_folder() / "cells"
        self._warned = False

    def find(self, key: str) -> CellResult | None:
        """Return the finished cell of this key; None if it is missing or its file is damaged."""
        try:
            tensors, _ = read_tensors(self._file(key), "cell", CELL_LIMIT)
        except (FileNotFoundError, UserError):
            return None
        texts = [tensors.pop(name, torch.empty(0)) for name in ("sha256", "record")]
        if any(text.dtype != torch.uint8 or text.dim() != 1 for text in texts):
            return None
        digest, written = (bytes(text.tolist()) for text in texts)
        if digest != weights_sha256(tensors | {"record": texts[1]}).encode():
            return None
        try:
            record = validated(_RECORD, parse_json(written, "a cell's record"), "a cell's record")
        except UserError:
            return None
        return _result(tensors, record) if record.key == key and _is_result(tensors, record) else None

    def keep(self, key: str, result: CellResult) -> None:
        """Write a finished cell atomically. If the disk refuses, log a warning, but only the first time."""
        tensors, record = _parts(result)
        tensors["record"] = _bytes(json.dumps(record | {"key": key}))
        tensors["sha256"] = _bytes(weights_sha256(tensors))
        try:
            with replacing(self._file(key)) as stream:
                stream.write(save_tensors(tensors))
        except OSError as error:
            if not self._warned:
                log.warning("finished cells cannot be kept in %s: %s", self.folder, error.strerror or error)
            self._warned = True

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def run_cached(
    cells: Sequence[Cell],
    keys: Sequence[str],
    cache: CellCache,
    run: Callable[[Sequence[Cell], Callable[[int, Outcome], None], int], None],
    on_outcome: Callable[[int, Outcome], None],
) -> None:
    """Call `on_outcome` with (index, outcome) of every cell: first the cells in `cache`, then those that `run` runs.

    `run` gets the missing cells, a callback like that of `run_outcomes_on_ray`, and the number of cells found. It is
    not called if no cell is missing. Cells with the same key are run once.
    """
    missing: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        found = None if key in missing else cache.find(key)
        if found is None:
            missing.setdefault(key, []).append(index)
        else:
            on_outcome(index, found)
    wanted = list(missing.items())

    def keep(position: int, outcome: Outcome) -> None:
        key, indices = wanted[position]
        if isinstance(outcome, CellResult):
            cache.keep(key, outcome)
        for index in indices:
            on_outcome(index, outcome)

    if wanted:
        run([cells[indices[0]] for _, indices in wanted], keep, len(cells) - sum(map(len, missing.values())))


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _parts(result: CellResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "losses": result.losses,
        "diverged": result.diverged,
        "evaluations": result.evaluations,
        "seconds": result.seconds,
        **{f"test.{name}": value for name, value in result.test_metrics.items()},
    }
    record: dict[str, Any] = {"forwards": result.forwards, "backwards": result.backwards}
    if result.guard is not None:
        tensors["accepted"] = result.guard.accepted
        record["guard_share"] = result.guard.share
    if result.measured is not None:
        tensors |= {f"end.{name}": getattr(result.measured.end, name) for name in _END}
        tensors |= {"conflicting": result.measured.conflicting, "mean_cosine": result.measured.mean_cosine}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, record


def _is_result(tensors: Mapping[str, Tensor], record: _Record) -> bool:
    """Tell whether the tensors have the names, dtypes and shapes of a `CellResult`."""
    losses = tensors.get("losses")
    if losses is None or losses.dim() != 3:
        return False
    steps, instances, objectives = losses.shape
    each, both = (instances,), (instances, objectives)
    shapes = {"losses": (steps, *both), "diverged": each, "evaluations": (steps,), "seconds": (steps,)}
    shapes |= {name: both for name in tensors if name.startswith("test.")}
    if "accepted" in tensors:
        shapes["accepted"] = (steps, instances)
        if record.guard_share is None:
            return False
    if "conflicting" in tensors:
        ends = {f"end.{name}": both if name in ("weights", "losses") else each for name in _END}
        shapes |= {"conflicting": each, "mean_cosine": each, **ends}
    kinds = {"diverged": torch.bool, "accepted": torch.bool, "evaluations": torch.int64}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes and all(
        tensor.dtype == kinds[name] if name in kinds else tensor.is_floating_point() for name, tensor in tensors.items()
    )


def _result(tensors: Mapping[str, Tensor], record: _Record) -> CellResult:
    guard = measured = None
    if "accepted" in tensors:
        guard = GuardRecord(tensors["accepted"], record.guard_share or 0.0)
    if "conflicting" in tensors:
        end = Criticality(*(tensors[f"end.{name}"] for name in _END))
        measured = Measured(end, tensors["conflicting"], tensors["mean_cosine"])
    return CellResult(
        losses=tensors["losses"],
        test_metrics={name.removeprefix("test."): value for name, value in tensors.items() if name.startswith("test.")},
        diverged=tensors["diverged"],
        forwards=record.forwards,
        backwards=record.backwards,
        evaluations=tensors["evaluations"],
        seconds=tensors["seconds"],
        guard=guard,
        measured=measured,
    )
