"""One MLflow run: begin or resume it, and write to it. Every call here may wait for the server, or raise.

Every call may be repeated: records that the run has already are not written twice.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ml2o_dist.artifact import WEIGHTS_FILE
from ml2o_dist.runtime.names import mlflow_key
from ml2o_dist.tracking.identity import RUN_KEY_TAG, RunIdentity
from ml2o_dist.tracking.records import End, Params, Point, Record, Tags, Upload, Version, Words
from ml2o_dist.tracking.registry import register_version
from ml2o_dist.tracking.run_files import copied
from ml2o_dist.tracking.store import connect, ensure_experiment, is_refusal, redacted

METRICS_PER_CALL = 1000
"""MLflow's limit for one `log_batch`; its other limit, for params and tags, is `_WORDS_PER_CALL`."""

_WORDS_PER_CALL = 100

_log = logging.getLogger("ml2o_dist.tracking")


class RunGone(Exception):
    """The server no longer has the run, for example because it lost its database; `start` begins another."""


class Run(Protocol):
    """The interface of a run that senders of records need."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None until the server has answered."""

    def start(self) -> bool:
        """Begin or resume the run; tells whether it is new. May be called again after it raised."""

    def send_points(self, points: Sequence[Point]) -> None:
        """Write at most METRICS_PER_CALL points."""

    def send(self, words: Words) -> None:
        """Write any other record."""


class MlflowRun:
    """A run at a tracking URI. A metric's step that the run has already is not written again, whoever wrote it.

    Attributes:
        version: the last version that was registered from it.
    """

    def __init__(self, uri: str, identity: RunIdentity, run_dir: Path | None = None) -> None:
        """Name the run without calling MLflow.

        Args:
            uri: the tracking URI; it may contain a password, `identity` does not.
            run_dir: the only folder that files are sent from; with None any file that the caller names is sent.
        """
        self.version: int | None = None
        self._uri = uri
        self._identity = identity
        self._run_dir = run_dir
        self._run_id: str | None = None
        self._client: Any = None
        self._is_new = False
        self._params: set[str] = set()
        self._steps: dict[str, set[int]] = {}

    @property
    def run_id(self) -> str | None:
        """The run's id; None until the server has answered."""
        return self._run_id

    def start(self) -> bool:
        """Resume the run with this id or run key, or begin one, with a warning if an expected run is missing.

        Raises:
            UserError: a store that cannot be used; MlflowException or OSError: no answer.
        """
        identity = self._identity
        self._client = connect(self._uri)
        experiment_id = ensure_experiment(self._client, self._uri, identity.experiment)
        known = self._run_id or identity.run_id
        run = self._by_id(known) if known else None
        run = run or self._by_key(experiment_id)
        self._is_new = run is None
        if run is None:
            if known:
                _log.warning("MLflow run %s is not at %s (any more): a new one begins", known, redacted(self._uri))
            run = self._client.create_run(
                experiment_id,
                start_time=identity.created_ms,
                run_name=identity.run_name or None,
                tags={RUN_KEY_TAG: identity.run_key},
            )
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._params = set(run.data.params)
        self._steps = {}
        self._run_id = str(run.info.run_id)
        return self._is_new

    def send_points(self, points: Sequence[Point]) -> None:
        """Write the points whose step the run does not have yet, the first of each step.

        A call whose answer was lost is repeated with the same points; MLflow keeps one of each.

        Raises:
            RunGone: see there.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        fresh: dict[tuple[str, int], Point] = {}
        for point in points:
            if point.step not in self._steps_of(point.key):
                fresh.setdefault((point.key, point.step), point)
        if fresh:
            metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in fresh.values()]
            try:
                self._client.log_batch(self._run_id, metrics=metrics)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise RunGone(f"run {self._run_id} is not there any more") from error
                raise
        for key, step in fresh:
            self._steps[key].add(step)

    def send(self, words: Words) -> None:
        """Write params that the run does not have yet, tags, a file, a version, or the run's end.

        Raises:
            FileNotFoundError: the file is gone; UserError: the file is not in the run directory, or the artifact cannot
                be registered.
        """
        from mlflow.entities import Param, RunTag

        match words:
            case Params(values):
                named = {mlflow_key(key): value for key, value in values.items()}
                fresh = {key: value for key, value in named.items() if key not in self._params}
                for part in _parts([Param(key, value) for key, value in fresh.items()]):
                    self._client.log_batch(self._run_id, params=part)
                self._params |= fresh.keys()
            case Tags(values):
                for part in _parts([RunTag(mlflow_key(key), value) for key, value in values.items()]):
                    self._client.log_batch(self._run_id, tags=part)
            case Upload(path, folder):
                with self._staged(path) as staged:
                    self._client.log_artifact(self._run_id, str(staged), folder or None)
            case Version(path, model, description):
                weights = path if path.suffix == ".safetensors" else path / WEIGHTS_FILE
                with self._staged(weights, weights.with_suffix(".json")) as staged:
                    self.version = register_version(
                        self._uri,
                        model,
                        staged,
                        run_id=self._run_id,
                        experiment=self._identity.experiment,
                        description=description,
                    )
            case End(status, timestamp_ms):
                self._client.set_terminated(self._run_id, status, end_time=timestamp_ms)

    @contextmanager
    def _staged(self, *files: Path) -> Iterator[Path]:
        """Copy files of the run directory to a place where only this user can replace them; give the first copy."""
        with tempfile.TemporaryDirectory(prefix="ml2o-send-") as folder:
            for file in files:
                copied(file, self._run_dir or file.resolve().parent, Path(folder) / file.name)
            yield Path(folder) / files[0].name

    def _by_id(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _by_key(self, experiment_id: str) -> Any:
        """Return a run whose creation was never answered, or not noted before a kill; None if there is none."""
        found = self._client.search_runs(
            [experiment_id], f"tags.`{RUN_KEY_TAG}` = '{self._identity.run_key}'", max_results=1
        )
        return found[0] if found else None

    def _steps_of(self, key: str) -> set[int]:
        """Return the steps of `key` that the run has; for a resumed run MLflow is asked once per key.

        This takes one number for each point of the run: less than the history in every checkpoint.
        """
        if key not in self._steps:
            history = [] if self._is_new else self._client.get_metric_history(self._run_id, key)
            self._steps[key] = {int(metric.step) for metric in history}
        return self._steps[key]


def send_records(run: Run, records: Sequence[Record], refused: Callable[[Record, Exception], None]) -> None:
    """Write one call's worth of records to `run`: at most METRICS_PER_CALL points, or one other record.

    A batch that MLflow refuses for good is halved until the culprit is alone; `refused` gets it, and it is skipped.
    Errors that are not refusals, such as a store that does not answer, are raised; the call can then be repeated.
    """
    points = [record for record in records if isinstance(record, Point)]
    try:
        if points:
            run.send_points(points)
        for record in records:
            if not isinstance(record, Point):
                run.send(record)
    except Exception as error:  # MLflow lets its database's and requests' errors through
        if not is_refusal(error):
            raise
        if len(records) == 1:
            refused(records[0], error)
            return
        half = len(records) // 2
        send_records(run, records[:half], refused)
        send_records(run, records[half:], refused)


def _parts(items: list[Any]) -> Iterable[list[Any]]:
    return (items[start : start + _WORDS_PER_CALL] for start in range(0, len(items), _WORDS_PER_CALL))
