"""Evaluations in MLflow: one run for each optimizer and suite, so that MLflow's table can sort and compare them.

The figures of a run depend only on the optimizer and the suite, not on other optimizers in the same evaluation. A run
that exists already is not written again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml2o_dist.config_file import flat_settings, settings_hash
from ml2o_dist.evaluation.evaluated import EvaluatedCell, Evaluation, Row, Standing
from ml2o_dist.runtime.names import mlflow_key
from ml2o_dist.tracking.identity import RUN_KEY_TAG
from ml2o_dist.tracking.store import connect, ensure_experiment, refused

LONGEST_NAME = 80
"""Characters kept from the end of a problem's name: MLflow allows 250 for a key."""

METRICS_PER_CALL, WORDS_PER_CALL = 1000, 100
"""MLflow's limits for one `log_batch`."""


UNGUARDED = "none"
"""The tag `guard` of an optimizer without one."""


@dataclass(frozen=True)
class Version:
    """The registered version of an optimizer."""

    model: str
    version: int


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    step: int = 0


def log_evaluation(
    uri: str,
    evaluation: Evaluation,
    files: Sequence[Path],
    *,
    optimizers: Iterable[str],
    identities: Mapping[str, str],
    guards: Mapping[str, str],
    versions: Mapping[str, Version],
    git: str,
) -> dict[str, str]:
    """Write a run for each of the `optimizers`; return their run ids.

    Args:
        files: tables and pictures, attached to every run.
        identities: a hash of each optimizer; the same hash, suite and data mean the same run.
        guards: descriptions of the guards, for optimizers with one.  versions: for registered optimizers.

    Raises:
        UserError: MLflow does not answer, or refuses.
    """
    try:
        client = connect(uri)
        experiment = ensure_experiment(client, uri, evaluation.settings.tracking.experiment)
        return {
            name: _log(client, experiment, evaluation, name, files, identities[name], guards.get(name, UNGUARDED),
                       versions.get(name), git)
            for name in optimizers
        }  # fmt: skip
    except Exception as error:  # MLflow lets its database's and requests' errors through
        raise refused(uri, error) from error


def _log(
    client: Any,
    experiment: str,
    evaluation: Evaluation,
    optimizer: str,
    files: Sequence[Path],
    identity: str,
    guard: str,
    version: Version | None,
    git: str,
) -> str:
    rows = [row for row in evaluation.rows if row.optimizer == optimizer]
    cells = [cell for cell in evaluation.cells if cell.optimizer == optimizer]
    parts = [identity, evaluation.suite_sha256, evaluation.data_sha256, [row.loss for row in rows]]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    for run in client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'"):
        if run.info.status == "FINISHED":
            return str(run.info.run_id)
        client.delete_run(run.info.run_id)  # it was cut short: its content is unknown
    suite = evaluation.suite or "evaluation"
    shown = f"{version.model} v{version.version}{'' if guard == UNGUARDED else ' guarded'}" if version else optimizer
    tags = {
        RUN_KEY_TAG: key,
        "optimizer": optimizer,
        "suite": suite,
        "suite_sha256": evaluation.suite_sha256,
        "guard": guard,
        "git": git,
        "config_hash": settings_hash(evaluation.settings),
        "role": rows[0].role if rows else "other",
    }
    if version is not None:
        tags |= {"model": version.model, "model_version": str(version.version)}
    run_id = str(client.create_run(experiment, run_name=f"{shown} on {suite}", tags=tags).info.run_id)
    _log_params(client, run_id, evaluation, optimizer, rows)
    _log_inputs(client, run_id, evaluation)
    _log_points(client, run_id, list(_points(rows, cells, evaluation.standing(optimizer))))
    for file in files:
        client.log_artifact(run_id, str(file), "plots" if file.suffix == ".png" else None)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def metric_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name a key that MLflow allows; a number is added if two keys would be equal."""
    found: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^\w.\-: ]+", "-", name, flags=re.ASCII).strip("-.: ")[-LONGEST_NAME:] or "x"
        key, number = base, 2
        while key in found.values():
            key, number = f"{base}-{number}", number + 1
        found[name] = key
    return found


def _points(rows: Sequence[Row], cells: Sequence[EvaluatedCell], standing: Standing | None) -> Iterator[Point]:
    """Yield finite figures: over all problems, per problem, per seed (as the step) and along the steps."""
    problems = metric_names(row.problem for row in rows)
    figures: list[Point] = []
    if standing is not None:
        for name in ("ratio", "to_best", "improvement"):
            interval = getattr(standing, name)
            figures += [Point(name, interval.estimate), Point(f"{name}_low", interval.low)]
            figures.append(Point(f"{name}_high", interval.high))
        for name in ("ratio_at_evaluations", "ratio_at_time", "mean_rank", "delta_m", "speedup", "log_area"):
            figures.append(Point(name, getattr(standing, name)))
        figures += _some("delta_m_accuracy", standing.delta_m_accuracy)
    if seeds := sum(row.seeds for row in rows):
        figures.append(Point("diverged", sum(row.diverged for row in rows) / seeds))
    for row in rows:
        place = problems[row.problem]
        figures += _some(f"learning_rate/{place}", row.learning_rate) + _some(f"acceptance/{place}", row.acceptance)
        budgets = ("loss_at_evaluations", "loss_at_time") if standing is not None else ()  # the reference's
        for name in ("loss", "criticality", "evaluations", "ms_per_step", *budgets):
            figures.append(Point(f"{name}/{place}", getattr(row, name)))
        for name, values in (("loss", row.losses), ("test_accuracy", row.test_accuracy or ())):
            figures += [Point(f"{name}_{i + 1}/{place}", value) for i, value in enumerate(values)]
        if row.front is not None:
            for name in ("hypervolume", "igd_plus", "additive_epsilon"):
                figures.append(Point(f"{name}/{place}", getattr(row.front, name)))
        curve = row.curve
        figures += [Point(f"curve/{place}", *pair) for pair in zip(curve.loss, curve.steps, strict=True)]
        if curve.acceptance is not None:
            shares = zip(curve.acceptance, curve.steps, strict=True)
            figures += [Point(f"acceptance_curve/{place}", *pair) for pair in shares]
    figures += [Point(f"seed_loss/{problems[cell.problem]}", sum(cell.losses), cell.seed) for cell in cells]
    return (point for point in figures if math.isfinite(point.value))


def _some(key: str, value: float | None) -> list[Point]:
    return [] if value is None else [Point(key, value)]


def _log_params(client: Any, run_id: str, evaluation: Evaluation, optimizer: str, rows: Sequence[Row]) -> None:
    from mlflow.entities import Param

    left_out = ("optimizers", "about", "suite")
    settings = {key: value for key, value in flat_settings(evaluation.settings).items() if key not in left_out}
    settings["optimizer"] = optimizer
    params = [Param(mlflow_key(key), str(value)[:500]) for key, value in settings.items()]
    for start in range(0, len(params), WORDS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + WORDS_PER_CALL])


def _log_inputs(client: Any, run_id: str, evaluation: Evaluation) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(name=name[:500], digest=digest[:36], source_type="code", source=json.dumps({"sha256": digest})),
            [InputTag("mlflow.data.context", "evaluation")],
        )
        for name, digest in evaluation.data_sha256.items()
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def _log_points(client: Any, run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    metrics = [Metric(point.key, point.value, now, point.step) for point in points]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])
