"""One MLflow run: begun or gone on with, written to. Every call here may wait for the server, or raise."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ml2o_dist.tracking.store import connect, ensure_experiment, redacted

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS_PER_CALL = 1000
"""MLflow's limit for one `log_batch`; its other limit, for params and tags, is `_WORDS_PER_CALL`."""

_WORDS_PER_CALL = 100

_log = logging.getLogger("ml2o_dist.tracking")


@dataclass(frozen=True)
class Point:
    """One value of one metric. MLflow stores equal points once, so that one sent twice by mistake does no harm."""

    key: str
    value: float
    step: int
    timestamp_ms: int


@dataclass(frozen=True)
class Params:
    """Settings of a run; MLflow never changes one that is there."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Tags:
    """Tags of a run, which may be set again."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Upload:
    """A file for the run's artifacts, into `folder` ("": the top)."""

    path: Path
    folder: str


Words = Params | Tags | Upload


class Run(Protocol):
    """What the sink's thread needs of a run."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None until the server has answered."""

    def start(self) -> None:
        """Begin the run or go on with it; may be called again after it raised."""

    def send_points(self, points: Sequence[Point]) -> None:
        """Write at most METRICS_PER_CALL points."""

    def send(self, words: Words) -> None:
        """Write params, tags or a file."""

    def end(self, status: Status) -> None:
        """Mark the run as ended."""


class MlflowRun:
    """A run at a tracking URI. A run that is gone on with takes no step of a metric twice."""

    def __init__(self, uri: str, experiment: str, run_id: str | None, run_name: str) -> None:
        self._uri = uri
        self._experiment = experiment
        self._name = run_name
        self._wanted = run_id
        self._run_id: str | None = None
        self._client: Any = None
        self._known_params: set[str] = set()
        self._old_keys: set[str] = set()
        self._old_steps: dict[str, set[int]] = {}

    @property
    def run_id(self) -> str | None:
        """The run's id; None until the server has answered."""
        return self._run_id

    def start(self) -> None:
        """Begin the run, or go on with `run_id`; one that is not there is replaced by a new one, with a warning.

        Raises:
            UserError: a store that cannot be used; MlflowException or OSError: no answer.
        """
        self._client = connect(self._uri)
        if self._run_id is not None:
            return
        experiment_id = ensure_experiment(self._client, self._uri, self._experiment)
        run = self._find(self._wanted) if self._wanted else None
        if run is None:
            self._run_id = str(self._client.create_run(experiment_id, run_name=self._name or None).info.run_id)
            return
        self._client.update_run(self._wanted, status="RUNNING")
        self._known_params = set(run.data.params)
        self._old_keys = set(run.data.metrics)
        self._run_id = self._wanted

    def send_points(self, points: Sequence[Point]) -> None:
        """Write the points whose step the run does not hold yet."""
        from mlflow.entities import Metric

        fresh = [point for point in points if point.step not in self._steps_before(point.key)]
        metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in fresh]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def send(self, words: Words) -> None:
        """Write params that the run does not have yet, tags, or a file; raises FileNotFoundError if it is gone."""
        from mlflow.entities import Param, RunTag

        if isinstance(words, Upload):
            if not words.path.exists():
                raise FileNotFoundError(f"{words.path} is gone")
            self._client.log_artifact(self._run_id, str(words.path), words.folder or None)
        elif isinstance(words, Params):
            fresh = [Param(key, value) for key, value in words.values.items() if key not in self._known_params]
            for part in _parts(fresh):
                self._client.log_batch(self._run_id, params=part)
        else:
            for part in _parts([RunTag(key, value) for key, value in words.values.items()]):
                self._client.log_batch(self._run_id, tags=part)

    def end(self, status: Status) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run_id, status)

    def _find(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            _log.warning("MLflow run %s is not at %s (any more): a new one begins", run_id, redacted(self._uri))
            return None
        return run

    def _steps_before(self, key: str) -> set[int]:
        """Return the steps of `key` that the run held when it was gone on with; one question per key."""
        if key not in self._old_keys:
            return set()
        if key not in self._old_steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._old_steps[key] = {int(metric.step) for metric in history}
        return self._old_steps[key]


def _parts(items: list[Any]) -> Iterable[list[Any]]:
    return (items[start : start + _WORDS_PER_CALL] for start in range(0, len(items), _WORDS_PER_CALL))
