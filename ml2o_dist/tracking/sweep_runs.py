"""A sweep in MLflow: a run for the whole, and nested below it a run for each trial, found again by the trial's id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml2o_dist.runtime.errors import UserError
from ml2o_dist.tracking.identity import RunIdentity
from ml2o_dist.tracking.records import Status
from ml2o_dist.tracking.sink import MlflowSink
from ml2o_dist.tracking.spool import Spool
from ml2o_dist.tracking.store import redacted
from ml2o_dist.tracking.store_run import MlflowRun

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow's pages nest runs."""


class SweepRuns:
    """The nested runs. Repeated records are written once, since a resumed sweep sends all of them again.

    Attributes:
        run_ids: run ids, as far as MLflow has returned them, by the trial's id.
    """

    def __init__(self, uri: str, experiment: str, parent: MlflowSink, key: str, folder: Path) -> None:
        """Create the runs; `key` identifies the sweep among all others, `folder` holds the unsent records."""
        self.run_ids: dict[str, str] = {}
        self.key = key
        self._uri, self._experiment, self._parent = uri, experiment, parent
        self._folder = folder
        self._open: dict[str, MlflowSink] = {}
        self._begun: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._unsent: dict[str, tuple[Status, int]] = {}  # how it ended, and how many metric values are missing
        self._nested: set[str] = set()

    @property
    def unsent(self) -> int:
        """How many ended runs have records that MLflow has not got."""
        return len(self._unsent)

    @property
    def unsent_values(self) -> int:
        """How many metric values of ended runs MLflow has not got."""
        return sum(values for _, values in self._unsent.values())

    def begin(self, trial: str, name: str, values: Mapping[str, Any]) -> None:
        """Begin or resume the run of a trial; `values` are its parameters."""
        if trial in self._open:
            return
        identity = RunIdentity(
            redacted(self._uri),
            self._experiment,
            name,
            run_key=run_key(self.key, trial),
        )
        spool = Spool(self._folder_of(trial))
        self._begun[trial] = name, values
        sink = self._open[trial] = MlflowSink(MlflowRun(self._uri, identity, self._folder), redacted(self._uri), spool)
        sink.log_params(values)
        sink.set_tags({"trial": name, "sweep": self._experiment})
        self._nest(trial)

    def log(self, trial: str, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of a trial that was begun."""
        self._nest(trial)
        self._open[trial].log(dict(figures), step)

    def tag(self, trial: str, tags: Mapping[str, object]) -> None:
        """Set tags of a trial that was begun."""
        self._open[trial].set_tags(tags)

    def end(self, trial: str, status: Status, limit_s: float = 3.0) -> None:
        """End the run of a trial that was begun; waits for MLflow at most `limit_s` seconds."""
        self._nest(trial)
        sink = self._open.pop(trial)
        values = sink.close(status, limit_s)
        if sink.run_id:
            self.run_ids[trial] = sink.run_id
        if sink.spool or trial not in self._nested:
            self._unsent[trial] = status, values
        else:
            self._unsent.pop(trial, None)
        self._nested.discard(trial)

    def send_again(self) -> None:
        """Send the unsent records of ended runs; to be called when MLflow answers (again)."""
        for trial, (status, _) in list(self._unsent.items()):
            self.begin(trial, *self._begun[trial])
            self.end(trial, status)

    def close(self, limit_s: float) -> None:
        """End the runs of the trials that are still open, as KILLED."""
        for trial in list(self._open):
            self.end(trial, "KILLED", limit_s)
        with suppress(OSError):  # not empty: MLflow has not got everything
            self._folder.rmdir()

    def _folder_of(self, trial: str) -> Path:
        """Return the folder of a trial's spool; raises UserError for an id, or a link, that leads elsewhere."""
        if self._folder.is_symlink() or not re.fullmatch(r"[\w-][\w. -]*", trial):
            raise UserError(f"the spool of trial {trial!r} would not lie in {str(self._folder)!r}")
        return self._folder / trial

    def _nest(self, trial: str) -> None:
        """Nest the trial below the sweep as soon as the sweep has a run."""
        if trial not in self._nested and self._parent.run_id:
            self._open[trial].set_tags({PARENT_TAG: self._parent.run_id})
            self._nested.add(trial)


def run_key(sweep: str, trial: str) -> str:
    """Return the run key by which a trial's run is found again."""
    return re.sub(r"[^\w.-]", "-", f"{sweep}-{trial}")
